"""Rows and columns: against loops over lists, the grid that remains, published schedules, models that go on over it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import FOUR, SNAKES, Toy

import mtr_lab
from mtr_lab import UserError, ops
from mtr_lab.measure.flops import counted_flops
from mtr_lab.reduction import apply, make_policy, policy_config
from mtr_lab.reduction.lines import grids, removals
from mtr_lab.tokens import PATHS, Evidence, Layout, TokenState
from mtr_lab.tokens import paths as token_paths

NAMES = ("storm", "storm_evit", "storm_random")


def shares(pairs: int, count: int, window: int) -> list[int]:
    """Window by window: the floor of its proportion, then one more where the remainder is largest."""
    lengths = [window] * (pairs // window) + ([pairs % window] if pairs % window else [])
    exact = [count * length / pairs for length in lengths]
    result = [math.floor(share + 1e-9) for share in exact]
    while sum(result) < count:
        fullest = max(range(len(lengths)), key=lambda i: (round(exact[i] - result[i], 9), -i))
        result[fullest] += 1
    return result


def shorten(line: list, length: int, window: int, merges: bool) -> list:
    """One row or column on the way to ``length`` tokens; a token is (members, vector, score)."""
    pairs, count = len(line) // 2, len(line) - length
    removed, start = set(), 0
    for share, size in zip(shares(pairs, count, window), [window] * (pairs // window) + [pairs % window], strict=False):
        priced = []
        for pair in range(start, start + size):
            (_, one, first), (_, two, second) = line[2 * pair], line[2 * pair + 1]
            price = sum(abs(a - b) for a, b in zip(one, two, strict=True)) if merges else min(first, second)
            priced.append((price, pair, 0 if merges or first <= second else 1))
        for _, pair, which in sorted(priced)[:share]:
            removed.add(2 * pair + which)
        start += size
    result = [list(token) for token in line]
    for place in removed if merges else ():
        members, vector, _ = result[place]
        target = result[place + 1]
        target[0] = members + target[0]
        target[1] = [a + b for a, b in zip(vector, target[1], strict=True)]
    return [tuple(token) for place, token in enumerate(result) if place not in removed]


def storm(frames: list, rows: int, columns: int, window: int, merges: bool) -> list:
    """Frames of rows of tokens -> the tokens that remain, row by row."""
    remaining = []
    for frame in frames:
        shorter = [shorten(row, columns, window, merges) for row in frame]
        turned = [shorten(list(column), rows, window, merges) for column in zip(*shorter, strict=True)]
        remaining += [token for row in zip(*turned, strict=True) for token in row]
    return remaining


@settings(deadline=None, max_examples=40, derandomize=True)
@given(name=st.sampled_from(NAMES), data=st.data())
def test_equals_a_loop_over_rows_and_columns(name: str, data: st.DataObject) -> None:
    """Twice in a row, so that the second starts from a grid that the first has left."""
    rows, columns = data.draw(st.integers(1, 7), label="rows"), data.draw(st.integers(2, 9), label="columns")
    frames, patches = data.draw(st.integers(1, 2), label="frames"), rows * columns
    places = sorted(data.draw(st.sets(st.integers(0, frames * patches), max_size=2), label="special"))
    layout = Layout(rows, columns, tuple(place + i for i, place in enumerate(places)), frames)
    policy = make_policy(policy_config(name, window=data.draw(st.integers(1, 4), label="window")))
    torch.manual_seed(data.draw(st.integers(0, 2**16), label="seed"))
    state = TokenState.start(torch.randn(2, layout.tokens, 3), layout.special, layout)
    state = state.with_streams(state.hidden, torch.randn(2, layout.tokens, 3)).traced()
    evidence = Evidence(torch.empty(2, 0, layout.tokens, 0), (), 0, directions=())
    score = policy.importance(state, evidence)
    steps = []
    for b in range(2):
        tokens = [
            ([p], state.residual[b, p].tolist(), score[b, p].item()) for p in layout.patch_positions("cpu").tolist()
        ]
        steps.append([tokens[start : start + patches] for start in range(0, len(tokens), patches)])
    streams = state.hidden, state.residual

    for _ in range(2):
        choices = removals(state.index.shape[1], layout)
        if not choices:
            break
        remove = data.draw(st.sampled_from(choices), label="removed")
        old, state = state.current_layout, apply(policy(state, evidence, remove), state)
        new = state.current_layout
        assert new == grids(layout)[state.index.shape[1]]
        patch_places, special = new.patch_positions("cpu"), list(new.special)
        for b in range(2):
            split = [steps[b][f] for f in range(frames)]
            split = [[frame[i : i + old.columns] for i in range(0, len(frame), old.columns)] for frame in split]
            expected = storm(split, new.rows, new.columns, policy.window, policy.merge == "sum")
            size = new.rows * new.columns
            steps[b] = [expected[i : i + size] for i in range(0, len(expected), size)]
            for stream, actual in zip(streams, (state.hidden, state.residual), strict=True):
                total = torch.stack([stream[b, members].sum(0) for members, _, _ in expected])
                torch.testing.assert_close(actual[b, patch_places], total)
                torch.testing.assert_close(actual[b, special], stream[b, list(layout.special)], rtol=0, atol=0)
            assert [len(members) for members, _, _ in expected] == state.size[b, patch_places].tolist()
            assert state.special[b].tolist() == special
            assert state.index[b, patch_places].tolist() == [members[-1] for members, _, _ in expected]
            for place, (members, _, _) in zip(patch_places.tolist(), expected, strict=True):
                assert (state.source[b, members] == place).all()


def test_published_schedules_fit() -> None:
    """PlainMamba's 14 × 14 and VMamba's 56 × 56 tokens: every list of sides is on the way that the solver takes."""
    plain = ["13-12-10-9", "12-10-8-6", "10-8-6-4", "10-8-5-3", "8-6-4-3"]
    vmamba = ["53-50", "50-44", "46-38", "44-36", "42-32", "40-30"]
    for side, schedules in ((14, plain), (56, vmamba)):
        for schedule in schedules:
            tokens = side**2
            for after in map(int, schedule.split("-")):
                assert tokens - after**2 in removals(tokens, Layout(side, side))
                tokens = after**2


SMALL = {"img_size": (24, 32), "patch_size": 4, "stride": 4, "depth": 6, "embed_dim": 16, "num_classes": 5}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_class_token_of_vim_stays_in_the_middle(name: str) -> None:
    torch.manual_seed(0)
    model = mtr_lab.create_model("vim_ti", **SMALL).eval()
    mtr_lab.patch(model, name, ratio=0.3, first_block=0, interval=1)
    for state in mtr_lab.trace(model, torch.randn(2, 3, 24, 32)):
        patches = state.index.shape[1] - 1
        assert state.special.tolist() == [[model.class_position(patches)]] * 2
        assert state.index.gather(1, state.special).tolist() == [[model.class_position(48)]] * 2
        grid = state.current_layout
        assert grid.rows * grid.columns == patches


@pytest.mark.parametrize("paths", [FOUR, SNAKES])
@torch.no_grad()
def test_models_over_a_grid_go_on_over_the_one_that_remains(paths: tuple[str, ...]) -> None:
    """Blocks behind the reduction compute what they would on a picture of that many patches."""
    torch.manual_seed(0)
    model = Toy(size=(24, 32), paths=paths, grid=True).eval()
    images = torch.randn(2, 3, 24, 32)
    schedule = mtr_lab.patch(model, "storm", schedule=[13, 0, 0, 0]).schedule
    assert counted_flops(model, images) == (schedule.flops, schedule.flops_overhead)
    state = mtr_lab.trace(model, images)[0]
    assert (state.grid.rows, state.grid.columns) == (5, 7)
    smaller = TokenState.start(state.hidden, [], Layout(5, 7)).with_streams(state.hidden, state.residual)
    for block in model.blocks[1:]:
        state, smaller = (TokenState(*block(*one)) for one in (state, smaller))
    torch.testing.assert_close(state.hidden, smaller.hidden, rtol=0, atol=0)
    chosen = [PATHS[name] for name in paths]
    assert torch.equal(token_paths.order(state, chosen), token_paths.order(smaller, chosen))


@pytest.mark.parametrize("name", ["storm", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
@torch.no_grad()
def test_it_exports_with_a_dynamic_batch(name: str) -> None:
    torch.manual_seed(0)
    model = mtr_lab.create_model("vim_ti", **{**SMALL, "depth": 2}).eval()
    mtr_lab.patch(model, name, schedule=[13, 0])
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (torch.randn(2, 3, 24, 32),), dynamic_shapes=batch)
    images = torch.randn(3, 3, 24, 32)
    exported = program.run_decompositions(ops.decompositions()).module()
    torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-5)


def test_counts_and_parts_that_do_not_fit_are_refused() -> None:
    model = mtr_lab.create_model("vim_ti", **SMALL)
    with pytest.raises(
        UserError, match=r"of the 49 there, storm can remove 6 or 13 or 18 .*, in whole rows and columns"
    ):
        mtr_lab.patch(model, "storm", schedule=[0, 3, 0, 0, 0, 0])
    with pytest.raises(UserError, match=r"mtr\.grouping=lines keeps a full grid, whose order is mtr\.order=grid"):
        mtr_lab.patch(model, "storm", ratio=0.1, order="index")
    with pytest.raises(UserError, match=r"mtr\.matching=cosine with mtr\.grouping=lines: it needs .*=asymmetric or"):
        mtr_lab.patch(model, "storm", ratio=0.1, matching="cosine")
    with pytest.raises(UserError, match=r"mtr\.zone=4 with mtr\.grouping=lines: expected 0"):
        mtr_lab.patch(model, "storm", ratio=0.1, zone=4)
