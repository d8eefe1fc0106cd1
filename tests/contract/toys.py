"""Backbones that do not inherit from the library: they have the members of ``mtr_lab.backbones.Backbone``.

Each differs from Vim where another family does: no class token, four paths, two stages, windows, three special tokens.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtr_lab import ops
from mtr_lab.backbones import Block, Stage, last_state
from mtr_lab.backbones.costs import Costs
from mtr_lab.backbones.norms import LayerNorm, RMSNorm
from mtr_lab.tokens import PATHS, Evidence, Layout, ScanPath, TokenState, restore
from mtr_lab.tokens.pooling import mean_by_size
from mtr_lab.tokens.positions import Positions

STATES = 4


class Scan(nn.Module):
    """A mixer: project, perhaps convolve over the grid, and scan along some paths with the same parameters."""

    def __init__(self, width: int, paths: Sequence[str], *, grid: bool) -> None:
        super().__init__()
        self.paths = tuple(PATHS[name] for name in paths)
        self.reads_grid = self.samples_grid = grid
        self.inner = inner = 2 * width
        self.in_proj = nn.Linear(width, inner)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner) if grid else None
        self.x_proj = nn.Linear(inner, inner + 2 * STATES)
        self.A_log = nn.Parameter(torch.arange(1.0, STATES + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width)

    def forward(self, hidden: Tensor, positions: Positions, needs: Sequence[str] = ()) -> tuple[Tensor, Evidence]:
        paths = positions.select_paths(self.paths)
        u = self.in_proj(hidden)
        u = F.silu(u if self.conv is None else positions.convolve(u, self.conv))
        u, scanned = positions.sample(u)
        shared = u, *self.x_proj(u).split([self.inner, STATES, STATES], dim=-1)
        u, delta, b, c = (t.expand(len(paths), *t.shape) for t in shared)
        A, D = (t.expand(len(paths), *t.shape) for t in (-self.A_log.exp(), self.D))
        stats = tuple(name for name in needs if name in ops.STATS)
        y, sums = ops.selective_scan(u, delta, A, b, c, D, stats=stats, **scanned.scan_arguments(paths))
        b, c = (t.transpose(0, 1) if name in needs else None for name, t in (("b", b), ("c", c)))
        names = tuple(path.name for path in paths)
        return self.out_proj(positions.spread(y)), Evidence(
            sums.detach().transpose(0, 1), stats, self.inner, b, c, names
        )

    def costs(self, tokens: int, layout: Layout, paths: Sequence[ScanPath], scanned: int | None = None) -> Costs:
        scanned = tokens if scanned is None else scanned
        linear = sum(layer.weight.numel() for layer in (self.in_proj, self.out_proj))
        conv = 0 if self.conv is None else self.conv.weight.numel()  # on the whole grid
        scan = scanned * self.inner * (9 * STATES + 2) * len(paths)
        exponentials = len(paths) * scanned * self.inner * STATES
        products = tokens * linear + scanned * self.x_proj.weight.numel() + layout.patches * conv
        return Costs.products(products) + Costs(scan, scan, exponentials)


class Attention(nn.Module):
    """Attention, a mixer without a scan; merged tokens count with their sizes."""

    paths: tuple[ScanPath, ...] = ()

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden: Tensor, positions: Positions, needs: Sequence[str] = ()) -> tuple[Tensor, Evidence]:
        q, k, v = self.qkv(hidden).chunk(3, dim=-1)
        weight = positions.state.size.log()[:, None].to(q.dtype)
        scores = torch.bmm(q, k.transpose(1, 2)) / q.shape[-1] ** 0.5 + weight
        return self.proj(torch.bmm(scores.softmax(-1), v)), Evidence.none(hidden)

    def costs(self, tokens: int, layout: Layout, paths: Sequence[ScanPath]) -> Costs:
        width = self.proj.in_features
        return Costs.products(4 * tokens * width**2 + 2 * tokens**2 * width)


class Toy(nn.Module):
    """Patches, stages of blocks with a convolution of stride 2 between them, the mean of the tokens, a head."""

    def __init__(
        self,
        *,
        size: tuple[int, int] = (24, 16),
        widths: Sequence[int] = (16,),
        depths: Sequence[int] = (4,),
        paths: Sequence[str] = ("forward", "backward"),
        special: Sequence[int] = (),
        windows: tuple[int, int] = (1, 1),
        grid: bool = False,
        mlp: bool = False,
        attention: Sequence[int] = (),
        norm: type[nn.Module] = RMSNorm,
        num_classes: int = 5,
    ) -> None:
        super().__init__()
        self.input_shape, self.special, self.windows = (3, *size), tuple(special), windows
        self.num_classes, self.reduction = num_classes, None
        self.patches = nn.Conv2d(3, widths[0], 4, 4)
        self.tokens = nn.Parameter(torch.randn(len(special), widths[0])) if special else None
        self.blocks, self.ends = nn.ModuleList(), []
        for width, depth in zip(widths, depths, strict=True):
            for _ in range(depth):
                scans = len(self.blocks) not in attention
                mixer = Scan(width, paths, grid=grid) if scans else Attention(width)
                hidden = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
                second = (hidden, norm(width)) if mlp else ()
                self.blocks.append(Block(mixer, norm(width), *second))
            self.ends.append(len(self.blocks))
        self.widths = tuple(widths)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in pairwise(widths))
        self.final_norm = norm(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)

    @property
    def stages(self) -> list[Stage]:
        starts = [0, *self.ends]
        return [
            Stage(list(self.blocks[starts[i] : end]), self.widths[i], 4 * 2**i, 4 * 2**i)
            for i, end in enumerate(self.ends)
        ]

    def layouts(self, img_size: Sequence[int] | None = None) -> list[Layout]:
        height, width = img_size or self.input_shape[1:]
        down, across = self.windows
        return [
            Layout(height // 4 // 2**i // down, width // 4 // 2**i // across, self.special, windows=self.windows)
            for i in range(len(self.widths))
        ]

    def _start(self, maps: Tensor, stage: int, size: Sequence[int]) -> TokenState:
        layout = self.layouts(size)[stage]
        tokens = layout.cut(maps).flatten(2).transpose(1, 2)
        for which, place in enumerate(self.special):
            own = self.tokens[which].expand(tokens.shape[0], 1, -1)
            tokens = torch.cat([tokens[:, :place], own, tokens[:, place:]], dim=1)
        return TokenState.start(tokens, self.special, layout)

    def embed(self, images: Tensor) -> TokenState:
        return self._start(self.patches(images), 0, images.shape[-2:])

    def enter(self, stage: int, state: TokenState) -> TokenState:
        down = self.downs[stage - 1]
        maps = down(state.layout.join(restore(state, state.layout.grid)).to(down.weight.dtype))
        size = [4 * 2**stage * side for side in maps.shape[-2:]]
        return self._start(maps, stage, size)

    def classify(self, state: TokenState) -> Tensor:
        normed, _ = self.final_norm(state.hidden, state.residual)
        means = mean_by_size(normed, state).unflatten(0, (-1, state.layout.sequences))
        return self.head(means.mean(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(last_state(self, images))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.widths[-1], num_classes) if num_classes else nn.Identity()

    def costs(self, layouts: Sequence[Layout]) -> Costs:
        products = layouts[0].patches * layouts[0].sequences * self.patches.weight.numel()
        for layout, conv in zip(layouts[1:], self.downs, strict=True):
            products += layout.patches * layout.sequences * conv.weight.numel()
        return Costs.products(products + self.widths[-1] * self.num_classes)


FOUR = ("forward", "backward", "columns", "columns_backward")
SNAKES = ("snake", "snake_backward", "columns_snake", "columns_snake_backward")
TOYS: dict[str, dict[str, Any]] = {
    "no_class_token": {"paths": ("forward",), "mlp": True, "attention": (3,)},
    "four_paths": {"paths": FOUR, "grid": True, "norm": LayerNorm},
    "snakes": {"paths": SNAKES, "grid": True},
    "two_stages": {"size": (32, 32), "widths": (16, 32), "depths": (3, 3), "mlp": True, "norm": LayerNorm},
    "grid_stages": {"size": (32, 32), "widths": (16, 32), "depths": (3, 3), "paths": FOUR, "grid": True, "mlp": True},
    "windows": {"size": (32, 32), "windows": (2, 2)},
    "three_special_tokens": {"special": (0, 3, 8)},
}
