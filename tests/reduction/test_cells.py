"""Tokens of two sizes before the first block: against a loop over cells, their costs, and the models they fit."""

import pytest
import torch
from torch import Tensor

import mtr_lab
from mtr_lab import UserError, ops
from mtr_lab.measure.flops import counted_flops
from mtr_lab.reduction.cells import SHAPES

P = 4  # pixels of a patch's side
GEOMETRY = {"patch_size": P, "stride": P, "depth": 3, "embed_dim": 16, "num_classes": 3}
FIXED = {"schedule": [0, 0, 0]}


def make(name="vim_ti", **geometry):
    torch.manual_seed(0)
    model = mtr_lab.create_model(name, **GEOMETRY | {"img_size": (20, 24)} | geometry).eval()
    torch.nn.init.normal_(model.pos_embed)
    return model


def inputs(model, count=2) -> Tensor:
    scale = torch.rand(count, 1, *model.input_shape[1:], generator=torch.Generator().manual_seed(1)) ** 3
    return scale * torch.randn(count, *model.input_shape, generator=torch.Generator().manual_seed(2))


def detail_of(criterion: str, pixels: Tensor, rows: int, columns: int) -> float:
    """Of the pixels (channels, height, width) of one cell."""
    if criterion == "variance":
        return sum(channel.var(correction=0).item() for channel in pixels)
    shrunk = torch.nn.functional.avg_pool2d(pixels, (rows, columns))
    grown = shrunk.repeat_interleave(rows, 1).repeat_interleave(columns, 2)
    return (pixels - grown).square().sum().item()


def two_sizes(model, image: Tensor, criterion: str, shape: str, token: str, place: str, number: int):
    """The tokens of one image cell by cell: their vectors, original positions and sizes."""
    (rows, columns), (height, width) = SHAPES[shape], (image.shape[1] // P, image.shape[2] // P)
    down, across = height // rows, width // columns
    whole = model.embed(image[None]).hidden[0]
    class_position = model.class_position(height * width)
    positions = [n + (n >= class_position) for n in range(height * width)]
    covered = image[:, : down * rows * P, : across * columns * P]
    coarse = model.embed(torch.nn.functional.avg_pool2d(covered, (rows, columns))[None]).hidden[0]
    coarse = torch.cat([coarse[: (n := model.class_position(down * across))], coarse[n + 1 :]])
    scores = []
    for i in range(down):
        for j in range(across):
            y, x = i * rows * P, j * columns * P
            pixels = image[:, y : y + rows * P, x : x + columns * P]
            scores.append(detail_of(criterion, pixels, rows, columns))
    tokens = {p: (whole[p], 1) for p in [*positions, class_position]}
    for cell in sorted(range(len(scores)), key=scores.__getitem__)[:number]:
        i, j = cell // across * rows, cell % across * columns
        members = [positions[(i + a) * width + j + b] for a in range(rows) for b in range(columns)]
        vector = coarse[cell] if token == "coarse" else whole[members].mean(0)
        for member in members:
            del tokens[member]
        tokens[members[len(members) // 2 if place == "middle" else 0]] = vector, len(members)
    order = sorted(tokens)
    return torch.stack([tokens[p][0] for p in order]), order, [tokens[p][1] for p in order]


@pytest.mark.parametrize("name", ["vim_ti", "videomamba_ti"])
@pytest.mark.parametrize(
    ("criterion", "shape", "token", "place"),
    [
        ("variance", "2x2", "mean", "first"),
        ("variance", "2x2", "coarse", "middle"),
        ("detail", "1x2", "mean", "middle"),
        ("detail", "2x1", "coarse", "first"),
        ("variance", "4x4", "mean", "middle"),
    ],
)
@torch.no_grad()
def test_equals_a_loop_over_cells(name, criterion, shape, token, place) -> None:
    """On a grid of 5 x 6 patches, in which the last row or columns may belong to no cell."""
    model = make(name)
    images = inputs(model)
    rows, columns = SHAPES[shape]
    number = 1 if shape == "4x4" else 3
    share = number * (rows * columns - 1) / 30
    parts = {"input": criterion, "input_cell": shape, "input_token": token, "input_place": place, "input_share": share}
    reduction = mtr_lab.patch(model, "mtr", **FIXED, **parts)
    assert reduction.schedule.tokens[0] == 31 - number * (rows * columns - 1)
    state = mtr_lab.reduction.tracing.trace_blocks(model, images)[0].before
    for b, image in enumerate(images):
        vectors, index, sizes = two_sizes(model, image, criterion, shape, token, place, number)
        assert state.index[b].tolist() == index
        assert state.size[b].tolist() == sizes
        torch.testing.assert_close(state.hidden[b], vectors)
        assert state.source[b].bincount().tolist() == sizes
        assert state.index[b, state.special[b]].item() == model.class_position(30)


@torch.no_grad()
def test_random_cells_follow_the_seed_alone() -> None:
    model = make()
    indices = []
    for seed in (0, 0, 1):
        mtr_lab.patch(model, "mtr", **FIXED, input="random", input_share=0.3, seed=seed)
        indices.append(mtr_lab.trace(model, inputs(model))[0].index)
    assert torch.equal(indices[0][0], indices[0][1])
    assert torch.equal(indices[0], indices[1])
    assert not torch.equal(indices[0], indices[2])
    assert mtr_lab.reduction.make_policy(mtr_lab.reduction.policy_config("mtr", input="random")).draws


@pytest.mark.parametrize("token", ["mean", "coarse"])
@torch.no_grad()
def test_costs_count_towards_the_ratio(token) -> None:
    """The schedule solver removes the rest after mixers; the criterion is charged, though no counter sees it."""
    model = make()
    images = inputs(model)
    parts = {"input": "variance", "input_share": 0.2, "input_token": token}
    alone = mtr_lab.patch(model, "mtr", **FIXED, **parts).schedule
    pixels = 3 * 16 * 24  # four of the five rows of patches are in cells
    counted, overhead = counted_flops(model, images)
    elementwise = (4 + (token == "coarse")) * pixels
    assert counted + overhead == alone.flops + alone.flops_overhead - elementwise
    assert alone.reduction > 0.1
    both = mtr_lab.patch(model, "mtr", ratio=0.25, **parts).schedule
    assert both.reduction >= 0.25
    assert both.tokens[0] == alone.tokens[0]
    assert any(both.remove)
    assert not any(mtr_lab.patch(model, "mtr", ratio=alone.reduction - 1e-6, **parts).schedule.remove)
    expected = make()(images)
    reduction = mtr_lab.patch(model, "mtr", ratio=0.25, **parts)
    assert not torch.allclose(model(images), expected)
    reduction.use(reduction.solve(0.0))
    assert torch.equal(model(images), expected)


@torch.no_grad()
def test_a_share_of_nothing_and_of_everything() -> None:
    model = make()
    images, expected = inputs(model), make()(inputs(model))
    assert mtr_lab.patch(model, "mtr", **FIXED, input="variance", input_share=0.0).schedule.reduction == 0
    torch.testing.assert_close(model(images), expected)
    schedule = mtr_lab.patch(model, "mtr", **FIXED, input="variance", input_share=1.0).schedule
    assert schedule.tokens[0] == 31 - 3 * 6
    assert model(images).isfinite().all()


@torch.no_grad()
def test_convolutions_run_over_the_patches_of_a_cell() -> None:
    """Of a policy that prunes after mixers, too."""
    model = make()
    images = inputs(model)
    logits = [
        model(images)
        for convolution in ("survivors", "unmerged")
        if mtr_lab.patch(model, "hsa", **FIXED, input="variance", convolution=convolution)
    ]
    assert not torch.allclose(*logits, atol=1e-4)


@pytest.mark.parametrize(
    ("geometry", "parts", "message"),
    [
        ({}, {"input": "varience"}, "unknown mtr.input 'varience'. Did you mean 'variance'"),
        ({}, {"input": "detail", "input_cell": "3x3"}, "unknown mtr.input_cell '3x3'"),
        ({}, {"input": "detail", "input_share": 2.0}, "mtr.input_share=2.0: expected"),
        ({"img_size": 12}, {"input": "detail", "input_cell": "4x4"}, "4x4 does not fit the 3 x 3 patches of Vim"),
        (
            {"stride": 2, "img_size": 20},
            {"input": "detail", "input_token": "coarse"},
            "mtr.input_token=coarse .* overlap",
        ),
        ({"name": "videomamba_ti", "num_frames": 2}, {"input": "detail"}, "VideoMamba has frames or windows"),
    ],
)
def test_what_does_not_fit_is_refused(geometry, parts, message) -> None:
    with pytest.raises(UserError, match=message):
        mtr_lab.patch(make(**geometry), "mtr", **FIXED, **parts)


@torch.no_grad()
def test_overlapping_patches() -> None:
    model = make(stride=2, img_size=20)
    mtr_lab.patch(model, "mtr", **FIXED, input="detail", input_share=0.3)
    assert model(inputs(model)).isfinite().all()


@pytest.mark.slow
@torch.no_grad()
def test_exports_with_the_parts_that_later_blocks_read() -> None:
    model = make()
    parts = {"input": "variance", "input_token": "coarse", "convolution": "unmerged", "stretch": "exact"}
    mtr_lab.patch(model, "pumer", schedule=[3, 2, 0], **parts)
    program = torch.export.export(model, (inputs(model),)).run_decompositions(ops.decompositions())
    assert not [node.target for node in program.graph.nodes if "mtr_lab" in str(node.target)]
    images = inputs(model).flip(0)
    torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-5)
