"""MambaVision against its authors' outputs, and its parts against plain PyTorch in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from authors_objects import golden_object
from safetensors import safe_open
from torch import Tensor, nn

import mtr_lab
from mtr_lab import UserError, create_model, ops
from mtr_lab.backbones import blocks_of, last_state
from mtr_lab.backbones.mambavision_blocks import Attention, BatchNorm, MambaVisionMixer
from mtr_lab.measure.flops import counted_flops, model_flops
from mtr_lab.tasks.features import FeatureMaps
from mtr_lab.tasks.segmentation.model import Segmenter
from mtr_lab.tokens import Layout, TokenState, restore
from mtr_lab.tokens.positions import Positions

GOLDEN = Path(__file__).parent.parent / "golden" / "mambavision_official.safetensors"
SMALL = {"dim": 8, "in_dim": 8, "depths": (1, 1, 4, 3), "num_heads": (1, 1, 2, 2), "window_size": (1, 1, 3, 3)}
SIZES = {"whole windows": (96, 96), "padded windows": (72, 104)}
INPUTS = {"whole windows": "", "padded windows": "padded."}
"""By the windows: the prefix of the names of a golden input and its outputs."""


def golden_model() -> tuple[Any, dict[str, Tensor]]:
    with safe_open(GOLDEN, framework="pt") as file:
        arguments = {k: json.loads(v) for k, v in file.metadata().items() if k not in ("notes", "upstream")}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model = create_model("mambavision_t", img_size=96, **arguments).eval()
    model.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("param.")}, strict=True)
    return model, tensors


def small(**changes: Any) -> Any:
    """A model with parameters that are not zero."""
    torch.manual_seed(0)
    model = create_model("mambavision_t", **{**SMALL, "num_classes": 5, **changes}).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def images(*size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("backend", ["reference", "cpu", "portable"])
@pytest.mark.parametrize("prefix", INPUTS.values(), ids=INPUTS)
@torch.no_grad()
def test_outputs_equal_the_authors(prefix: str, backend: str) -> None:
    model, golden = golden_model()
    outputs: list[TokenState] = []
    for block in blocks_of(model):
        block.register_forward_hook(lambda *call: outputs.append(call[2]))
    with ops.use_backend(backend):
        logits = model(golden[f"{prefix}input"])
        features, maps = model.forward_intermediates(golden[f"{prefix}input"])
        pooled = model.pooled(golden[f"{prefix}input"])
    assert relative_error(logits, golden[f"{prefix}logits"]) < 1e-5
    assert relative_error(pooled, golden[f"{prefix}features"].flatten(1)) < 1e-5
    assert relative_error(features.mean((2, 3)), pooled) < 1e-5
    assert relative_error(outputs[3].stream, golden[f"{prefix}level.2.block.3"]) < 1e-5
    assert relative_error(maps[3], golden[f"{prefix}level.3"]) < 1e-5
    for level in range(3):
        assert relative_error(model.levels[level].downsample(maps[level]), golden[f"{prefix}level.{level}"]) < 1e-5


@torch.no_grad()
def test_the_outputs_depend_on_what_is_easily_done_otherwise() -> None:
    """Else parity would prove nothing about it."""
    for change in ("bias of Δ once", "causal convolution"):
        model, golden = golden_model()
        for block in blocks_of(model):
            if not isinstance(block.mixer, MambaVisionMixer):
                continue
            if change == "bias of Δ once":
                block.mixer.dt_proj.bias.div_(2)
            else:
                for conv in (block.mixer.conv1d_x, block.mixer.conv1d_z):
                    conv.weight.copy_(conv.weight.roll(1, -1))
        assert relative_error(model(golden["input"]), golden["logits"]) > 1e-2


def mixed_plainly(mixer: Any, hidden: Tensor) -> Tensor:
    """One token after the other."""
    x, z = (hidden @ mixer.in_proj.weight.T).chunk(2, -1)
    padded = [F.pad(half, (0, 0, 1, 1)) for half in (x, z)]
    weights = mixer.conv1d_x.weight[:, 0], mixer.conv1d_z.weight[:, 0]
    x, z = (
        F.silu(sum(half[:, k : k + hidden.shape[1]] * weight[:, k] for k in range(3)))
        for half, weight in zip(padded, weights, strict=True)
    )
    low_rank, b, c = (x @ mixer.x_proj.weight.T).split([mixer.dt_rank, mixer.d_state, mixer.d_state], -1)
    delta = F.softplus(low_rank @ mixer.dt_proj.weight.T + 2 * mixer.dt_proj.bias)
    state, outputs = 0, []
    for t in range(hidden.shape[1]):
        decay = torch.exp(-delta[:, t, :, None] * mixer.A_log.exp())
        state = decay * state + (delta * x)[:, t, :, None] * b[:, t, None]
        outputs.append((state * c[:, t, None]).sum(-1) + mixer.D * x[:, t])
    return torch.cat([torch.stack(outputs, 1), z], -1) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("d_state", [1, 2, 8])
@pytest.mark.parametrize("width", [16, 36])
def test_a_mixer_and_its_gradients(width: int, d_state: int) -> None:
    torch.manual_seed(0)
    mixer = MambaVisionMixer(width, d_state).double()
    nn.init.normal_(mixer.dt_proj.bias)
    hidden = torch.randn(2, 7, width, dtype=torch.float64, requires_grad=True)
    layout = Layout(1, 7)
    outputs = [mixed_plainly(mixer, hidden), mixer(hidden, Positions(TokenState.start(hidden, (), layout)))[0]]
    torch.testing.assert_close(outputs[1], outputs[0])
    weight = torch.randn_like(outputs[0])
    leaves = [hidden, *mixer.parameters()]
    expected, actual = (torch.autograd.grad((output * weight).sum(), leaves) for output in outputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        single = mixer.float()(hidden.float(), Positions(TokenState.start(hidden.float(), (), layout)))[0]
    assert relative_error(single, outputs[0]) < 1e-5


def merged(hidden: Tensor, into: dict[int, int]) -> TokenState:
    """The state after the tokens in the keys were merged into those in the values."""
    state = TokenState.start(hidden, (), Layout(1, hidden.shape[1])).traced()
    source, target = (torch.tensor([list(t)]).expand(len(hidden), -1) for t in (into.keys(), into.values()))
    return state.reduced(ops.make_plan(source, target, state.index.double(), state.size))


@torch.no_grad()
def test_over_a_gap_the_state_decays_by_twice_the_bias() -> None:
    """As over tokens with zero input, after which nothing else follows: their Δ is the bias alone."""
    torch.manual_seed(0)
    mixer = MambaVisionMixer(16, 4).double()
    nn.init.normal_(mixer.dt_proj.bias)
    for conv in (mixer.conv1d_x, mixer.conv1d_z):  # else tokens at a gap have other neighbours
        conv.weight.mul_(torch.tensor([0.0, 1.0, 0.0]))
    hidden = torch.randn(2, 6, 16, dtype=torch.float64)
    hidden[:, 2:4] = 0
    expected = mixed_plainly(mixer, hidden)[:, [0, 1, 4, 5]]
    state = merged(hidden, {2: 1, 3: 1})._replace(pending=None)
    state = state.with_streams(hidden[:, [0, 1, 4, 5]], None)
    torch.testing.assert_close(mixer(state.raw_hidden, Positions(state, aligned=True))[0], expected)
    assert relative_error(mixer(state.raw_hidden, Positions(state))[0], expected) > 1e-5


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("hook", [False, True])
def test_a_convolution_over_the_original_positions(hook: bool, gradients: bool) -> None:
    torch.manual_seed(0)
    mixer = MambaVisionMixer(16, 4).eval()
    if hook:  # modules with hooks have to be called
        mixer.conv1d_z.register_forward_hook(lambda module, inputs, output: 2 * output)
    hidden = torch.randn(2, 6, 16)
    state = merged(hidden, {2: 1, 5: 0})
    tokens = state.hidden
    source = state.source
    assert source is not None
    with torch.set_grad_enabled(gradients):
        x, z = mixer._convolve(tokens, Positions(state, unmerged=True))
    whole = tokens.gather(1, source[..., None].expand(-1, -1, 16)).chunk(2, -1)
    for actual, half, conv in zip((x, z), whole, (mixer.conv1d_x, mixer.conv1d_z), strict=True):
        expected = F.silu(conv(F.pad(half.mT, (1, 1)))).mT.gather(1, state.index[..., None].expand(-1, -1, 8))
        torch.testing.assert_close(actual, expected)


@torch.no_grad()
def test_attention_among_merged_tokens_is_that_among_the_equal_tokens_they_stand_for() -> None:
    torch.manual_seed(0)
    attention = Attention(12, 3).double()
    hidden = torch.randn(2, 6, 12, dtype=torch.float64)
    hidden[:, 4] = hidden[:, 2] = hidden[:, 1]
    whole = TokenState.start(hidden, (), Layout(1, 6))
    state = merged(hidden, {2: 1, 4: 1})
    expected, _ = attention(hidden, Positions(whole))
    actual, _ = attention(state.hidden, Positions(state))
    torch.testing.assert_close(actual, expected[:, [0, 1, 3, 5]])
    without_size = state._replace(size=torch.ones_like(state.size))
    assert relative_error(attention(state.hidden, Positions(without_size))[0], actual) > 1e-3


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@torch.no_grad()
def test_pooling_by_size_is_the_mean_of_the_restored_map(size: tuple[int, int]) -> None:
    model = small(img_size=size)
    mtr_lab.patch(model, "mtr", schedule=[0, 3, 0, 0, 4, 0, 0])
    state = last_state(model, images(*size))
    maps = state.layout.join(restore(state, state.layout.grid))
    assert maps.shape[2:] == state.layout.image_grid
    normed, _ = model.norm(maps.flatten(2).mT)
    torch.testing.assert_close(model.classify(state), model.head(normed.mean(1)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_padding_is_no_part_of_the_statistics_of_a_batch() -> None:
    model = small(img_size=(72, 104)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not isinstance(module, BatchNorm):
            module.eval()
    model.norm.momentum = 1.0
    model(images(72, 104))
    _, maps = model.eval().forward_intermediates(images(72, 104))
    torch.testing.assert_close(model.norm.running_mean, maps[-1].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert maps[-1].shape[2:] == (3, 4)


@pytest.mark.parametrize("size", [(97, 129), (33, 31), (8, 200)])
@torch.no_grad()
def test_images_of_any_size_and_their_flops(size: tuple[int, int]) -> None:
    model = small(img_size=size)
    assert model(images(*size)).shape == (2, 5)
    assert counted_flops(model, images(*size)) == (model_flops(model), 0)


@pytest.mark.parametrize(
    ("name", "gflops", "published"),
    [("t", 4.58, 4.4), ("t2", 5.25, 5.1), ("s", 7.59, 7.5), ("b", 15.19, 15.0), ("l", 35.20, 34.9)],
)
def test_flops_are_the_published_ones_with_attention_and_scan(name: str, gflops: float, published: float) -> None:
    with torch.device("meta"):
        model = create_model(f"mambavision_{name}")
    actual = model_flops(model, convention="literature") / 1e9
    assert actual == pytest.approx(gflops, abs=0.005)
    assert actual == pytest.approx(published, rel=0.05)


def test_a_ratio_out_of_reach_names_the_maximum_of_the_model() -> None:
    with torch.device("meta"):
        model = create_model("mambavision_t")
    with pytest.raises(
        UserError, match=r"at most 0\.4938 .* blocks \[1, 3, 9\] .* all that can reduce reach 0\.5817\."
    ):
        mtr_lab.patch(model, "mtr", ratio=0.6)
    with pytest.raises(UserError, match=r"at most 0\.5817 .* Lower it\."):
        mtr_lab.patch(model, "mtr", ratio=0.6, first_block=0, interval=1)


def test_the_authors_initialisation() -> None:
    model = create_model("mambavision_b", **SMALL)
    for block in blocks_of(model):
        assert (block.gamma_1 == 1e-5).all()
        assert (block.gamma_2 == 1e-5).all()
        assert (block.mlp.fc1.bias == 0).all()
        if isinstance(block.mixer, MambaVisionMixer):
            assert (block.mixer.dt_proj.bias == 0).all()
            assert block.mixer.dt_proj.weight.abs().max() < 0.1
    assert create_model("mambavision_t", **SMALL).levels[2].blocks[0].gamma_1 is None


def test_stochastic_depth_drops_outputs_and_never_the_stream() -> None:
    model = small(drop_path_rate=0.9).train()
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for level in model.levels for block in level.blocks]
    assert rates == pytest.approx([0.9 * i / 8 for i in range(9)])
    block = blocks_of(model)[-1]
    state = TokenState.start(torch.randn(64, 9, 64), (), Layout(3, 3))
    block.drop_path.drop_prob = 1.0 - 1e-7
    torch.testing.assert_close(TokenState(*block(*state)).stream, state.raw_hidden)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (1, 1, 2)}, r"depths=\(1, 1, 2\): expected one of each for the 4 stages"),
        ({"num_heads": (1, 1, 3, 2)}, r"num_heads=\(1, 1, 3, 2\): 3 heads do not divide the 32 channels there"),
        ({"qkv_bias": False}, "qkv_bias=False of mambavision_t is not represented: attention has no bias"),
        ({"attn_drop_rate": 0.1}, r"attn_drop_rate=0\.1 .* in evaluation, too"),
        ({"layer_scale_conv": 1e-5}, "layer_scale_conv=1e-05 .* scaled by a parameter"),
        ({"global_pool": "token"}, "unknown global_pool 'token'"),
    ],
)
def test_impossible_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model("mambavision_t", **{**SMALL, **arguments})


def test_the_authors_keywords_are_accepted() -> None:
    published = {"qkv_bias": True, "qk_scale": None, "drop_rate": 0.0, "attn_drop_rate": 0.0, "layer_scale_conv": None}
    assert create_model("mambavision_t", in_chans=1, **SMALL, **published).input_shape == (1, 224, 224)


@pytest.mark.parametrize("indices", [(0, 1), (1, 2), (2, 3), 4])
@torch.no_grad()
def test_feature_maps_of_levels(indices: Any) -> None:
    """Convolutional ones, too; of a patched model, the whole grid."""
    model = small(img_size=(72, 104))
    features = create_model("mambavision_t", features_only=True, out_indices=indices, **SMALL, num_classes=5).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    numbers = range(4) if indices == 4 else indices
    maps = features(images(72, 104))
    expected = model.forward_intermediates(images(72, 104), intermediates_only=True)
    for map, number in zip(maps, numbers, strict=True):
        torch.testing.assert_close(map, expected[number])
    assert features.feature_info.channels() == [8 * 2**number for number in numbers]
    assert features.feature_info.reduction() == [4 * 2**number for number in numbers]
    mtr_lab.patch(model, "mtr", schedule=[0, 3, 0, 0, 4, 0, 0])
    reduced = model.forward_intermediates(images(72, 104), intermediates_only=True)
    assert [map.shape for map in reduced] == [map.shape for map in expected]
    assert torch.equal(reduced[1], expected[1])
    assert not torch.equal(reduced[2], expected[2])


@pytest.mark.parametrize("restoration", ["nearest", "skip"])
def test_dense_heads_read_the_pyramid(restoration: str) -> None:
    model = small(img_size=(72, 104))
    maps = FeatureMaps(model, 4, restoration)
    assert (maps.channels, maps.strides) == ([8, 16, 32, 64], [4, 8, 16, 32])
    expected = model.forward_intermediates(images(72, 104), intermediates_only=True)
    for actual, map in zip(maps(images(72, 104)), expected, strict=True):
        torch.testing.assert_close(actual, map)
    assert [map.shape[1] for map in FeatureMaps(model, 3)(images(72, 104))] == [16, 32, 64]
    mtr_lab.patch(model, "mtr", resolution=(64), ratio=None, schedule="none")
    assert [map.shape for map in maps(images(72, 104))] == [map.shape for map in expected]
    mtr_lab.unpatch(model)
    segmenter = Segmenter(model, 3, width=16).train()
    mtr_lab.patch(model, "mtr", schedule=[0, 3, 0, 0, 4, 0, 0])
    logits = segmenter(images(96, 96))
    assert logits.shape == (2, 3, 96, 96)
    logits.square().sum().backward()
    idle = {name for name, parameter in segmenter.named_parameters() if parameter.grad is None}
    assert idle <= {"backbone.norm.weight", "backbone.norm.bias"}


def authors_object() -> tuple[Any, Tensor]:
    model, golden = golden_object("mambavision_official")
    return model, golden["padded.input"]


@torch.no_grad()
def test_an_object_of_the_authors_follows_its_buffers_and_settings() -> None:
    model, batch = authors_object()
    mtr_lab.patch(model, "mtr", ratio=0)
    before = model(batch)
    assert model.double()(batch.double()).dtype == torch.float64
    torch.testing.assert_close(model.float()(batch), before)
    model.norm.running_mean += 1
    assert not torch.allclose(model(batch), before)
    model.norm.running_mean -= 1
    model.levels[0].blocks[0].norm1.eps = 1.0
    assert not torch.allclose(model(batch), before)


def pad_convolutions(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            module.padding = "same"


@torch.no_grad()
def test_whether_modules_or_the_authors_forward_pad_is_the_same() -> None:
    model, batch = authors_object()
    padding, _ = authors_object()
    pad_convolutions(padding)
    for each in (model, padding):
        mtr_lab.patch(each, "mtr", ratio=0)
    assert torch.equal(model(batch), padding(batch))


def swap_mixers(model: Any) -> None:
    blocks = model.levels[2].blocks
    blocks[0].mixer, blocks[3].mixer = blocks[3].mixer, blocks[0].mixer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.levels[2].blocks[2].mixer.attn_drop, "p", 0.1), r"attn_drop of .* drops 0\.1"),
        (swap_mixers, r"levels\.2 has Mamba blocks at .*: expected the first 2 of its blocks"),
        (lambda model: setattr(model.levels[2].blocks[0].mlp, "act", nn.GELU("tanh")), r"mlp\.act of .* expected GELU"),
        (
            lambda model: setattr(model.levels[2].blocks[2].mixer, "q_norm", nn.LayerNorm(8)),
            "q_norm is .* no counterpart",
        ),
    ],
)
def test_other_objects_are_refused(change: Any, message: str) -> None:
    model, _ = authors_object()
    change(model)
    with pytest.raises(UserError, match=message):
        mtr_lab.patch(model, "mtr", ratio=0.1)
