"""The smallest model that mtr_lab can reduce: square patches, one stage, one direction, mean pooling.

It inherits nothing of the library. The manual's page "Add a backbone" shows this file.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtr_lab import UserError, ops
from mtr_lab.backbones import Block, Stage, last_state
from mtr_lab.backbones.costs import Costs
from mtr_lab.backbones.norms import RMSNorm
from mtr_lab.tokens import PATHS, Evidence, Layout, ScanPath, TokenState
from mtr_lab.tokens.pooling import mean_by_size
from mtr_lab.tokens.positions import Positions


class Mixer(nn.Module):
    """A selective scan from the first token to the last; C channels, N states a channel."""

    paths = (PATHS["forward"],)

    def __init__(self, width: int, states: int = 8) -> None:
        super().__init__()
        self.width, self.states = width, states
        self.project = nn.Linear(width, 2 * width + 2 * states, bias=False)  # Δ, the gate, B and C
        self.delta_bias = nn.Parameter(torch.zeros(width))
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor, positions: Positions, needs: Sequence[str] = ()) -> tuple[Tensor, Evidence]:
        delta, gate, b, c = self.project(hidden).split([self.width, self.width, self.states, self.states], dim=-1)
        inputs = hidden, delta, -self.A_log.exp(), b, c, self.D, self.delta_bias
        u, delta, A, b, c, D, bias = (t[None] for t in inputs)  # G = 1 direction
        stats, path = tuple(name for name in needs if name in ops.STATS), positions.scan_arguments(self.paths)
        y, sums = ops.selective_scan(u, delta, A, b, c, D, z=gate, delta_bias=bias, stats=stats, **path)
        b, c = b.transpose(0, 1), c.transpose(0, 1)  # (B, G, L, N)
        return y, Evidence(sums.detach().transpose(0, 1), stats, self.width, b, c, ("forward",))

    def costs(self, tokens: int, layout: Layout, paths: Sequence[ScanPath]) -> Costs:
        states = tokens * self.width * self.states
        scan = 9 * states + 2 * tokens * self.width
        return Costs.products(tokens * self.project.weight.numel()) + Costs(scan, scan, exponentials=states)


class Smallest(nn.Module):
    """Patches of 4 x 4 pixels through Mamba blocks; the mean of the tokens is classified."""

    reduction = None  # mtr_lab.patch sets it

    def __init__(self, size: int = 32, width: int = 32, depth: int = 6, num_classes: int = 5) -> None:
        super().__init__()
        self.input_shape, self.width = (3, size, size), width
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(Block(Mixer(width), RMSNorm(width)) for _ in range(depth))
        self.final_norm = RMSNorm(width)
        self.reset_classifier(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(last_state(self, images))

    @property
    def stages(self) -> list[Stage]:
        return [Stage(list(self.blocks), self.width, stride=4, patch_size=4)]

    def layouts(self, img_size: Sequence[int] | None = None) -> list[Layout]:
        height, width = img_size or self.input_shape[1:]
        if height % 4 or width % 4:
            raise UserError(f"images of {height} x {width} pixels: expected multiples of 4, the side of a patch.")
        return [Layout(rows=height // 4, columns=width // 4)]

    def embed(self, images: Tensor) -> TokenState:
        (layout,) = self.layouts(images.shape[-2:])
        return TokenState.start(self.patches(images).flatten(2).transpose(1, 2), (), layout)

    def enter(self, stage: int, state: TokenState) -> TokenState:
        raise IndexError(stage)  # there is no second stage

    def classify(self, state: TokenState) -> Tensor:
        normed, _ = self.final_norm(state.hidden, state.residual)
        return self.head(mean_by_size(normed, state))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.width, num_classes) if num_classes else nn.Identity()

    def costs(self, layouts: Sequence[Layout]) -> Costs:
        return Costs.products(layouts[0].patches * self.patches.weight.numel() + self.width * self.num_classes)
