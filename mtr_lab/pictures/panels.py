"""The panels of a picture: the image, its surviving tokens, their scores."""

import numpy as np
from PIL import Image, ImageDraw

from mtr_lab.pictures.marks import FAINT, INK, PAPER, font
from mtr_lab.pictures.observation import BlockView
from mtr_lab.pictures.regions import DROPPED, PatchGrid, mean_colours, region_borders, region_sizes

_MISSING = (228, 228, 231)
_MARK = (225, 29, 72)
_VIRIDIS = np.array(
    [(68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140), (40, 174, 128), (94, 201, 98),
     (173, 220, 48), (253, 231, 37)]
)  # fmt: skip
"""Nine even steps of matplotlib's viridis."""
_MANY_PATCHES = 700  # bright outlines of more regions would hide them
_RANGE = (2, 98)  # percentiles of the scores that the colours span, so that outliers do not make the rest one colour


def image_panel(image: np.ndarray, scale: int) -> Image.Image:
    """The image, (H, W, 3) uint8, enlarged ``scale`` times in both directions."""
    return Image.fromarray(image).resize((image.shape[1] * scale, image.shape[0] * scale), Image.Resampling.BICUBIC)


def faint_panel(image: np.ndarray, scale: int) -> Image.Image:
    """The image in pale grey, for what is marked on it."""
    pale = np.repeat(image.mean(-1, keepdims=True) * 0.5 + 110, 3, -1).astype(np.uint8)
    return image_panel(pale, scale)


def token_panel(image: np.ndarray, view: BlockView, scale: int) -> Image.Image:
    """The surviving tokens: single patches unchanged, merged regions outlined in their mean colour, dropped ones pale.

    Args:
        image: (H, W, 3) uint8.
        view: the image's tokens after a block.
        scale: factor of enlargement.
    """
    (panel,) = _token_panels(image[None], view.source[None], view.grid, scale)
    return panel


def token_panels(frames: np.ndarray, view: BlockView, scale: int) -> list[Image.Image]:
    """As ``token_panel`` for a video (T, H, W, 3), one panel per frame; a merged token has one colour in all frames."""
    return _token_panels(frames, view.source, view.grid, scale)


def _token_panels(frames: np.ndarray, source: np.ndarray, grid: PatchGrid, scale: int) -> list[Image.Image]:
    """Panels of frames (T, H, W, 3); ``source`` (T / frames per patch, rows, columns) is the token of each patch."""
    span = len(frames) // len(source)  # frames per patch
    source, merged = (values.repeat(span, 0) for values in (source, region_sizes(source) > 1))
    colours = mean_colours(frames, np.stack([grid.paint(frame) for frame in source]))
    per_frame = zip(frames, source, merged, colours, strict=True)
    return [_token_panel(*frame, grid, scale) for frame in per_frame]


def _token_panel(
    image: np.ndarray, source: np.ndarray, in_region: np.ndarray, colours: np.ndarray, grid: PatchGrid, scale: int
) -> Image.Image:
    """The panel of a frame (H, W, 3); ``source`` and ``in_region`` are maps over patches, ``colours`` is (H, W, 3)."""
    flat = colours.repeat(scale, 0).repeat(scale, 1)
    large = np.asarray(image_panel(image, scale)).astype(float)
    tokens = grid.paint(source, scale)
    merged = grid.paint(in_region, scale)
    dropped = tokens == DROPPED
    grey = large.mean(axis=-1, keepdims=True)
    panel = np.where(merged[..., None], flat, large)
    panel = np.where(dropped[..., None], 0.15 * grey + 0.85 * np.array(_MISSING), panel)
    border = region_borders(tokens, merged)
    lines = panel[border]
    dark = np.where(dropped[..., None], panel, flat)[border].mean(axis=-1, keepdims=True) < 170
    bright, dim = (0.25, 0.8) if grid.rows * grid.columns > _MANY_PATCHES else (0.9, 0.6)
    panel[border] = np.where(dark, (1 - bright) * lines + bright * 255, dim * lines)  # visible on white, too
    return Image.fromarray(panel.round().astype(np.uint8))


def score_panel(view: BlockView, scale: int) -> Image.Image:
    """The scores of the tokens that entered the block, with a colour bar; tokens removed before are grey.

    Crosses mark the tokens that the block removed. A block without scores gets a panel that explains why.
    """
    if view.score is None:
        reason = "chosen by\nsimilarity alone" if view.removed.any() else "this block\nremoves nothing"
        return _message(reason, view.grid.paint(view.source, scale).shape)
    low, high = np.nanpercentile(view.score, _RANGE)
    colours = np.where(np.isnan(view.score)[..., None], _MISSING, viridis((view.score - low) / (high - low or 1)))
    scores = Image.fromarray(view.grid.paint(colours, scale).round().astype(np.uint8))
    draw = ImageDraw.Draw(scores)
    arm = view.grid.stride * scale * 0.22
    for row, column in np.argwhere(view.removed):
        y, x = ((at * view.grid.stride + view.grid.patch_size / 2) * scale - 0.5 for at in (row, column))
        for colour, width in ((PAPER, 4), (_MARK, 2)):
            draw.line((x - arm, y - arm, x + arm, y + arm), fill=colour, width=width)
            draw.line((x - arm, y + arm, x + arm, y - arm), fill=colour, width=width)
    return _beside_bar(scores, f"> {high:.3g}", f"< {low:.3g}")  # outliers lie beyond the ends of the bar


def size_panel(view: BlockView, scale: int) -> Image.Image:
    """How many patches the token of each patch stands for, in colours by the logarithm; dropped patches are grey."""
    sizes = region_sizes(view.source)
    largest = max(int(sizes.max()), 2)
    shares = np.log(sizes.clip(min=1)) / np.log(largest)
    colours = np.where((sizes == 0)[..., None], _MISSING, viridis(shares))
    painted = Image.fromarray(view.grid.paint(colours, scale).round().astype(np.uint8))
    return _beside_bar(painted, f"{largest}", "1")


def _beside_bar(painted: Image.Image, top: str, bottom: str) -> Image.Image:
    """A map and its colour bar."""
    bar = _colour_bar(top, bottom, painted.height)
    panel = Image.new("RGB", (painted.width + 8 + bar.width, painted.height), PAPER)
    panel.paste(painted, (0, 0))
    panel.paste(bar, (painted.width + 8, 0))
    return panel


def viridis(values: np.ndarray) -> np.ndarray:
    """Values (*) from 0 to 1 -> colours (*, 3) from 0 to 255; NaN is drawn as 0."""
    stops = np.linspace(0, 1, len(_VIRIDIS))
    return np.stack([np.interp(np.nan_to_num(values), stops, _VIRIDIS[:, c]) for c in range(3)], axis=-1)


def _colour_bar(top: str, bottom: str, height: int) -> Image.Image:
    """A colour bar from the highest to the lowest score, with labels at both ends."""
    size, width = 15, 16
    text_width = max(round(font(size).getlength(text)) for text in (top, bottom))
    bar = Image.new("RGB", (width + 8 + text_width, height), PAPER)
    shades = viridis(np.linspace(1, 0, height))[:, None].repeat(width, 1)
    bar.paste(Image.fromarray(shades.round().astype(np.uint8)), (0, 0))
    draw = ImageDraw.Draw(bar)
    draw.text((width + 6, 0), top, fill=INK, font=font(size), anchor="la")
    draw.text((width + 6, height), bottom, fill=INK, font=font(size), anchor="ld")
    return bar


def _message(text: str, shape: tuple[int, ...]) -> Image.Image:
    panel = Image.new("RGB", (shape[1], shape[0]), _MISSING)
    middle = shape[1] / 2, shape[0] / 2
    ImageDraw.Draw(panel).multiline_text(middle, text, fill=FAINT, font=font(18), anchor="mm", align="center")
    return panel
