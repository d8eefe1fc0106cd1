"""VideoMamba for videos: geometry, positions in space and time, weights, and errors."""

import re
from pathlib import Path

import pytest
import torch

from mtr_lab import UserError, create_model

TINY = {"img_size": (16, 24), "patch_size": 8, "depth": 2, "embed_dim": 16, "d_state": 4, "num_classes": 5}


def tiny(**changes):
    torch.manual_seed(0)
    return create_model("videomamba_ti", **{**TINY, "num_frames": 4, **changes}).eval()


def test_parameters_of_the_published_size() -> None:
    with torch.device("meta"):
        image, video = create_model("videomamba_s"), create_model("videomamba_s", num_frames=8)
    shapes = {name: tuple(value.shape) for name, value in video.state_dict().items()}
    assert shapes["patch_embed.proj.weight"] == (384, 3, 1, 16, 16)
    assert shapes["pos_embed"] == (1, 197, 384)
    assert shapes["temporal_pos_embedding"] == (1, 8, 384)
    assert shapes.keys() - {"temporal_pos_embedding"} == image.state_dict().keys()


def test_without_frames_it_is_the_model_for_images() -> None:
    image, absent = tiny(num_frames=None), create_model("videomamba_ti", **TINY)
    assert image.state_dict().keys() == absent.state_dict().keys()
    assert "temporal_pos_embedding" not in image.state_dict()
    assert image(torch.zeros(1, 3, 16, 24)).shape == (1, 5)


@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 8), (2, 4), (4, 8)])
@torch.no_grad()
def test_tokens_come_frame_by_frame_after_the_class_token(kernel_size: int, stride: int) -> None:
    """Changing one pixel of one frame changes the tokens of the patches that contain it, and no others."""
    model = tiny(kernel_size=kernel_size, stride=stride)
    rows, columns = (16 - 8) // stride + 1, (24 - 8) // stride + 1
    video = torch.randn(1, 3, 4, 16, 24)
    changed = video.clone()
    changed[0, :, 2, 3, 20] += 1  # the third frame, in the first row and last column of patches
    before, after = model.embed(video), model.embed(changed)
    assert before.special.tolist() == [[0]]
    assert before.hidden.shape[1] == 4 // kernel_size * rows * columns + 1
    touched = (before.hidden != after.hidden).any(-1)[0, 1:].reshape(4 // kernel_size, rows, columns)
    expected = torch.zeros_like(touched)
    expected[2 // kernel_size, 0, columns - 1] = True
    assert torch.equal(touched, expected)


@torch.no_grad()
def test_positions_are_the_sum_of_space_and_time_and_the_class_token_has_no_time() -> None:
    model = tiny(kernel_size=2)
    torch.nn.init.normal_(model.temporal_pos_embedding)
    for parameter in (model.cls_token, *model.patch_embed.parameters()):
        torch.nn.init.zeros_(parameter)
    (hidden,) = model.embed(torch.randn(1, 3, 4, 16, 24)).hidden
    spatial, temporal = model.pos_embed[0], model.temporal_pos_embedding[0]
    assert torch.equal(hidden[0], spatial[0])
    for frame in range(2):
        for patch in range(6):
            assert torch.equal(hidden[1 + 6 * frame + patch], spatial[1 + patch] + temporal[frame])
    larger = model.embed(torch.randn(1, 3, 4, 32, 24)).hidden[0, 1:].unflatten(0, (2, 4, 3))
    torch.testing.assert_close(larger[1] - larger[0], (temporal[1] - temporal[0]).expand(4, 3, 16))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 24), "expected videos (B, channels, T, H, W), got shape (1, 3, 16, 24)"),
        ((3, 4, 16, 24), "expected videos (B, channels, T, H, W), got shape (3, 4, 16, 24)"),
        ((1, 3, 6, 16, 24), "expected videos of 4 frames (B, channels, T, H, W), got shape (1, 3, 6, 16, 24): create"),
        ((1, 3, 6, 16, 24), "num_frames=6"),
        ((1, 3, 4, 17, 24), "height 17 does not fit patches of 8"),
    ],
)
def test_videos_of_another_shape_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        tiny()(torch.zeros(shape))


def test_a_model_for_images_refuses_videos() -> None:
    with pytest.raises(UserError, match=re.escape("expected images (B, channels, H, W), got shape (1, 3, 4, 16, 24)")):
        tiny(num_frames=None)(torch.zeros(1, 3, 4, 16, 24))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vim_ti", {"num_frames": 8}, "num_frames=8: Vim takes images only"),
        ("videomamba_ti", {"num_frames": 0}, "num_frames of videomamba_ti=0: expected an integer from 1 to 65536"),
        ("videomamba_ti", {"num_frames": "8"}, "num_frames of videomamba_ti=8: expected an integer"),
        ("videomamba_ti", {"num_frames": 8, "kernel_size": 3}, "kernel_size=3 does not divide num_frames=8"),
        ("videomamba_ti", {"kernel_size": 2}, "kernel_size=2 does not divide num_frames=None"),
        ("videomamba_ti", {"num_frames": 8, "pretrained": True}, "no weights are registered for videomamba_ti with"),
    ],
)
def test_impossible_models_are_refused(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        create_model(name, **arguments)


@torch.no_grad()
def test_a_local_checkpoint_is_loaded_strictly(tmp_path: Path) -> None:
    model, video = tiny(), torch.randn(2, 3, 4, 16, 24)
    torch.nn.init.normal_(model.temporal_pos_embedding)
    torch.save({"model": model.state_dict()}, tmp_path / "k400.pth")
    torch.manual_seed(7)
    arguments = {**TINY, "num_frames": 4, "checkpoint": tmp_path / "k400.pth", "pretrained": True}
    loaded = create_model("videomamba_ti", **arguments).eval()
    assert torch.equal(loaded(video), model(video))
    assert loaded.pretrained_cfg["input_size"] == (3, 16, 24)
    with pytest.raises(UserError, match="unexpected temporal_pos_embedding"):
        create_model("videomamba_ti", **{**arguments, "num_frames": None})


def test_a_checkpoint_for_images_does_not_fit_a_video(tmp_path: Path) -> None:
    torch.save(tiny(num_frames=None).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"missing temporal_pos_embedding(.|\n)*has shape \(16, 3, 8, 8\)"):
        tiny(checkpoint=tmp_path / "w.pth")


def test_positions_of_another_number_of_frames_are_interpolated_on_load(tmp_path: Path) -> None:
    model = tiny(num_frames=2)
    model.temporal_pos_embedding.data = torch.tensor([0.0, 4.0])[None, :, None].expand(1, 2, 16).clone()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded = tiny(num_frames=8, checkpoint=tmp_path / "w.pth")
    ramp = loaded.temporal_pos_embedding[0]
    assert ramp.shape == (8, 16)
    torch.testing.assert_close(ramp[:, 0], torch.tensor([0.0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4]))


def test_imagenets_classes_are_not_a_videos() -> None:
    with torch.device("meta"):
        config = create_model("videomamba_ti", num_frames=8).pretrained_cfg
    assert config["label_names"] is None
    assert "hf_hub_id" not in config


def test_gradients_reach_the_embeddings() -> None:
    model = tiny().train()
    model(torch.randn(2, 3, 4, 16, 24)).square().sum().backward()
    for parameter in (model.temporal_pos_embedding, model.pos_embed, model.patch_embed.proj.weight):
        assert (parameter.grad.flatten(0, -2) != 0).any(-1).all()  # every position's (every filter's)
    assert "temporal_pos_embedding" in model.no_weight_decay()


@pytest.mark.parametrize(("pool", "alike"), [("token", False), ("avg", True)])
def test_which_frames_reach_the_head_before_training(pool: str, alike: bool) -> None:
    """The class token is the first one and reads the first frame; the mean reads all frames alike."""
    torch.manual_seed(0)
    model = create_model("videomamba_ti", **{**TINY, "num_frames": 4}, global_pool=pool, long_memory=True)
    shape = (2, *model.input_shape)
    clips = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    (gradient,) = torch.autograd.grad(model(clips).square().sum(), clips)
    frames = gradient.square().sum((0, 1, 3, 4)).sqrt()
    assert (frames.max() < 2 * frames.min()) == alike
    assert frames.argmax() == 0 or alike
