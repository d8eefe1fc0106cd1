"""Scan paths over a grid with tokens in some cells: their reading order and gaps."""

import torch

ROW = 5  # cells; the last row may have fewer


def ranks(path: str, cells: int) -> torch.Tensor:
    """The step at which a path reads each cell; the path is rows, snake or columns, with "-" in reverse."""
    cell = torch.arange(cells)
    row, column = cell // ROW, cell % ROW
    key = {
        "rows": cell,
        "snake": row * ROW + torch.where(row % 2 == 0, column, ROW - 1 - column),
        "columns": column * cells + row,
    }[path.removeprefix("-")]
    return (-key if path.startswith("-") else key).argsort().argsort()


def reading(paths: tuple[str, ...], cell: torch.Tensor, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order (G, B, L) of tokens in the cells (B, L), and the number of skipped cells before each, (B, G, L)."""
    steps, order = torch.stack([ranks(path, cells)[cell] for path in paths]).sort(-1)
    return order, torch.nn.functional.pad(steps.diff() - 1, (1, 0)).transpose(0, 1)


def some_cells(images: int, tokens: int, cells: int, generator: torch.Generator) -> torch.Tensor:
    """Random cells with a token, in ascending order, (B, L)."""
    orders = [torch.randperm(cells, generator=generator, device=generator.device) for _ in range(images)]
    return torch.stack(orders)[:, :tokens].sort(1).values
