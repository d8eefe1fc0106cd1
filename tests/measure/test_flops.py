"""FLOPs against the literature's tables and against a counted forward pass."""

import pytest
import torch

import mtr_lab
from mtr_lab import create_model
from mtr_lab.measure.flops import LITERATURE, TRUE, counted_flops, model_costs, model_flops


def meta_model(name: str, **geometry: int):
    with torch.device("meta"):
        return create_model(name, **geometry)


@pytest.mark.parametrize(
    ("name", "literature", "true"),
    [
        ("vim_ti", 1_449_113_088, 3_115_576_320),
        ("vim_s", 5_076_888_576, 10_762_770_432),
        ("vim_b", 18_868_426_752, 39_652_012_032),
    ],
)
def test_published_figures_to_the_last_digit(name: str, literature: int, true: int) -> None:
    model = meta_model(name)
    assert model_flops(model, convention=LITERATURE) == literature
    assert model_flops(model, convention=TRUE) == true


@pytest.mark.parametrize(
    ("name", "removed", "expected"),
    [("vim_ti", 5, 1_250_923_008), ("vim_s", 5, 4_376_380_416), ("vim_s", 11, 3_535_770_624)],
)
def test_reduced_figures_of_rmeeto(name: str, removed: int, expected: int) -> None:
    """Tokens are removed before every even block from the second on."""
    model = meta_model(name)
    assert model_flops(model, [removed * (block % 2) for block in range(24)], LITERATURE) == expected


@pytest.mark.parametrize(
    ("name", "frames"),
    [("vim_ti", {}), ("videomamba_ti", {}), ("videomamba_ti", {"num_frames": 6, "kernel_size": 2})],
    ids=["vim", "videomamba", "video"],
)
@pytest.mark.parametrize(("ratio", "batch"), [(0.0, 1), (0.2, 2), (0.4, 3)])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_counted_equals_analytic(name: str, frames: dict, ratio: float, batch: int, backend: str) -> None:
    geometry = {"img_size": (40, 48), "patch_size": 16, "stride": 8, "depth": 5, "embed_dim": 40, "num_classes": 7}
    model = create_model(name, **geometry, **frames)
    schedule = mtr_lab.patch(model, ratio=ratio).schedule
    with mtr_lab.ops.use_backend(backend):
        counted = counted_flops(model, torch.randn(batch, *model.input_shape))
    assert counted == (schedule.flops, schedule.flops_overhead)
    assert schedule.flops == model_flops(model, schedule.remove)
    assert schedule.flops_literature == model_flops(model, schedule.remove, LITERATURE)
    assert (schedule.flops_overhead > 0) == (ratio > 0)


def test_a_reduction_after_the_last_block_is_counted() -> None:
    model = create_model("vim_ti", img_size=24, patch_size=8, stride=8, depth=3, embed_dim=16, num_classes=4)
    schedule = mtr_lab.patch(model, schedule=[3, 0, 2]).schedule
    assert counted_flops(model, torch.randn(1, 3, 24, 24)) == (schedule.flops, schedule.flops_overhead)


def test_tokens_of_another_size() -> None:
    def entering(model, *size: int) -> int:
        (layout,) = model.layouts(size or None)
        _, tokens = model_costs(model, img_size=size or None)
        assert set(tokens) == {layout.tokens}
        return layout.tokens

    model = meta_model("vim_s")
    assert entering(model) == 197
    assert entering(model, 448, 224) == 28 * 14 + 1
    assert entering(meta_model("vim_s_plus")) == 27 * 27 + 1
    video = meta_model("videomamba_s", num_frames=8)
    assert entering(video) == 8 * 14 * 14 + 1
    assert entering(video, 448, 224) == 8 * 28 * 14 + 1
    assert entering(meta_model("videomamba_s", num_frames=8, kernel_size=2)) == 4 * 14 * 14 + 1


def test_a_block_costs_in_proportion_to_its_tokens() -> None:
    mixer = meta_model("vim_s").blocks[0].mixer
    assert mixer.costs(100, None, mixer.paths).flops == 100 * mixer.costs(1, None, mixer.paths).flops
