"""Regions, their colours and borders, on small maps."""

import numpy as np
import pytest

from mtr_lab.pictures.regions import DROPPED, PatchGrid, mean_colours, region_borders, region_sizes


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize(("patch_size", "stride"), [(4, 4), (16, 8), (6, 2), (3, 5), (1, 1)])
@pytest.mark.parametrize(("rows", "columns"), [(3, 2), (1, 4)])
def test_a_pixel_belongs_to_the_patch_with_the_nearest_centre(rows, columns, patch_size, stride, scale) -> None:
    numbers = np.arange(rows * columns).reshape(rows, columns)
    painted = PatchGrid(rows, columns, patch_size, stride).paint(numbers, scale)
    height, width = ((count - 1) * stride + patch_size for count in (rows, columns))
    assert painted.shape == (height * scale, width * scale)
    for (y, x), number in np.ndenumerate(painted):
        place = (y + 0.5) / scale, (x + 0.5) / scale
        far = [
            (place[0] - row * stride - patch_size / 2) ** 2 + (place[1] - column * stride - patch_size / 2) ** 2
            for row in range(rows)
            for column in range(columns)
        ]
        assert far[number] == min(far)


def test_overlapping_patches_share_their_overlap_evenly() -> None:
    grid = PatchGrid(rows=1, columns=3, patch_size=4, stride=2)
    # Pixels 0-3, 2-5 and 4-7; the outer patches own the pixels that no other patch covers.
    assert grid.paint(np.array([[7, 8, 9]]))[0].tolist() == [7, 7, 7, 8, 8, 9, 9, 9]


def test_paint_keeps_channels() -> None:
    colours = np.array([[[1, 2, 3], [4, 5, 6]]])
    assert PatchGrid(1, 2, 2, 2).paint(colours)[1].tolist() == [[1, 2, 3]] * 2 + [[4, 5, 6]] * 2


X = DROPPED
TOKENS = np.array(
    [
        [0, 0, 1, 2],
        [0, 3, 3, 2],
        [4, 5, X, X],
    ]
)


def test_region_sizes() -> None:
    assert region_sizes(TOKENS).tolist() == [[3, 3, 1, 2], [3, 2, 2, 2], [1, 1, 0, 0]]
    assert region_sizes(np.full((2, 2), DROPPED)).tolist() == [[0, 0], [0, 0]]


def test_borders_lie_between_regions_only() -> None:
    border = region_borders(TOKENS, region_sizes(TOKENS) > 1)
    # The corners touch no other region. Neither token 4, token 5 nor the dropped patches are a merged region.
    expected = [
        [0, 1, 1, 1],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
    ]
    assert border.astype(int).tolist() == expected
    one = np.zeros((4, 5), dtype=int)
    assert not region_borders(one, np.ones_like(one, dtype=bool)).any()
    alone = np.arange(20).reshape(4, 5)
    assert not region_borders(alone, np.zeros_like(alone, dtype=bool)).any()


def test_an_outline_is_one_pixel_on_either_side_whatever_the_scale() -> None:
    grid = PatchGrid(rows=2, columns=3, patch_size=4, stride=4)
    tokens = grid.paint(np.array([[0, 0, 1], [2, 3, 4]]), 2)
    border = region_borders(tokens, tokens == 0)
    expected = np.zeros((16, 24), dtype=bool)
    expected[:8, 15:17] = True  # right of the region, across the width of a patch
    expected[7:9, :16] = True  # and below it
    assert (border == expected).all()


def test_mean_colours_of_regions_in_several_pieces() -> None:
    tokens = np.array([[0, 1], [X, 0]])
    image = np.array([[[10, 0, 0], [1, 2, 3]], [[9, 9, 9], [30, 0, 7]]], dtype=np.uint8)
    assert mean_colours(image, tokens).tolist() == [[[20, 0, 3.5], [1, 2, 3]], [[9, 9, 9], [20, 0, 3.5]]]
    assert mean_colours(image, np.full((2, 2), DROPPED)).tolist() == image.tolist()
