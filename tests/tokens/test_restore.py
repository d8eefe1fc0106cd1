"""Restoring the grid: hand-made maps, every policy, gradients."""

import sys

import pytest
import torch
from fitting_counts import FOR_ANY_FAMILY, fitting
from torch import Tensor

import mtr_lab
from mtr_lab.reduction import apply, restore
from mtr_lab.reduction.plan import make_plan
from mtr_lab.tasks.features import FeatureMaps
from mtr_lab.tokens import TokenState, grid


def tokens(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[None, :, None]


def start(values: Tensor, special: int) -> TokenState:
    return TokenState.start(values, [special]).traced()


def reduce(state: TokenState, into: dict[int, int], order: list[float] | None = None) -> TokenState:
    """Merge token i into token into[i], or drop it for -1; survivors in ascending ``order``."""
    length = state.index.shape[1]
    key = torch.tensor([order or list(range(length))], dtype=torch.float64)
    source, target = torch.tensor([list(into)]), torch.tensor([list(into.values())])
    return apply(make_plan(source, target, key, torch.ones(1, length)), state)


def flat(restored: Tensor) -> list[float]:
    return restored.flatten().tolist()


# A 2 x 3 grid, the class token (value 99) between its third and fourth patch.
GRID = (2, 3)
VALUES = (0.0, 10.0, 20.0, 99.0, 30.0, 40.0, 50.0)


@pytest.mark.parametrize("how", ["nearest", "interpolate"])
def test_an_unreduced_sequence_is_restored_exactly(how: str) -> None:
    restored = restore(start(tokens(*VALUES), 3), GRID, how)
    assert restored.tolist() == [[[[0, 10, 20], [30, 40, 50]]]]


def test_a_position_takes_the_token_that_absorbed_it_through_several_reductions() -> None:
    state = reduce(start(tokens(*VALUES), 3), {0: 1, 6: 5})  # (0 + 10) / 2 = 5, (40 + 50) / 2 = 45
    assert flat(restore(state, GRID)) == [5, 5, 20, 30, 45, 45]
    # Now 5, 20, class, 30, 45. The pair that is 5 goes into 45; the others leave in reverse order.
    state = reduce(state, {0: 4}, order=[0, 4, 3, 2, 1])
    assert state.stream.flatten().tolist() == [25, 30, 99, 20]
    assert flat(restore(state, GRID)) == [25, 25, 20, 30, 25, 25]


@pytest.mark.parametrize(("into", "searches"), [(1, 0), (-1, 1)])
def test_neighbours_are_searched_only_for_dropped_tokens(into: int, searches: int, monkeypatch) -> None:
    module, calls = sys.modules["mtr_lab.tokens.grid"], []
    search = module._neighbours
    monkeypatch.setattr(module, "_neighbours", lambda *args: calls.append(args) or search(*args))
    restore(reduce(start(tokens(*VALUES), 3), {0: into}), GRID)
    assert len(calls) == searches


def test_a_dropped_position_takes_the_nearest_survivor_and_never_the_class_token() -> None:
    """The first in the sequence if several are equally near."""
    state = reduce(start(tokens(*VALUES), 3), {2: -1, 4: -1})  # next to the class token in the sequence
    assert flat(restore(state, GRID)) == [0, 10, 10, 0, 40, 50]
    state = reduce(start(tokens(*VALUES), 3), {2: -1, 4: -1}, order=[6, 5, 4, 3, 2, 1, 0])
    assert flat(restore(state, GRID)) == [0, 10, 50, 40, 40, 50]
    state = reduce(start(tokens(*VALUES), 3), {1: -1, 2: -1, 4: -1, 5: -1, 6: -1})
    assert flat(restore(state, GRID)) == [0] * 6


def test_interpolation_weighs_by_distance_and_leaves_survivors_alone() -> None:
    line = start(tokens(99, 0, 7, 7, 30), 0)  # a grid of one row, the class token first
    actual = flat(restore(reduce(line, {2: 1, 3: -1}), (1, 4), "interpolate"))
    merged = 3.5  # the mean of 0 and 7
    near, far = (merged + 30 / 4) / 1.25, (merged / 4 + 30) / 1.25
    assert actual == pytest.approx([merged, near, far, 30])


@pytest.mark.parametrize("count", [1, 4])
def test_neighbours_are_those_of_a_stable_sort(count: int) -> None:
    """Also of more tokens than a partial sort leaves in order."""
    torch.manual_seed(0)
    rows, columns, batch = 9, 14, 2
    patches = torch.arange(rows * columns)
    index = torch.stack([torch.randperm(len(patches))[:70] for _ in range(batch)])
    state = TokenState.start(torch.zeros(batch, len(patches), 1), []).traced()._replace(index=index)
    distance, neighbour = grid._neighbours(state, patches.expand(batch, -1), (rows, columns), count)
    places = torch.stack([patches // columns, patches % columns], dim=1)
    squared = (places[:, None] - places[index][:, None]).square().sum(3)
    expected = squared.sort(dim=2, stable=True)
    assert torch.equal(neighbour, expected.indices[..., :count])
    torch.testing.assert_close(distance, expected.values[..., :count].float().sqrt())


def test_skip_restores_merged_features_and_adds_the_gain_of_their_token() -> None:
    after = reduce(start(tokens(*VALUES), 3).tracking_offset(), {0: 1, 6: -1})
    assert flat(restore(after, GRID, "skip")) == [0, 10, 20, 30, 40, 50]
    gained = after.with_streams(after.hidden + 3, None)
    assert flat(restore(gained, GRID, "skip")) == [3, 13, 23, 33, 43, 50]  # the dropped one gains nothing
    again = reduce(gained, {0: 1})  # the pair 0, 10, now 8, goes into 23
    assert flat(restore(again, GRID, "skip")) == pytest.approx([3, 13, 23, 33, 43, 50])


@pytest.mark.parametrize("how", ["nearest", "skip", "interpolate"])
@pytest.mark.parametrize("name", ["vim_ti", "videomamba_ti"])
def test_feature_maps_of_an_unreduced_model_are_its_streams(name: str, how: str) -> None:
    """Also of a patched model that removes nothing; the grid is not square, the depth odd."""
    model = mtr_lab.create_model(name, img_size=(24, 40), patch_size=8, depth=5, embed_dim=16).eval()
    images = torch.randn(2, 3, 24, 40)
    states = mtr_lab.trace(model, images)
    extractor = FeatureMaps(model, restoration=how)
    assert extractor.depths == [0, 1, 2, 4]
    maps = extractor(images)
    place = model.class_position(15)
    for depth, actual in zip(extractor.depths, maps, strict=True):
        stream = states[depth].stream
        patches = torch.cat([stream[:, :place], stream[:, place + 1 :]], dim=1)
        torch.testing.assert_close(actual, patches.transpose(1, 2).reshape(2, 16, 3, 5), rtol=0, atol=0)
    mtr_lab.patch(model, "mtr", ratio=0.0)
    for actual, expected in zip(extractor(images), maps, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("how", ["nearest", "skip", "interpolate"])
@pytest.mark.parametrize("policy", FOR_ANY_FAMILY)
def test_every_policy_is_restored_to_the_source_map(policy: str, how: str) -> None:
    torch.manual_seed(0)
    model = mtr_lab.create_model("vim_ti", img_size=(32, 48), patch_size=8, depth=6, embed_dim=16).eval()
    mtr_lab.patch(model, policy, schedule=fitting(policy, [0, 5, 4, 3, 0, 0], model.layouts()[0]))
    images = torch.randn(2, 3, 32, 48)
    states = mtr_lab.trace(model, images)
    extractor = FeatureMaps(model, restoration=how)
    maps = extractor(images)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 4, 6)] * 4
    assert all(m.isfinite().all() for m in maps)
    state = states[extractor.depths[-1]]
    place = model.class_position(24)
    for image in range(2):
        source = torch.cat([state.source[image, :place], state.source[image, place + 1 :]])
        special = state.special[image, 0]
        assert not (source == special).any()
        actual = maps[-1][image].flatten(1).T  # (24, C)
        survivors = [p - (p > place) for p in state.index[image].tolist() if p != place]
        mine = source[survivors]
        if how != "skip":
            torch.testing.assert_close(actual[survivors], state.stream[image][mine], rtol=0, atol=0)
        if how == "nearest":
            absorbed = source >= 0
            torch.testing.assert_close(actual[absorbed], state.stream[image][source[absorbed]], rtol=0, atol=0)


@pytest.mark.parametrize("how", ["nearest", "skip", "interpolate"])
@pytest.mark.parametrize("policy", ["mtr", "hsa"])
def test_restoration_is_differentiable(policy: str, how: str) -> None:
    torch.manual_seed(0)
    model = mtr_lab.create_model("vim_ti", img_size=24, patch_size=8, depth=4, embed_dim=16).double()
    mtr_lab.patch(model, policy, schedule=[2, 0, 2, 0])
    images = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    extractor = FeatureMaps(model, restoration=how)
    loss = torch.stack(extractor(images)).square().mean()
    weight = model.patch_embed.proj.weight
    (gradient,) = torch.autograd.grad(loss, weight)
    step = 1e-6 * gradient / gradient.norm()

    def at(sign: int) -> float:
        with torch.no_grad():
            weight.add_(sign * step)
            value = torch.stack(extractor(images)).square().mean().item()
            weight.sub_(sign * step)
        return value

    assert (at(1) - at(-1)) / 2e-6 == pytest.approx(gradient.norm().item(), rel=1e-4)


def test_states_that_cannot_be_restored_are_refused() -> None:
    with pytest.raises(mtr_lab.UserError, match="unknown restoration 'nearset'.*'nearest'"):
        FeatureMaps(mtr_lab.create_model("vim_ti", depth=4, embed_dim=16), restoration="nearset")
    with pytest.raises(mtr_lab.UserError, match="4 feature maps need at least 4 blocks, the backbone has 3"):
        FeatureMaps(mtr_lab.create_model("vim_ti", depth=3, embed_dim=16))
    with pytest.raises(mtr_lab.UserError, match="feature maps need a model that takes images"):
        FeatureMaps(mtr_lab.create_model("videomamba_ti", depth=4, embed_dim=16, num_frames=2))
    with pytest.raises(ValueError, match="one that tracks its offset"):
        restore(start(tokens(*VALUES), 3), GRID, "skip")
    with pytest.raises(ValueError, match="traced"):
        restore(reduce(TokenState.start(tokens(*VALUES), [3]), {0: 1}), GRID)
