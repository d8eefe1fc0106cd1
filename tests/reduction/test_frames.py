"""``reduction=frames``: shorter videos, and ``mtr.scope``: tokens that compete in the clip or in their frame."""

import pytest
import torch

import mtr_lab
from mtr_lab import UserError
from mtr_lab.backbones import first_state, run
from mtr_lab.measure.flops import counted_flops

TINY = {"num_frames": 8, "img_size": 32, "patch_size": 8, "depth": 6, "embed_dim": 32, "num_classes": 5}


def tiny(**changes):
    torch.manual_seed(0)
    model = mtr_lab.create_model("videomamba_ti", **{**TINY, **changes}).eval()
    torch.nn.init.normal_(model.temporal_pos_embedding)
    return model


@pytest.fixture
def clips() -> torch.Tensor:
    return torch.randn(2, 3, 8, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_shorter_video_is_the_frames_that_remain_at_their_positions_in_time(clips: torch.Tensor) -> None:
    model = tiny()
    reduction = mtr_lab.patch(model, "frames", ratio=0.3)
    assert reduction.schedule.resolution == (5, 32, 32)
    kept = [0, 2, 4, 5, 7]
    short = tiny(num_frames=5)
    weights = model.state_dict()
    short.load_state_dict({**weights, "temporal_pos_embedding": weights["temporal_pos_embedding"][:, kept]})
    assert torch.equal(model(clips), short(clips[:, :, kept]))
    assert sum(counted_flops(model, clips)) == reduction.schedule.flops


@pytest.mark.parametrize(("ratio", "frames"), [(0.12, 7), (0.13, 6), (0.49, 4), (0.86, 1)])
def test_as_many_frames_remain_as_the_ratio_allows(ratio: float, frames: int) -> None:
    schedule = mtr_lab.patch(tiny(), "frames", ratio=ratio).schedule
    assert schedule.resolution == (frames, 32, 32)
    assert schedule.reduction >= ratio


@torch.no_grad()
def test_frames_and_tokens_together(clips: torch.Tensor) -> None:
    model = tiny()
    reduction = mtr_lab.patch(model, "mtr", ratio=0.4, frames=6)
    assert reduction.schedule.resolution == (6, 32, 32)
    assert reduction.schedule.tokens[0] == 6 * 16 + 1
    assert 0.4 <= reduction.schedule.reduction < 0.41
    assert sum(counted_flops(model, clips)) == reduction.schedule.flops + reduction.schedule.flops_overhead


def test_patches_of_several_frames_stay_whole() -> None:
    model = tiny(kernel_size=2)
    assert mtr_lab.patch(model, "frames", ratio=0.3).schedule.resolution == (4, 32, 32)
    with pytest.raises(UserError, match=r"mtr\.frames must be a number of frames up to 8, a multiple of 2"):
        mtr_lab.patch(model, "frames", ratio=0.3, frames=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 0}, "up to 8"),
        ({"frames": 9}, "up to 8"),
        ({"frames": 4, "resolution": 24}, r"mtr\.frames=4 and mtr\.resolution=24: set one of them to null"),
        ({"frames": "auto", "schedule": "constant"}, r"mtr\.frames=auto chooses the frames"),
        ({"ratio": 0.95}, "out of reach"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mtr_lab.patch(tiny(), "frames", **{"ratio": 0.2, **settings})


def test_images_have_neither_frames_nor_a_scope() -> None:
    model = mtr_lab.create_model("vim_nano", depth=4, embed_dim=16, img_size=32)
    with pytest.raises(UserError, match=r"mtr\.frames=auto: Vim takes images here"):
        mtr_lab.patch(model, "frames", ratio=0.2)
    with pytest.raises(UserError, match=r"mtr\.scope=frame: Vim takes images here"):
        mtr_lab.patch(model, "mtr", ratio=0.2, scope="frame")


def survivors(model, clips: torch.Tensor) -> torch.Tensor:
    """The number of tokens of each frame after the last block, (B, frames)."""
    *_, (_, state) = run(model, first_state(model, clips))
    frame = (state.applied().index - 1).div(16, rounding_mode="floor")
    return torch.stack([(frame == number).sum(1) for number in range(8)], 1)


@pytest.mark.parametrize("policy", ["mtr", "write", "random", "utr", "evit"])
@torch.no_grad()
def test_in_the_scope_of_a_frame_all_frames_lose_alike(policy: str, clips: torch.Tensor) -> None:
    model = tiny()
    mtr_lab.patch(model, policy, ratio=0.3)
    spread = survivors(model, clips)
    reduction = mtr_lab.patch(model, policy, ratio=0.3, scope="frame")
    even = survivors(model, clips)
    assert (even.sum(1) == spread.sum(1)).all()
    first = torch.tensor([reduction.schedule.remove[block] for block in (1, 3)])
    assert even.amax() - even.amin() <= 2 * len(first[first > 0])
    assert (spread.amax(1) - spread.amin(1) > even.amax(1) - even.amin(1)).any()


@torch.no_grad()
def test_the_scope_of_a_frame_chooses_the_least_important_of_each_frame(clips: torch.Tensor) -> None:
    """One step that removes two tokens of every frame: those of the lowest random score."""
    model = tiny()
    mtr_lab.patch(model, "random", schedule=[0, 16, 0, 0, 0, 0], ratio=None, scope="frame")
    *_, (_, state) = run(model, first_state(model, clips))
    kept = set(state.applied().index[0].tolist())
    score = (torch.frac(torch.sin((torch.arange(1, 129) + 1).double() * 12.9898) * 43758.5453)).abs().view(8, 16)
    expected = {1 + 16 * frame + int(place) for frame in range(8) for place in score[frame].argsort()[:2]}
    assert set(range(129)) - kept == expected


def test_lines_have_no_scope() -> None:
    with pytest.raises(UserError, match=r"mtr\.scope=frame with mtr\.grouping=lines"):
        mtr_lab.patch(tiny(), "storm", ratio=0.2, scope="frame")
