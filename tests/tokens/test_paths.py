"""The order of survivors on each path, against loops over the cells of a grid."""

from itertools import pairwise

import pytest
import torch

from mtr_lab.tokens import PATHS, Layout, TokenState, convolve
from mtr_lab.tokens.paths import gap, order

LAYOUTS = {
    "grid": Layout(3, 4),
    "special": Layout(2, 5, special=(0, 3, 12)),
    "frames": Layout(2, 3, special=(4,), frames=3),
    "row": Layout(1, 7),
}


def path_by_hand(name: str, layout: Layout) -> list[int]:
    """The positions of the unreduced sequence in the order of a path; special tokens keep their positions."""
    rows, columns = layout.grid
    cells = []
    for frame in range(layout.frames):
        outer, inner = (columns, rows) if name.startswith("columns") else (rows, columns)
        for i in range(outer):
            line = [(j, i) if name.startswith("columns") else (i, j) for j in range(inner)]
            if "snake" in name and len(cells) // inner % 2:
                line.reverse()
            cells += [frame * rows * columns + row * columns + column for row, column in line]
    places = [position for position in range(layout.tokens) if position not in layout.special]
    path = list(range(layout.tokens))
    for place, cell in zip(places, cells, strict=True):
        path[place] = places[cell]
    return path[::-1] if name.endswith("backward") else path


def survivors(layout: Layout, kept: int) -> TokenState:
    generator = torch.Generator().manual_seed(kept)
    index = torch.stack([torch.randperm(layout.tokens, generator=generator)[:kept].sort().values for _ in range(2)])
    state = TokenState.start(torch.zeros(2, kept, 1), (), layout)
    return state._replace(index=index)


@pytest.mark.parametrize("share", [0.4, 1])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_survivors_are_read_in_the_order_of_the_path_and_the_missing_are_counted(layout: Layout, share: float) -> None:
    state = survivors(layout, round(share * layout.tokens))
    read, missing = order(state, list(PATHS.values())), gap(state, list(PATHS.values()))
    raster = gap(state, [PATHS["forward"], PATHS["backward"]])
    for image, index in enumerate(state.index.tolist()):
        for number, name in enumerate(PATHS):
            path = path_by_hand(name, layout)
            expected = [position for position in path if position in index]
            assert [index[token] for token in read[number, image]] == expected
            steps = [path.index(position) for position in expected]
            between = [0, *(b - a - 1 for a, b in pairwise(steps))]
            assert missing[image, number].tolist() == between
            if name in ("forward", "backward"):
                assert raster[image, int(name == "backward")].tolist() == between


def test_raster_paths_need_no_order() -> None:
    assert order(survivors(LAYOUTS["grid"], 5), [PATHS["forward"], PATHS["backward"]]) is None


def test_windows_are_cut_and_joined() -> None:
    layout, maps = Layout(2, 3, windows=(2, 4)), torch.randn(2, 5, 4, 12)
    windows = layout.cut(maps)
    assert torch.equal(windows[8 + 1 * 4 + 2], maps[1, :, 2:4, 6:9])
    assert torch.equal(layout.join(windows), maps)


def test_special_tokens_have_to_ascend() -> None:
    with pytest.raises(ValueError, match=r"have to ascend, got \(3, 0\)"):
        Layout(2, 2, special=(3, 0))


def test_a_convolution_reads_at_each_position_the_token_that_absorbed_it() -> None:
    layout, conv = LAYOUTS["grid"], torch.nn.Conv2d(2, 3, 3, padding=1)
    values = torch.randn(1, 12, 2)
    state = TokenState.start(values, (), layout)
    whole = conv(values.transpose(1, 2).unflatten(2, layout.grid)).flatten(2).transpose(1, 2)
    assert torch.equal(convolve(values, state, conv), whole)
    # Tokens 0 and 1 became one, token 11 was dropped: its neighbours 7 and 10 are equally near.
    source = torch.tensor([[0, 0, *range(1, 10), -1]])
    reduced = state._replace(index=torch.tensor([[0, *range(2, 11)]]), source=source)
    kept = torch.randn(1, 10, 2)
    kept[:, 9] = kept[:, 6]  # 10 and 7
    field = kept[:, [0, 0, *range(1, 10), 9]]
    expected = conv(field.transpose(1, 2).unflatten(2, layout.grid)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(convolve(kept, reduced, conv), expected[:, [0, *range(2, 11)]])
