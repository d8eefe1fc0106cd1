"""Pictures show the traced tokens and scores."""

import numpy as np
import pytest
import torch
from PIL import Image

import mtr_lab
from mtr_lab import UserError
from mtr_lab.pictures import BlockView, Observation, depth_frames, depth_sheet, observe, policy_strip, save_depth
from mtr_lab.pictures.panels import score_panel, token_panel, viridis
from mtr_lab.pictures.regions import DROPPED, PatchGrid

GEOMETRY = {"patch_size": 16, "stride": 8, "depth": 6, "embed_dim": 32, "num_classes": 5}
SIZE = (48, 72)  # 5 × 8 overlapping patches


@pytest.fixture(params=["vim_ti", "videomamba_ti"])
def model(request):
    torch.manual_seed(0)
    return mtr_lab.create_model(request.param, img_size=SIZE, **GEOMETRY).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def patch_of(model, original: int) -> tuple[int, int] | None:
    """Row and column of an original token, None for the class token."""
    place = model.class_position(40)
    return None if original == place else divmod(original - (original > place), 8)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["mtr", "hsa", "tome", "evit", "pumer"])
def test_the_maps_are_those_of_the_trace(model, images, policy: str) -> None:
    """Models with the class token in the middle (Vim) or in front (VideoMamba), on a 5 × 8 grid."""
    reduction = mtr_lab.patch(model, policy, ratio=0.3)
    observations = observe(model, reduction, images)
    states = mtr_lab.trace(model, images)
    for i, observation in enumerate(observations):
        assert {view.grid for view in observation.blocks} == {PatchGrid(5, 8, 16, 8)}
        assert (observation.policy, observation.blocks[0].entered) == (policy, 41)
        assert observation.reduction == reduction.schedule.reduction
        assert [view.tokens for view in observation.blocks] == [state.hidden.shape[1] for state in states]
        assert observation.reducing == [block for block, count in enumerate(reduction.schedule.remove) if count]
        before = set(range(41))
        for view, state in zip(observation.blocks, states, strict=True):
            after = set(state.index[i].tolist())
            for original in range(41):
                if (place := patch_of(model, original)) is not None:
                    assert view.source[place] == state.source[i, original]
                    assert view.removed[place] == (original in before - after)
                    if view.score is not None:
                        assert np.isnan(view.score[place]) == (original not in before)
            before = after


@torch.no_grad()
@pytest.mark.parametrize("policy", ["mtr", "write", "hsa", "random", "evit"])
def test_a_policy_removes_where_its_score_is_lowest(model, images, policy: str) -> None:
    for observation in observe(model, mtr_lab.patch(model, policy, ratio=0.3), images):
        assert observation.reducing
        for block in observation.reducing:
            view = observation.blocks[block]
            assert view.score[view.removed].max() <= np.nanmin(np.where(view.removed, np.nan, view.score))


def test_no_score_where_none_decides(model, images) -> None:
    (observation, _) = observe(model, mtr_lab.patch(model, "tome", ratio=0.3), images)
    assert observation.reducing
    assert all(view.score is None for view in observation.blocks)
    (observation, _) = observe(model, mtr_lab.patch(model, "mtr", ratio=0.3), images)
    assert [view.score is not None for view in observation.blocks] == [
        view.removed.any() for view in observation.blocks
    ]


def test_the_image_is_the_one_the_model_sees(model) -> None:
    pixels = torch.randint(256, (1, 3, *SIZE), generator=torch.Generator().manual_seed(2))
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    (observation,) = observe(model, mtr_lab.patch(model, ratio=0.2), (pixels / 255 - mean) / std)
    assert observation.image.tolist() == pixels[0].permute(1, 2, 0).tolist()


def test_a_reduction_that_is_not_in_force_is_refused(model, images) -> None:
    reduction = mtr_lab.patch(model, ratio=0.3)
    mtr_lab.unpatch(model)
    with pytest.raises(UserError, match="no longer in force"):
        observe(model, reduction, images)


GRID = PatchGrid(2, 2, 4, 4)
IMAGE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
SCORE = np.array([[0.0, 1.0], [np.nan, np.nan]])
VIEW = BlockView(GRID, 4, 4, 3, np.array([[0, 0], [DROPPED, 1]]), np.array([[False, True], [False, False]]), SCORE)
"""The upper half one token, the lower left dropped, the lower right on its own."""


def test_the_token_panel() -> None:
    panel = np.asarray(token_panel(IMAGE, VIEW, 1)).astype(int)
    assert (panel[5:, 5:] == IMAGE[5:, 5:]).all()
    mean = IMAGE[:4].reshape(-1, 3).mean(0).round()
    assert (abs(panel[:3] - mean) <= 1).all()  # the whole upper half, across the border of its patches
    assert (panel[3:5] > mean + 50).all()  # the outline below it
    pale = 0.15 * IMAGE[5:, :3].mean(axis=-1, keepdims=True) + 0.85 * np.array([228, 228, 231])
    assert (abs(panel[5:, :3] - pale) <= 0.5).all()


def test_the_score_panel() -> None:
    panel = np.asarray(score_panel(VIEW, 10))
    assert panel[5, 5].tolist() == viridis(np.array(0.0)).round().tolist() == [68, 1, 84]
    assert panel[5, 45].tolist() == [253, 231, 37]
    grey = panel[60, 20].tolist()
    assert len(set(map(tuple, panel[41:80, :80].reshape(-1, 3)))) == 1  # both missing ones, and no cross on them
    assert grey not in (panel[5, 5].tolist(), panel[5, 45].tolist())
    assert len(set(map(tuple, panel[:40, :40].reshape(-1, 3)))) == 1
    crossed = panel[:40, 40:80]
    assert len(set(map(tuple, crossed.reshape(-1, 3)))) == 3  # the colours of score, cross and rim


@pytest.fixture
def observations(model, images) -> list[Observation]:
    return [observe(model, mtr_lab.patch(model, policy, ratio=0.3), images)[0] for policy in ("mtr", "tome")]


def test_a_sheet_has_a_row_for_each_block_and_a_frame_each(observations) -> None:
    one = depth_sheet(observations[0], [1])
    three = depth_sheet(observations[0], [1, 2, 3])
    panel = 48 * 5  # the shorter side of an image enlarged to at least 300 pixels
    assert three.width == one.width
    assert three.height > one.height + 2 * panel
    assert depth_sheet(observations[0]).size == depth_sheet(observations[0], observations[0].reducing).size
    frames = depth_frames(observations[0])
    assert len(frames) == len(observations[0].reducing) == 2
    with pytest.raises(UserError, match="no block 6: the model has blocks 0 to 5"):
        depth_sheet(observations[0], [1, 6])


def test_a_strip_has_a_column_for_each_policy(observations) -> None:
    one, two = policy_strip(observations[:1]), policy_strip(observations)
    assert two.height == one.height
    assert two.width > one.width + 72 * 5


def test_the_files_written(observations, tmp_path) -> None:
    stem = tmp_path / "new" / "v1.5_mtr"  # a dot that is not a suffix
    assert save_depth(observations[0], None, stem) == [
        stem.parent / f"v1.5_mtr.{kind}" for kind in ("png", "svg", "gif")
    ]
    with Image.open(stem.parent / "v1.5_mtr.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.size == depth_sheet(observations[0]).size
    with Image.open(stem.parent / "v1.5_mtr.gif") as animation:
        assert animation.n_frames == 2
        assert animation.info["loop"] == 0
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        save_depth(observations[0], None, tmp_path / "file" / "x")
