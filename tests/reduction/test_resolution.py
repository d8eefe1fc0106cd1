"""A smaller picture, alone and before a policy removes tokens."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

import mtr_lab
from mtr_lab import UserError, ops
from mtr_lab.measure.flops import counted_flops
from mtr_lab.pictures import observe
from mtr_lab.reduction import Reduction, make_schedule, policy_config
from mtr_lab.tasks.features import FeatureMaps

SMALL = {"patch_size": 4, "stride": 4, "depth": 4, "embed_dim": 16, "num_classes": 5}
MODELS = {
    "square": ("vim_ti", {"img_size": 32}),
    "wide": ("vim_ti", {"img_size": (24, 48)}),
    "overlapping patches": ("vim_ti", {"img_size": 32, "patch_size": 8}),
    "video": ("videomamba_ti", {"img_size": 32, "num_frames": 2}),
}


def make(which: str = "square") -> Any:
    torch.manual_seed(0)
    name, geometry = MODELS[which]
    model = mtr_lab.create_model(name, **{**SMALL, **geometry}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(model: Any, count: int = 2) -> Tensor:
    return torch.randn(count, *model.input_shape, generator=torch.Generator().manual_seed(1))


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """As torchvision resizes tensors, frame by frame."""
    frames = images.movedim(1, -3).flatten(0, -4)
    smaller = tv.resize(frames, list(size), interpolation=tv.InterpolationMode.BICUBIC, antialias=True)
    return smaller.unflatten(0, images.movedim(1, -3).shape[:-3]).movedim(-3, 1)


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.6])
@pytest.mark.parametrize("which", MODELS)
@torch.no_grad()
def test_the_largest_picture_that_removes_enough(which: str, ratio: float) -> None:
    model = make(which)
    images = inputs(model)
    before = model(images)
    schedule = mtr_lab.patch(model, "resolution", ratio=ratio).schedule
    assert schedule.reduction >= ratio
    assert not any(schedule.remove)
    height, width = schedule.resolution
    longer = max(schedule.resolution) + 4
    scale = longer / max(images.shape[-2:])
    larger = tuple(round(side * scale / 4) * 4 for side in images.shape[-2:])
    reduction = Reduction(model, policy_config("resolution"))
    assert make_schedule(model, reduction.policy, schedule=[0] * 4, resolution=larger).reduction < ratio
    assert height / width == pytest.approx(images.shape[-2] / images.shape[-1], rel=0.2)

    reduction.use(schedule)
    assert counted_flops(model, images) == (schedule.flops, schedule.flops_overhead) == (schedule.flops, 0)
    reduced = model(images)
    mtr_lab.unpatch(model)
    torch.testing.assert_close(reduced, model(resized(images, schedule.resolution)))
    assert torch.equal(model(images), before)


@pytest.mark.parametrize(
    ("which", "ratio", "resolution", "size"),
    [("square", 0.7, 24, (24, 24)), ("square", 0.7, 0.75, (24, 24)), ("square", 0.7, 0.7, (24, 24)),
     ("wide", 0.7, 20, (20, 40)), ("wide", 0.8, 0.5, (12, 24)), ("square", 0.3, 40, (40, 40)),
     ("overlapping patches", 0.7, 20, (20, 20))],
)  # fmt: skip
@torch.no_grad()
def test_a_given_size_before_any_policy(which: str, ratio: float, resolution: float, size: tuple[int, int]) -> None:
    model = make(which)
    images = inputs(model)
    everywhere = {"first_block": 0, "interval": 1}
    schedule = mtr_lab.patch(model, "mtr", ratio=ratio, resolution=resolution, **everywhere).schedule
    assert schedule.resolution == size
    assert ratio <= schedule.reduction < ratio + 0.05  # of the full picture's FLOPs
    assert any(schedule.remove)
    assert schedule.tokens[0] == model.layouts(size)[0].tokens
    assert counted_flops(model, images) == (schedule.flops, schedule.flops_overhead)
    reduced = model(images)
    mtr_lab.patch(model, "mtr", schedule=schedule.remove, img_size=size)
    torch.testing.assert_close(reduced, model(resized(images, size)))


def test_a_ratio_that_the_picture_reaches_removes_no_tokens() -> None:
    schedule = mtr_lab.patch(make(), "mtr", ratio=0.3, resolution=24).schedule
    assert schedule.reduction > 0.35
    assert not any(schedule.remove)
    full = mtr_lab.patch(make(), "mtr", ratio=0.3, resolution=32).schedule
    assert full == mtr_lab.patch(make(), "mtr", ratio=0.3).schedule


@pytest.mark.parametrize("schedule", [{"schedule": "auto"}, {"first_block": 0, "interval": 1}])
@torch.no_grad()
def test_auto_divides_the_ratio_where_the_output_changes_least(schedule: dict[str, Any]) -> None:
    model = make()
    images = inputs(model, 6)
    reference = model(images).double().log_softmax(-1)
    divergence = {}
    for side in (32, 28, 24, 20):  # 20 px reach the ratio without tokens
        solved = mtr_lab.patch(model, "write", ratio=0.5, resolution=side, images=images, **schedule).schedule
        output = model(images).double().log_softmax(-1)
        divergence[solved] = F.kl_div(output, reference, reduction="batchmean", log_target=True).item()
    chosen = mtr_lab.patch(model, "write", ratio=0.5, resolution="auto", images=images, **schedule).schedule
    assert chosen == min(divergence, key=divergence.__getitem__)


@torch.no_grad()
def test_maps_of_dense_tasks_keep_the_grid_of_the_image() -> None:
    model = make("wide")
    images = inputs(model)
    mtr_lab.patch(model, "resolution", ratio=0.4)
    assert [tuple(maps.shape) for maps in FeatureMaps(model, 2)(images)] == [(2, 16, 6, 12)] * 2
    assert model.forward_intermediates(images, 1, intermediates_only=True)[0].shape == (2, 16, 6, 12)


@torch.no_grad()
def test_it_is_drawn_and_exported() -> None:
    model = make()
    images = inputs(model)
    reduction = mtr_lab.patch(model, "resolution", ratio=0.4)
    (drawn, _) = observe(model, reduction, images)
    assert drawn.image.shape == (*reduction.schedule.resolution, 3)
    assert drawn.reducing == [3]
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (images,), dynamic_shapes=(batch,)).run_decompositions(ops.decompositions())
    three = inputs(model, 3)
    torch.testing.assert_close(program.module()(three), model(three), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("policy", "settings", "message"),
    [
        ("mtr", {"ratio": 0.4, "resolution": 25}, r"mtr\.resolution=25: image height 25 does not fit .* 24 or 28"),
        ("mtr", {"ratio": 0.4, "resolution": "small"}, r"mtr\.resolution must be the shorter side in pixels .*'small'"),
        ("mtr", {"ratio": 0.4, "resolution": True}, r"mtr\.resolution must be"),
        ("mtr", {"ratio": 0.4, "resolution": [24, 28]}, r"Several, as a list, go with mtr\.ratio=null"),
        ("mtr", {"ratio": 0.4, "resolution": "auto"}, r"mtr\.resolution=auto measures on images.*images=images"),
        ("mtr", {"ratio": 0.4, "schedule": "none"}, r"at most 0\.0 .*mtr\.schedule=none.*a smaller mtr\.resolution"),
        ("resolution", {"ratio": 0.4, "resolution": 28}, r"at most 0\.2\d+ of the FLOPs can be removed"),
        ("resolution", {"ratio": 0.999}, r"mtr\.ratio=0\.999 is out of reach"),
    ],
)
def test_mistakes_are_named(policy: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mtr_lab.patch(make(), policy, **settings)


def test_sizes_of_the_whole_model_are_points_of_one_evaluation() -> None:
    model = make()
    batch = (inputs(model, 4), torch.tensor([0, 1, 2, 3]))
    sizes = [24, 32, 36]
    points = mtr_lab.evaluate_model(model, [batch], "resolution", resolution=sizes)
    assert [point.get("resolution") for point in points] == [None, [24, 24], [36, 36]]  # 32: the unreduced model
    assert [point["ratio"] for point in points] == [0, None, None]
    assert points[1]["reduction"] > 0 > points[2]["reduction"]
    assert points[2]["kl"] > 0
