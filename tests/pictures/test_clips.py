"""Pictures of videos show the traced tokens and scores."""

import numpy as np
import pytest
import torch
from PIL import Image

import mtr_lab
from mtr_lab import UserError
from mtr_lab.pictures import BlockView, clip_pages, clip_policies, clip_sheet, observe, save_clip
from mtr_lab.pictures.panels import token_panel, token_panels
from mtr_lab.pictures.regions import DROPPED, PatchGrid

GEOMETRY = {"img_size": (24, 32), "patch_size": 16, "stride": 8, "depth": 6, "embed_dim": 32, "num_classes": 5}


def make(**frames: int):
    torch.manual_seed(0)
    return mtr_lab.create_model("videomamba_ti", **GEOMETRY, **frames).eval()


@torch.no_grad()
@pytest.mark.parametrize("policy", ["mtr", "hsa", "tome"])
def test_the_maps_are_those_of_the_trace(policy: str) -> None:
    """A model of 3 layers of 2 × 3 overlapping patches, two frames each; the class token comes first."""
    model, videos = make(num_frames=6, kernel_size=2), torch.randn(2, 3, 6, 24, 32)
    reduction = mtr_lab.patch(model, policy, ratio=0.2)
    observations, states = observe(model, reduction, videos), mtr_lab.trace(model, videos)
    for i, observation in enumerate(observations):
        assert observation.image.shape == (6, 24, 32, 3)
        assert observation.blocks[0].unreduced == 3 * 2 * 3 + 1
        before = set(range(19))
        for view, state in zip(observation.blocks, states, strict=True):
            after = set(state.index[i].tolist())
            assert view.source.shape == (3, 2, 3)
            assert view.source.flatten().tolist() == state.source[i, 1:].tolist()
            removed = [original in before - after for original in range(1, 19)]
            assert view.removed.flatten().tolist() == removed
            before = after


def test_the_frames_are_those_the_model_sees() -> None:
    model = make(num_frames=4)
    pixels = torch.randint(256, (1, 3, 4, 24, 32), generator=torch.Generator().manual_seed(2))
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None, None] for key in ("mean", "std"))
    (observation,) = observe(model, mtr_lab.patch(model, ratio=0.2), (pixels / 255 - mean) / std)
    assert observation.image.tolist() == pixels[0].permute(1, 2, 3, 0).tolist()


GRID = PatchGrid(1, 2, 4, 4)
SOURCE = np.array([[[0, 1]], [[0, DROPPED]]])
"""The left patches of both layers one token, the upper right on its own, the lower right dropped."""
VIEW = BlockView(GRID, 4, 4, 2, SOURCE, np.zeros_like(SOURCE, dtype=bool), None)


@pytest.mark.parametrize("span", [1, 2])
def test_a_merged_token_has_one_colour_in_all_its_frames(span: int) -> None:
    frames = np.random.default_rng(0).integers(120, size=(2 * span, 4, 8, 3), dtype=np.uint8)
    panels = [np.asarray(panel).astype(int) for panel in token_panels(frames, VIEW, 1)]
    assert len(panels) == 2 * span
    mean = frames[:, :, :4].reshape(-1, 3).mean(0)
    for i, panel in enumerate(panels):
        assert (abs(panel[:, :3] - mean) <= 1).all()
        assert (panel[:, 3] > 180).all()  # the outline, in every frame
        alone = i < span
        assert (panel[:, 5:] == frames[i, :, 5:]).all() == alone
        assert (panel[:, 5:] > 190).all() == (not alone)


def test_a_video_of_one_frame_looks_like_the_image() -> None:
    image = np.random.default_rng(0).integers(256, size=(4, 8, 3), dtype=np.uint8)
    still = BlockView(GRID, 4, 4, 2, SOURCE[1], np.zeros((1, 2), dtype=bool), None)
    moving = BlockView(GRID, 4, 4, 2, SOURCE[1:], np.zeros((1, 1, 2), dtype=bool), None)
    (panel,) = token_panels(image[None], moving, 3)
    assert np.array_equal(panel, token_panel(image, still, 3))


@pytest.fixture
def observations():
    model, videos = make(num_frames=10), torch.randn(1, 3, 10, 24, 32)
    return [observe(model, mtr_lab.patch(model, policy, ratio=0.3), videos)[0] for policy in ("mtr", "tome")]


def test_a_sheet_has_a_row_for_each_block_and_a_column_for_up_to_eight_frames(observations) -> None:
    one, three = clip_sheet(observations[0], [3]), clip_sheet(observations[0], [1, 2, 3])
    width, height = 32 * 5, 24 * 5  # of a frame enlarged to at least 150 pixels
    assert 8 * width < one.width < 10 * width
    assert three.width == one.width
    assert 2 * height < three.height - one.height < 3 * height
    assert clip_sheet(observations[0]).size == clip_sheet(observations[0], observations[0].reducing).size
    with pytest.raises(UserError, match="no block 6: the model has blocks 0 to 5"):
        clip_sheet(observations[0], [6])
    compared = clip_policies(observations)
    assert height < compared.height - clip_policies(observations[:1]).height < 2 * height


def test_the_files_written(observations, tmp_path) -> None:
    stem = tmp_path / "new" / "v1.5_mtr"
    assert save_clip(observations[0], [1, 3], stem) == [
        stem.parent / f"v1.5_mtr.{kind}" for kind in ("png", "svg", "gif")
    ]
    with Image.open(stem.parent / "v1.5_mtr.png") as sheet:
        assert sheet.size == clip_sheet(observations[0], [1, 3]).size
    pages = clip_pages(observations[0], 3)  # the last requested block, all frames
    with Image.open(stem.parent / "v1.5_mtr.gif") as animation:
        assert animation.n_frames == len(pages) == 10
        for i, page in enumerate(pages):
            animation.seek(i)
            assert animation.size == page.size
            drawn = np.asarray(animation.convert("RGB")).astype(int)
            assert abs(drawn - np.asarray(page.image())).mean() < 5
