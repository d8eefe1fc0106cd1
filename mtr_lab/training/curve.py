"""The training loss and a held-out metric over the epochs, drawn as SVG."""

import math
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from mtr_lab.results.atomic import replace_file
from mtr_lab.training.history import Row

METRICS = {"val_top1": "top-1", "val_miou": "mIoU", "val_ap50": "AP50"}
WIDTH, HEIGHT = 700, 320
LEFT, RIGHT, TOP, BOTTOM = 60, 640, 20, 270
LOSS_COLOUR, METRIC_COLOUR = "#1f77b4", "#d62728"
TICKS = 5


def draw_curve(rows: Sequence[Row], path: Path) -> None:
    """Draw the loss with its scale on the left, the first of ``METRICS`` there is, a share, with its on the right."""
    metric = next((name for name in METRICS if any(name in row for row in rows)), None)
    epochs = max(row["epoch"] for row in rows) + 1
    most = max([loss for _, loss in _values(rows, "train_loss")], default=0.0) or 1.0
    parts = [_text((LEFT + RIGHT) / 2, HEIGHT - 10, "epoch")]
    for tick in range(TICKS + 1):
        x, y = LEFT + (RIGHT - LEFT) * tick / TICKS, BOTTOM - (BOTTOM - TOP) * tick / TICKS
        parts.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#ddd"/>')
        parts.append(_text(x, BOTTOM + 18, f"{epochs * tick / TICKS:g}"))
        parts.append(_text(LEFT - 22, y + 4, f"{most * tick / TICKS:.2f}", LOSS_COLOUR))
        if metric is not None:
            parts.append(_text(RIGHT + 20, y + 4, f"{tick / TICKS:.1f}", METRIC_COLOUR))
    parts.append(_text(LEFT, TOP - 7, "training loss", LOSS_COLOUR))
    parts.append(_line(rows, "train_loss", epochs, most, LOSS_COLOUR))
    if metric is not None:
        parts.append(_text(RIGHT, TOP - 7, f"held out, {METRICS[metric]}", METRIC_COLOUR, "end"))
        parts.append(_line(rows, metric, epochs, 1.0, METRIC_COLOUR))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )
    with replace_file(path) as stream:
        stream.write(svg.encode())


def _values(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """Epochs done and the value after them, where it is finite."""
    return [(row["epoch"] + 1, row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]


def _line(rows: Sequence[Row], name: str, epochs: float, most: float, colour: str) -> str:
    points = [
        f"{LEFT + (RIGHT - LEFT) * epoch / epochs:.1f},{BOTTOM - (BOTTOM - TOP) * value / most:.1f}"
        for epoch, value in _values(rows, name)
    ]
    return f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def _text(x: float, y: float, text: str, colour: str = "#333", anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{escape(text)}</text>'
