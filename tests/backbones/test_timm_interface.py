"""A model of the library has the interface of timm's models."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import mtr_lab
from mtr_lab import UserError, create_model, patch
from mtr_lab.backbones.adaptation import resize_channels
from mtr_lab.reduction import restore

TINY = {"img_size": (32, 48), "patch_size": 8, "depth": 3, "embed_dim": 24, "d_state": 4, "num_classes": 5}
NAMES = ("vim_ti", "videomamba_ti")


def tiny(name: str = "vim_ti", **changes):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**TINY, **changes}).eval()
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def tokens_of(model, images: Tensor) -> tuple[Tensor, Tensor]:
    """The normalised class token and patches before the head, computed from the state."""
    state = model.forward_state(images)
    normed, _ = model.norm_f(state.hidden, state.residual)
    places = state.special[:, 0].tolist()
    patches = [torch.cat([image[:place], image[place + 1 :]]) for image, place in zip(normed, places, strict=True)]
    return torch.stack([normed[i, place] for i, place in enumerate(places)]), torch.stack(patches)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_describes_itself(name: str) -> None:
    model = tiny(name, drop_rate=0.3)
    assert (model.num_features, model.head_hidden_size, model.num_prefix_tokens, model.in_chans) == (24, 24, 1, 3)
    assert model.get_classifier() is model.head
    assert model.default_cfg is model.pretrained_cfg
    assert [info["module"] for info in model.feature_info] == ["layers.0", "layers.1", "layers.2"]
    assert all(model.get_submodule(info["module"]) for info in model.feature_info)
    assert {(info["num_chs"], info["reduction"]) for info in model.feature_info} == {(24, 8)}
    assert model.head_drop.p == 0.3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("removed", [0, 9])
def test_features_are_all_tokens_with_the_class_token_first(name: str, removed: int, images: Tensor) -> None:
    model = tiny(name)
    mtr_lab.patch(model, "tome", schedule=[0, removed, 0])
    with torch.no_grad():
        features = model.forward_features(images)
        class_token, patches = tokens_of(model, images)
        assert torch.equal(features, torch.cat([class_token[:, None], patches], dim=1))
        assert torch.equal(model.forward_head(features), model(images))
        assert torch.equal(model.forward_head(features, pre_logits=True), class_token)
        assert torch.equal(model.forward_head(class_token), model(images))
    assert features.shape == (2, 25 - removed, 24)


@pytest.mark.parametrize("name", NAMES)
def test_poolings(name: str, images: Tensor) -> None:
    model = tiny(name)
    with torch.no_grad():
        class_token, patches = tokens_of(model, images)
        model.reset_classifier(0)
        assert torch.equal(model(images), class_token)
        model.reset_classifier(0, "avg")
        assert torch.allclose(model(images), patches.mean(1), atol=1e-6)
        assert torch.allclose(model.forward_head(model.forward_features(images)), model(images), atol=1e-6)
        model.reset_classifier(0, "")
        assert torch.equal(model(images), model.forward_features(images))
        model.reset_classifier(7)
        assert model(images).shape == (2, 25, 7)
        assert tiny(name, num_classes=0, global_pool="")(images).shape == (2, 25, 24)
    with pytest.raises(UserError, match="unknown global_pool 'map'.*'avg'"):
        model.reset_classifier(0, "map")
    with pytest.raises(UserError, match="unknown global_pool 'max'"):
        tiny(global_pool="max")


def test_the_mean_is_weighted_by_size(images: Tensor) -> None:
    """Merging equal patches leaves them equal, so the mean weighted by size does not change."""
    model = tiny(num_classes=0, global_pool="avg")
    mtr_lab.patch(model, "tome", schedule=[0, 0, 9])
    with torch.no_grad():
        state = model.forward_state(images)
        normed, _ = model.norm_f(state.hidden, state.residual)
        actual = model(images)
    for image in range(2):
        rows = [i for i in range(state.size.shape[1]) if i != state.special[image, 0]]
        expected = sum(state.size[image, i] * normed[image, i] for i in rows) / 24
        assert state.size[image].sum() == 25
        assert state.size[image, rows].max() > 1
        assert torch.allclose(actual[image], expected, atol=1e-5)
    with pytest.raises(UserError, match="global_pool='avg' of a patched model weights the tokens by their sizes"):
        model.forward_head(model.forward_features(images))


def test_dropout_before_the_head_acts_in_training_alone(images: Tensor) -> None:
    model, plain = tiny(drop_rate=0.5), tiny()
    assert torch.equal(model(images), plain(images))
    model.reset_classifier(0)
    assert (model.train()(images) == 0).float().mean() > 0.2


def test_a_new_head_is_where_the_model_is() -> None:
    model = tiny().to(torch.bfloat16)
    model.reset_classifier(11)
    assert (model.num_classes, model.head.weight.dtype, model.head.out_features) == (11, torch.bfloat16, 11)
    assert model(torch.zeros(1, 3, 32, 48, dtype=torch.bfloat16)).shape == (1, 11)


@pytest.mark.parametrize("policy", [None, "mtr", "evit", "random"])
def test_checkpointing_changes_no_gradient(policy: str | None, images: Tensor) -> None:
    model = tiny().train()
    if policy:
        mtr_lab.patch(model, policy, ratio=0.2)

    def gradients() -> list[Tensor]:
        torch.manual_seed(3)
        return list(torch.autograd.grad(model(images).square().sum(), list(model.parameters())))

    expected, runs = gradients(), []
    for block in model.blocks:
        block.mixer.register_forward_pre_hook(lambda *call: runs.append(call))
    model.set_grad_checkpointing()
    actual = gradients()
    assert len(runs) == 2 * len(model.blocks)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    with torch.no_grad():
        model(images)
    model.set_grad_checkpointing(False)
    gradients()
    assert len(runs) == 4 * len(model.blocks)


@pytest.mark.parametrize("name", NAMES)
def test_intermediates_are_the_stream_on_the_grid(name: str, images: Tensor) -> None:
    model = tiny(name)
    with torch.no_grad():
        states = mtr_lab.trace(model, images)
        final, maps = model.forward_intermediates(images)
        assert torch.equal(final, model.forward_features(images))
        assert [m.shape for m in maps] == [(2, 24, 4, 6)] * 3
        for state, actual in zip(states, maps, strict=True):
            place = model.class_position(24)
            stream = torch.cat([state.stream[:, :place], state.stream[:, place + 1 :]], dim=1)
            assert torch.equal(actual.flatten(2).transpose(1, 2), stream)
            assert actual.is_contiguous()
        _, normed = model.forward_intermediates(images, norm=True, output_fmt="NLC", return_prefix_tokens=True)
        assert torch.allclose(torch.cat(list(normed[-1])[::-1], dim=1), final, atol=1e-6)


@pytest.mark.parametrize(("indices", "blocks"), [(2, [1, 2]), ([0, -1], [0, 2]), ((-2,), [1]), ([2, 0], [0, 2])])
def test_intermediates_of_some_blocks(indices, blocks: list[int], images: Tensor) -> None:
    model = tiny()
    with torch.no_grad():
        everything = model.forward_intermediates(images, intermediates_only=True)
        some = model.forward_intermediates(images, indices, intermediates_only=True)
        assert all(torch.equal(everything[block], actual) for block, actual in zip(blocks, some, strict=True))
        runs = []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *call: runs.append(call))
        stopped, _ = model.forward_intermediates(images, indices, stop_early=True)
    assert len(runs) == max(blocks) + 1
    assert stopped.shape == (2, 25, 24)


@pytest.mark.parametrize("policy", ["mtr", "evit"])
def test_intermediates_of_a_patched_model_are_restored(policy: str, images: Tensor) -> None:
    model = tiny()
    mtr_lab.patch(model, policy, ratio=0.2)
    with torch.no_grad():
        states = mtr_lab.trace(model, images)
        final, maps = model.forward_intermediates(images)
        assert all(torch.equal(restore(state, (4, 6)), m) for state, m in zip(states, maps, strict=True))
        assert torch.equal(final, model.forward_features(images))
        mtr_lab.unpatch(model)
        assert torch.equal(model.forward_intermediates(images)[1][0], tiny().forward_intermediates(images)[1][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"indices": 4}, "indices=4: expected a number of blocks from 1 to 3"),
        ({"indices": [0, 3]}, "the model has the blocks 0 to 2, not 3"),
        ({"output_fmt": "NHWC"}, "output_fmt=NHWC: expected NCHW or NLC"),
    ],
)
def test_intermediates_that_do_not_exist_are_refused(arguments: dict, message: str, images: Tensor) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        tiny().forward_intermediates(images, **arguments)
    video = create_model("videomamba_ti", **{**TINY, "num_frames": 2})
    with pytest.raises(UserError, match="create the model without num_frames"):
        video.forward_intermediates(torch.zeros(1, 3, 2, 32, 48))


@pytest.mark.parametrize("create", [timm.create_model, create_model])
def test_features_only(create: Callable, images: Tensor) -> None:
    whole = tiny()
    torch.manual_seed(0)
    model = create("vim_ti", **TINY, features_only=True, out_indices=(0, 1))
    assert model.feature_info.channels() == [24, 24]
    assert model.feature_info.reduction() == [8, 8]
    assert "num_classes" not in model.default_cfg
    expected = whole.forward_intermediates(images, [0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, model(images), strict=True))
    sum(m.sum() for m in model(images)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    mtr_lab.patch(model.model, "tome", schedule=[9, 0])
    assert [m.shape for m in model(images)] == [(2, 24, 4, 6)] * 2
    assert len(create("vim_ti", **TINY, features_only=True)(images)) == 3
    with pytest.raises(UserError, match="feature_cls=hook: expected 'getter'"):
        create("vim_ti", **TINY, features_only=True, feature_cls="hook")


def test_pretrained_weights_with_other_classes(images: Tensor) -> None:
    whole = create_model("vim_nano", pretrained=True)
    images = torch.randn(1, 3, 112, 112)
    with pytest.warns(UserWarning, match="has 10 classes, the model 5: the head is left untrained"):
        five = timm.create_model("vim_nano", pretrained=True, num_classes=5).eval()
    none = timm.create_model("vim_nano", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        expected = whole.eval().forward_features(images)
        assert torch.equal(five.forward_features(images), expected)
        assert torch.equal(none(images), expected[:, 0])
    assert (five.pretrained_cfg["num_classes"], none.pretrained_cfg["num_classes"]) == (5, 0)
    assert five.pretrained_cfg["label_names"] is none.pretrained_cfg["label_names"] is None
    assert whole.pretrained_cfg["label_names"] is not None


def test_a_file_of_other_classes_is_loaded_without_its_head_if_there_is_none(tmp_path: Path, images: Tensor) -> None:
    save_file(tiny().state_dict(), tmp_path / "w.safetensors", metadata={"label_names": json.dumps(list("abcde"))})
    model = create_model("vim_ti", **{**TINY, "num_classes": 0}, checkpoint=tmp_path / "w.safetensors")
    assert torch.equal(model.forward_features(images), tiny().forward_features(images))


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_weights_for_other_channels(name: str, channels: int, tmp_path: Path) -> None:
    """As timm adapts its own weights; one channel gives the same as three equal ones."""
    coloured = tiny(name)
    save_file(coloured.state_dict(), tmp_path / "w.safetensors")
    model = tiny(name, in_chans=channels, checkpoint=str(tmp_path / "w.safetensors"))
    kernel = coloured.patch_embed.proj.weight
    adapted = timm.models.adapt_input_conv(channels, kernel.detach())
    assert torch.allclose(model.patch_embed.proj.weight, adapted, atol=1e-7)
    assert (model.in_chans, model.pretrained_cfg["input_size"]) == (channels, (channels, 32, 48))
    grey = torch.randn(1, 1, 32, 48)
    if channels == 1:
        assert torch.allclose(model(grey), coloured(grey.expand(-1, 3, -1, -1)), atol=1e-5)
    assert resize_channels(torch.zeros(4, 3, 2, 8, 8), channels).shape == (4, channels, 2, 8, 8)


IMAGE = torch.zeros(1, 3, 32, 48)


@pytest.mark.parametrize(
    ("wrong", "messages"),
    [
        (Image.new("RGB", (48, 32)), ["as a tensor, got Image", "timm.data.create_transform"]),
        (np.zeros((1, 3, 32, 48), np.float32), ["as a tensor, got ndarray"]),
        (IMAGE[0], ["expected images (B, channels, H, W), got shape (3, 32, 48)", "images[None]"]),
        (IMAGE[:, :1], ["the model's 3 channels, got shape (1, 1, 32, 48)", "create it with in_chans=1"]),
        (IMAGE.movedim(1, -1), ["got shape (1, 32, 48, 3)", "images.movedim(-1, 1)"]),
        (IMAGE.to(torch.uint8), ["floating-point numbers, got torch.uint8", "normalise"]),
        (IMAGE.half(), ["in the model's torch.float32, got torch.float16", "images.to(torch.float32)"]),
        (IMAGE[..., :45], ["image width 45 does not fit patches of 8 at stride 8: resize to 40 or 48"]),
    ],
    ids=lambda value: None if isinstance(value, list) else type(value).__name__,
)
def test_an_input_that_is_not_a_batch_of_images_is_refused_in_one_sentence(wrong, messages: list[str]) -> None:
    for call in (tiny(), mtr_lab.compile(tiny()), tiny().forward_features, tiny().forward_intermediates):
        with pytest.raises(UserError) as error:
            call(wrong)
        assert all(message in str(error.value) for message in messages), error.value


@pytest.mark.parametrize("wrong", [Image.new("RGB", (48, 32)), IMAGE[0], IMAGE.movedim(1, -1)])
def test_the_input_is_checked_before_a_policy_resizes_it(wrong) -> None:
    model = tiny()
    with pytest.raises(UserError) as unpatched:
        model(wrong)
    patch(model, "resolution", ratio=0.3)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(UserError) as error:
            call(wrong)
        assert str(error.value) == str(unpatched.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("model_dtype", "dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_autocast_takes_images_of_any_precision(model_dtype: torch.dtype, dtype: torch.dtype, images: Tensor) -> None:
    model = tiny().to(model_dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model(images.to(dtype))
    assert torch.allclose(actual.float(), tiny()(images), atol=0.1)
    with torch.device("meta"):
        model = create_model("vim_ti", **TINY)
    with pytest.raises(UserError, match="got torch.float64"):
        model(torch.zeros(1, 3, 32, 48, dtype=torch.float64, device="meta"))


@pytest.mark.parametrize("ratio", [None, 0.2])
def test_export_and_compile_take_the_model(ratio: float | None, images: Tensor) -> None:
    model = tiny()
    if ratio:
        mtr_lab.patch(model, "mtr", ratio=ratio)
    with torch.no_grad():
        exported = torch.export.export(model, (images,)).module()
        assert torch.allclose(exported(images), model(images), atol=1e-6)
        compiled = torch.compile(model.forward_intermediates, backend="eager", fullgraph=True)
        actual, expected = compiled(images), model.forward_intermediates(images)
        assert torch.allclose(actual[0], expected[0], atol=1e-6)
        assert torch.allclose(actual[1][0], expected[1][0], atol=1e-6)


def test_symbolic_tracing_is_refused_with_what_to_use() -> None:
    with pytest.raises(UserError, match=r"use torch\.export or torch\.compile"):
        torch.fx.symbolic_trace(tiny())


def test_a_patched_model_is_pickled(images: Tensor) -> None:
    model = tiny()
    mtr_lab.patch(model, "mtr", ratio=0.2)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.forward_intermediates(images)[1][-1], model.forward_intermediates(images)[1][-1])
