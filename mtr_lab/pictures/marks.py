"""A sheet: texts, frames and images at their places, from which a PNG and an SVG file are made."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
INK, FAINT, PAPER = (24, 24, 27), (110, 110, 118), (255, 255, 255)
_DASH = 7  # pixels on, pixels off
_FAMILY = "Aileron, Helvetica, Arial, sans-serif"  # Pillow's font is a part of Aileron


def font(pixels: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's built-in font, the same on every machine; it has few glyphs beyond ASCII."""
    return ImageFont.load_default(pixels)


@dataclass(frozen=True)
class Text:
    """One line; ``halo`` draws it on an outline of paper, to be read on an image."""

    line: str
    size: int
    colour: Colour = INK
    halo: bool = False

    @property
    def width(self) -> int:
        """In pixels, with a margin of 2."""
        return round(font(self.size).getlength(self.line)) + 2

    def draw(self, draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
        """Paint it, ``x`` and ``y`` its upper left corner."""
        stroke = 2 if self.halo else 0
        draw.text((x, y), self.line, self.colour, font(self.size), stroke_width=stroke, stroke_fill=PAPER)

    def svg(self, x: float, y: float) -> Iterator[str]:
        """The same as elements of an SVG file; the line is as wide in every font. Pillow's ascent is the font size."""
        halo = f' stroke="{_hex(PAPER)}" stroke-width="4" paint-order="stroke"' if self.halo else ""
        fit = f'textLength="{self.width - 2}" lengthAdjust="spacingAndGlyphs"'
        yield (
            f'<text x="{x:g}" y="{y + self.size:g}" font-size="{self.size}" fill="{_hex(self.colour)}" {fit}'
            f"{halo}>{escape(self.line)}</text>"
        )


@dataclass(frozen=True)
class Frame:
    """A rectangle's outline on a thin rim of paper, or filled without a rim."""

    width: float
    height: float
    colour: Colour
    line: int = 3
    dashed: bool = False
    filled: bool = False

    def draw(self, draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
        """Paint it, ``x`` and ``y`` its upper left corner."""
        right, bottom = x + self.width, y + self.height
        if self.filled:
            draw.rectangle((x, y, right, bottom), fill=self.colour)
            return
        draw.rectangle((x - 1, y - 1, right + 1, bottom + 1), outline=PAPER, width=self.line + 2)
        if not self.dashed:
            draw.rectangle((x, y, right, bottom), outline=self.colour, width=self.line)
            return
        thick = self.line - 1
        for at in range(0, round(self.width), 2 * _DASH):
            ends = x + at, x + min(at + _DASH, self.width)
            draw.rectangle((ends[0], y, ends[1], y + thick), fill=self.colour)
            draw.rectangle((ends[0], bottom - thick, ends[1], bottom), fill=self.colour)
        for at in range(0, round(self.height), 2 * _DASH):
            ends = y + at, y + min(at + _DASH, self.height)
            draw.rectangle((x, ends[0], x + thick, ends[1]), fill=self.colour)
            draw.rectangle((right - thick, ends[0], right, ends[1]), fill=self.colour)

    def svg(self, x: float, y: float) -> Iterator[str]:
        """The same as elements of an SVG file."""
        inset = 0 if self.filled else self.line / 2
        place = (
            f'x="{x + inset:g}" y="{y + inset:g}" width="{max(self.width - 2 * inset, 0):g}" '
            f'height="{max(self.height - 2 * inset, 0):g}"'
        )
        if self.filled:
            yield f'<rect {place} fill="{_hex(self.colour)}"/>'
            return
        dash = f' stroke-dasharray="{_DASH}"' if self.dashed else ""
        yield f'<rect {place} fill="none" stroke="{_hex(PAPER)}" stroke-width="{self.line + 2}"/>'
        yield f'<rect {place} fill="none" stroke="{_hex(self.colour)}" stroke-width="{self.line}"{dash}/>'


@dataclass(frozen=True)
class Sheet:
    """Marks on white paper."""

    width: int
    height: int
    marks: tuple[tuple[float, float, "Image.Image | Text | Frame"], ...]
    """Left, top and the mark; later marks lie on earlier ones."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width, self.height

    def image(self) -> Image.Image:
        """The sheet in pixels."""
        painted = Image.new("RGB", self.size, PAPER)
        draw = ImageDraw.Draw(painted)
        for x, y, mark in self.marks:
            if isinstance(mark, Image.Image):
                painted.paste(mark, (round(x), round(y)))
            else:
                mark.draw(draw, x, y)
        return painted

    def __repr__(self) -> str:
        return f"Sheet({self.width} × {self.height} px, {len(self.marks)} marks)"

    def _repr_png_(self) -> bytes:
        """How a notebook shows it."""
        stream = io.BytesIO()
        self.image().save(stream, "PNG")
        return stream.getvalue()

    def svg(self) -> str:
        """The sheet as an SVG file: texts and frames as such, images embedded."""
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" font-family="{_FAMILY}">',
            f'<rect width="{self.width}" height="{self.height}" fill="{_hex(PAPER)}"/>',
        ]
        for x, y, mark in self.marks:
            if isinstance(mark, Image.Image):
                place = f'x="{x:g}" y="{y:g}" width="{mark.width}" height="{mark.height}"'
                lines.append(f'<image {place} href="{_data_uri(mark)}"/>')
            else:
                lines += mark.svg(x, y)
        return "\n".join([*lines, "</svg>", ""])


def raster(image: Image.Image) -> Sheet:
    """An image as a sheet."""
    return Sheet(image.width, image.height, ((0, 0, image),))


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{channel:02x}" for channel in colour)


def _data_uri(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=6)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
