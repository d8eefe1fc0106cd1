"""Properties of all backbones: the library's models, and toys that do not inherit from it."""

import copy
import io
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from fitting_counts import counts
from smallest import Smallest
from torch import Tensor, nn
from toys import TOYS, Toy

import mtr_lab
from mtr_lab import UserError, ops
from mtr_lab.backbones import MODELS, blocks_of, last_state, missing_members
from mtr_lab.measure.flops import counted_flops, model_flops
from mtr_lab.pictures import observe
from mtr_lab.reduction import make_policy, policy_config, policy_names, trace
from mtr_lab.reduction.partial_blocks import SCANS, PathsPart
from mtr_lab.tasks.features import FeatureMaps
from mtr_lab.tasks.segmentation.model import Segmenter
from mtr_lab.tokens import restore

SMALL = {"img_size": (24, 32), "patch_size": 4, "stride": 4, "depth": 4, "embed_dim": 16, "num_classes": 5}
WINDOWED = {"dim": 8, "in_dim": 8, "depths": (1, 1, 4, 3), "num_heads": (1, 1, 2, 2), "num_classes": 5}
OTHERS: dict[str, dict[str, Any]] = {
    "vmamba": {"img_size": (96, 104), "dims": 8, "depths": (2, 1, 3, 2), "num_classes": 5, "ssm_d_state": 2},
    "mambavision": {**WINDOWED, "img_size": (128, 192), "window_size": (1, 1, 4, 4)},
    "plainmamba": {
        "img_size": (48, 80), "patch_size": 8, "depth": 6, "embed_dim": 128, "d_state": 2, "num_classes": 5,
        "num_convs_patch_embed": 1,
    },
}  # fmt: skip
"""Small geometries of families with other arguments, or whose stem is large beside their blocks."""


def small(name: str) -> dict[str, Any]:
    """A small geometry of one of the library's models."""
    return next((settings for family, settings in OTHERS.items() if name.startswith(family)), SMALL)


PADDED = {"img_size": (72, 104), "window_size": (1, 1, 3, 3)}
VIDEO = {"num_frames": 2}
BACKBONES: dict[str, Callable[..., Any]] = {
    **{name: partial(mtr_lab.create_model, name, **small(name)) for name in MODELS},
    "padded_windows": partial(mtr_lab.create_model, "mambavision_b", **WINDOWED, **PADDED),
    "video": partial(mtr_lab.create_model, "videomamba_ti", **SMALL, **VIDEO),
    "registers": partial(mtr_lab.create_model, "mambareg_s", **SMALL, num_cls_tokens=3),
    **{name: partial(Toy, **settings) for name, settings in TOYS.items()},
    "smallest": Smallest,
}
SAMPLED = ("grid_stages", "vmamba_t", "vmamba_s")
"""Their mixers scan a grid along four paths, in several stages."""
PYRAMIDS = ("vmamba_t", "vmamba_s", "mambavision_t", "padded_windows")
SOME = ["vim_ti", "videomamba_ti", "video", "registers", "plainmamba_l1", *PYRAMIDS, *TOYS, "smallest"]


def make(name: str, **geometry: Any) -> Any:
    torch.manual_seed(0)
    model = BACKBONES[name](**geometry)
    # With small random weights the residual stream would hardly change.
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model.eval()


def inputs(model: Any, count: int = 2) -> Tensor:
    return torch.randn(count, *model.input_shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BACKBONES)
def test_it_is_a_backbone_and_declares_its_costs(name: str) -> None:
    model = make(name)
    assert missing_members(model) == []
    layouts = model.layouts()
    assert len(layouts) == len(model.stages)
    state = model.embed(inputs(model))
    assert state.layout == layouts[0]
    assert state.hidden.shape == (2 * layouts[0].sequences, layouts[0].tokens, model.stages[0].width)
    assert [tuple(row) for row in state.special.tolist()] == [layouts[0].special] * len(state.special)
    assert counted_flops(model, inputs(model)) == (model_flops(model), 0)


def policies_of_families() -> Iterator[Any]:
    """All pairs. The fast lane has every policy in one family, every family with two policies, and two odd pairs."""
    odd = {("grid_stages", "quartermap"), ("smallest", "evit")}
    for name, policy in itertools.product(SOME, policy_names()):
        fast = name == "vim_ti" or policy in ("mtr", "storm") or (name, policy) in odd
        yield pytest.param(name, policy, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("name", "policy"), policies_of_families())
@torch.no_grad()
def test_every_policy_and_back_bit_for_bit(name: str, policy: str) -> None:
    model = make(name)
    images = inputs(model)
    before, tokens, weights = model(images), last_state(model, images).stream, model.state_dict().keys()
    special = all(layout.special for layout in model.layouts())
    if policy == "quartermap" and name not in SAMPLED:
        with pytest.raises(UserError, match=r"mtr\.paths=quarter scans one of each 2 x 2 tokens .* has none there"):
            mtr_lab.patch(model, policy, ratio=0.01)
    elif policy == "frames" and name != "video":
        with pytest.raises(UserError, match=r"which have no frames to leave out"):
            mtr_lab.patch(model, policy, ratio=0.01)
    elif policy == "mlp" and not any(block.mlp for block in blocks_of(model)):
        with pytest.raises(UserError, match=r"mtr\.merge_at=mlp: the blocks of \w+ have no MLP"):
            mtr_lab.patch(model, policy, ratio=0.01)
    elif make_policy(policy_config(policy)).scoring.class_token and not special:
        with pytest.raises(UserError, match="class token"):
            mtr_lab.patch(model, policy, schedule=counts(model, 3))
    else:
        wanted = {"ratio": 0.01} if policy in ("quartermap", "frames") else {"schedule": counts(model, 3, policy)}
        schedule = mtr_lab.patch(model, policy, **wanted).schedule
        reduced = model(images)
        assert reduced.shape == before.shape
        assert reduced.isfinite().all()
        assert not torch.equal(last_state(model, images).stream, tokens)  # which the class may not show
        assert counted_flops(model, images) == (schedule.flops, schedule.flops_overhead)
        assert model.state_dict().keys() == weights
    mtr_lab.unpatch(model)
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("ratio", [0.1, 0.25])
@pytest.mark.parametrize("name", BACKBONES)
def test_a_ratio_is_met_to_a_token_and_counted(name: str, ratio: float) -> None:
    model = make(name)
    schedule = mtr_lab.patch(model, "mtr", ratio=ratio, first_block=0, interval=1).schedule
    assert schedule.reduction >= ratio
    one_less = list(schedule.remove)
    one_less[max(block for block, count in enumerate(one_less) if count)] -= 1
    assert mtr_lab.patch(model, "mtr", schedule=one_less).schedule.reduction < ratio
    mtr_lab.patch(model, "mtr", schedule=schedule.remove)
    assert counted_flops(model, inputs(model)) == (schedule.flops, schedule.flops_overhead)
    lasts = [stage.blocks[-1] for stage in model.stages]
    for block, count in zip(blocks_of(model), schedule.remove, strict=True):
        assert count == 0 or block.mlp is not None or not any(block is last for last in lasts)


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_every_original_token_is_traced_and_restored(name: str) -> None:
    model = make(name)
    schedule = mtr_lab.patch(model, "mtr", schedule=counts(model, 4)).schedule
    states = trace(model, inputs(model))
    layouts = [layout for layout, stage in zip(model.layouts(), model.stages, strict=True) for _ in stage.blocks]
    for state, layout, entering, removed in zip(states, layouts, schedule.tokens, schedule.remove, strict=True):
        assert state.hidden.shape[1] == entering - removed
        assert state.layout == layout
        for row, size, special in zip(state.source, state.size, state.special, strict=True):
            assert torch.equal(row.bincount(minlength=entering - removed).float(), size)  # nothing was dropped
            assert torch.equal(row[list(layout.special)], special)  # special tokens stay what they are
            assert (size[special] == 1).all()
        if layout.frames == 1:
            maps = layout.join(restore(state, layout.grid))
            assert maps.shape == (2, state.hidden.shape[2], *layout.image_grid)
            positions = layout.patch_positions(maps.device).expand(len(state.source), -1)
            rows = state.source.gather(1, positions)[..., None].expand(-1, -1, state.hidden.shape[2])
            windows = state.stream.gather(1, rows).transpose(1, 2).unflatten(2, layout.grid)
            assert torch.equal(maps, layout.join(windows))


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_the_unreduced_model_and_one_with_nothing_to_remove_are_the_same(name: str) -> None:
    model = make(name)
    images = inputs(model)
    before = model(images)
    mtr_lab.patch(model, "hsa", schedule=counts(model, 0))
    assert torch.equal(model(images), before)
    assert model.reduction.key is None
    trace(model, images)


@pytest.mark.parametrize("name", [name for name in SOME if name != "video"])
@torch.no_grad()
def test_pictures_and_maps(name: str) -> None:
    model = make(name)
    reduction = mtr_lab.patch(model, "mtr", schedule=counts(model, 3))
    views = observe(model, reduction, inputs(model))[0].blocks
    places = [place for place in zip(model.stages, model.layouts(), strict=True) for _ in place[0].blocks]
    for view, (stage, layout) in zip(views, places, strict=True):
        assert (view.grid.rows, view.grid.columns, view.grid.stride) == (*layout.image_grid, stage.stride)
        assert view.source.shape == layout.image_grid
        shown = len(set(view.source.flatten())) + len(layout.special) * layout.sequences
        removed = view.removed.sum()
        if any(layout.padding):  # which is not shown
            assert shown <= view.tokens
            assert removed <= view.entered - view.tokens
        else:
            assert (shown, removed) == (view.tokens, view.entered - view.tokens)
    for restoration in ("nearest", "skip", "interpolate"):
        maps = FeatureMaps(model, 2, restoration)(inputs(model))
        last, layout = model.stages[-1], model.layouts()[-1]
        assert maps[-1].shape == (2, last.width, *layout.image_grid)
        assert maps[-1].isfinite().all()


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_the_operating_point_in_force_is_one_object(name: str) -> None:
    model = make(name)
    images = inputs(model)
    assert model.reduction is None
    reduction = mtr_lab.patch(model, "mtr", schedule=counts(model, 2))
    first, key = reduction.schedule, model.reduction.key
    two = model(images)
    more = mtr_lab.reduction.make_schedule(model, reduction.policy, schedule=counts(model, 5))
    reduction.use(more)
    assert model.reduction.key != key
    assert {model.reduction.key: 0, key: 1}[key] == 1
    five = model(images)
    assert not torch.equal(two, five)
    reduction.use(first)
    assert model.reduction.key == key
    assert torch.equal(model(images), two)


@pytest.mark.parametrize("name", SOME)
def test_a_schedule_is_measured(name: str) -> None:
    """A larger ratio continues where a smaller one stopped, in any stage."""
    model = make(name)
    reduction = mtr_lab.patch(model, "mtr", ratio=0.1, schedule="auto", images=inputs(model))
    anew = mtr_lab.patch(make(name), "mtr", ratio=0.2, schedule="auto", images=inputs(model))
    assert reduction.solve(0.2).remove == anew.schedule.remove
    assert anew.schedule.reduction >= 0.2


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_copies_and_pickles_keep_the_point_and_are_independent(name: str) -> None:
    model = make(name)
    images = inputs(model)
    reduction = mtr_lab.patch(model, "mtr", schedule=counts(model, 3))
    expected = model(images)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    others = [copy.deepcopy(model), torch.load(stored, weights_only=False)]
    reduction.use(reduction.solve(0.0))
    for other in others:
        assert torch.equal(other(images), expected)
        mtr_lab.unpatch(other)
        assert torch.equal(other(images), model(images))


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_weights_are_saved_and_loaded(name: str) -> None:
    model, other = make(name), BACKBONES[name]().eval()
    mtr_lab.patch(model, "mtr", schedule=counts(model, 3))
    mtr_lab.patch(other, "mtr", schedule=counts(model, 3))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(inputs(model)), other(inputs(model)))


@pytest.mark.parametrize("name", SOME)
def test_gradients_reach_every_parameter_through_a_reduction(name: str) -> None:
    model = make(name)
    mtr_lab.patch(model, "mtr", schedule=counts(model, 3))
    model(inputs(model)).square().sum().backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert not idle


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("backend", ["cpu", "portable"])
@torch.no_grad()
def test_every_backend_computes_the_same(name: str, backend: str) -> None:
    model = make(name)
    mtr_lab.patch(model, "hsa", schedule=counts(model, 3))
    with ops.use_backend("reference"):
        expected = model(inputs(model))
    with ops.use_backend(backend):
        torch.testing.assert_close(model(inputs(model)), expected, rtol=1e-4, atol=1e-5)


ONE_STAGE = ("vim_ti", "video", "registers", "plainmamba_l1", "smallest")
EXPORTED: dict[str, dict[str, Any]] = {
    **{name: {"depth": 3} for name in ONE_STAGE},
    "padded_windows": {"depths": (1, 1, 4, 2)},  # half of them are attention
    **{name: {"depths": (2, 2) if "depths" in settings else (3,)} for name, settings in TOYS.items()},
    "no_class_token": {"depths": (3,), "attention": (2,)},
}
"""Few blocks: an export takes seconds for each. The second removes tokens, and the first of a later stage."""


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        *(("snakes", "mtr"), ("windows", "mtr")),  # Vim: tests/ops/test_export.py
        *(
            pytest.param(name, policy, marks=pytest.mark.slow)
            for name, policy in [
                *(("smallest", None), ("windows", None)),
                *((name, "mtr") for name in EXPORTED if name not in ("snakes", "windows")),
            ]
        ),
    ],
)
@torch.no_grad()
def test_it_exports_with_a_dynamic_batch(name: str, policy: str | None) -> None:
    model = make(name, **EXPORTED[name])
    if policy:
        mtr_lab.patch(model, policy, schedule=counts(model, 3))
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (inputs(model),), dynamic_shapes=(batch,))
    program = program.run_decompositions(ops.decompositions())
    assert not [node.target for node in program.graph.nodes if "mtr_lab" in str(node.target)]
    images = inputs(model, 3)
    torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-5)


PARTS = {"paths": {"paths": "toy"}, "input": {"input": "random"}}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", [name for name in SOME if name != "video"])
@torch.no_grad()
def test_a_part_at_another_place(name: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It acts, its FLOPs are charged exactly, and unpatching removes it."""
    monkeypatch.setitem(SCANS, "toy", PathsPart(lambda paths: paths[:1]))
    model = make(name)
    images = inputs(model)
    before = model(images)
    if part == "input" and model.layouts()[0].sequences > 1:
        with pytest.raises(UserError, match="has frames or windows"):
            mtr_lab.patch(model, "mtr", ratio=0.1, **PARTS[part])
        return
    reduction = mtr_lab.patch(model, "mtr", schedule=counts(model, 2), **PARTS[part])
    schedule = reduction.schedule
    acts = part == "input" or any(len(block.mixer.paths) > 1 for block in blocks_of(model))
    plain = mtr_lab.reduction.make_schedule(model, reduction.policy.only_after_mixers(), schedule=schedule.remove)
    assert (schedule.flops + schedule.flops_overhead < plain.flops + plain.flops_overhead) == acts
    assert model(images).shape == before.shape
    assert counted_flops(model, images) == (schedule.flops, schedule.flops_overhead)
    reduction.use(reduction.solve(0.0))
    assert torch.equal(model(images), before)


@torch.no_grad()
def test_a_convolution_over_the_grid_is_unmerged_anyway() -> None:
    model = make("four_paths")
    logits = [
        model(inputs(model))
        for convolution in ("survivors", "unmerged")
        if mtr_lab.patch(model, "mtr", schedule=counts(model, 3), convolution=convolution)
    ]
    assert torch.equal(*logits)


def test_policies_that_do_not_fit_a_model_are_refused() -> None:
    four, vim = make("four_paths"), make("vim_ti")
    with pytest.raises(UserError, match=r"mtr\.align counts .* mtr\.order=importance changes the neighbours"):
        mtr_lab.patch(vim, "hsa", ratio=0.1, order="importance")
    with pytest.raises(UserError, match=r"mtr\.directions=snake: Toy scans forward, backward, columns"):
        mtr_lab.patch(four, "mtr", ratio=0.1, directions="snake")
    reduction = mtr_lab.patch(vim, "mtr", ratio=0.1)
    with pytest.raises(UserError, match="a schedule of 6 blocks does not fit a model of 4"):
        reduction.use(mtr_lab.patch(make("two_stages"), "mtr", ratio=0.1).schedule)


@torch.no_grad()
def test_one_of_several_directions_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name. A part that skips it is refused, unless the score reads no evidence."""
    model = make("four_paths")
    chosen = [
        mtr_lab.trace(model, inputs(model))[1].index
        for direction in ("both", "columns", "columns_backward")
        if mtr_lab.patch(model, "mtr", schedule=counts(model, 6), directions=direction, score="output")
    ]
    assert not torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[1], chosen[2])
    monkeypatch.setitem(SCANS, "toy", PathsPart(lambda paths: paths[:1]))
    with pytest.raises(UserError, match=r"mtr\.directions=columns: Toy scans forward\."):
        mtr_lab.patch(model, "mtr", ratio=0.1, directions="columns", paths="toy")
    mtr_lab.patch(model, "random", schedule=counts(model, 3), directions="columns")
    assert model(inputs(model)).isfinite().all()


@pytest.mark.parametrize("name", [*SOME])
@torch.no_grad()
def test_half_precision(name: str) -> None:
    model = make(name)
    mtr_lab.patch(model, "mtr", schedule=counts(model, 3))
    expected = model(inputs(model))
    actual = model.bfloat16()(inputs(model).bfloat16())
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).norm() / expected.norm() < 0.3  # another token may go where two are nearly alike


@torch.no_grad()
def test_a_segmentation_head_on_stages_of_different_widths() -> None:
    model = Segmenter(make("two_stages"), 3, width=16).eval()
    mtr_lab.patch(model.backbone, "mtr", schedule=counts(model.backbone, 3))
    assert model(inputs(model.backbone)).shape == (2, 3, 32, 32)


def test_missing_members_are_named() -> None:
    model = make("windows")
    del model.final_norm
    with pytest.raises(UserError, match=r"got Toy, which lacks final_norm of mtr_lab\.backbones\.Backbone\."):
        mtr_lab.patch(model, "mtr", ratio=0.1)
    with pytest.raises(UserError, match=r"made by mtr_lab\.create_model, got Linear\.$"):
        mtr_lab.patch(nn.Linear(2, 2), "mtr", ratio=0.1)
