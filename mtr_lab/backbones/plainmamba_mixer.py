"""The mixer of PlainMamba: a selective scan along four snake paths, of which only the input follows the path.

Parameter names are the authors', so that their checkpoints load strictly.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtr_lab import ops
from mtr_lab.backbones.costs import Costs
from mtr_lab.backbones.initialisation import timescale_projection
from mtr_lab.backbones.plain import as_built, convolve_silu, is_plain, project
from mtr_lab.errors import unknown
from mtr_lab.tokens import PATHS, Evidence, Layout, ScanPath
from mtr_lab.tokens.positions import Positions

PAIRINGS = ("source", "rank")
"""``source``: a token is read with Δ, B and C of the token that contains the original raster position whose number is
that of the step. ``rank``: with those of the survivor whose number in raster order is that of the step among the
survivors. Both are the same for an unreduced sequence."""


class PlainMamba2D(nn.Module):
    """Four snake paths over the grid, with the same A, D and projections; their sum is gated.

    Step t of path k reads the input of the t-th token of the path, with Δ, B and C of the t-th token in raster order:
    the authors' models are trained so. A vector for the move from the token before (right,
    left, up or down) is added to B, and the bias of Δ is added twice.

    Args:
        d_model: width C of the token stream.
        d_state: N, states a channel.
        conv_size: width of the convolution over the grid, odd.
        pairing: of the tokens of a reduced sequence with Δ, B and C, one of ``PAIRINGS``.

    Source: Yang et al., "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition", arXiv 2403.17695,
    sections 3.2 and 3.3.
    """

    paths = tuple(PATHS[name] for name in ("snake", "snake_backward", "columns_snake", "columns_snake_backward"))
    reads_grid = samples_grid = True

    def __init__(self, d_model: int, d_state: int = 16, conv_size: int = 7, pairing: str = "source") -> None:
        super().__init__()
        if pairing not in PAIRINGS:
            raise unknown("pairing", pairing, PAIRINGS)
        self.d_model, self.d_state, self.pairing = d_model, d_state, pairing
        self.d_inner, self.dt_rank = 2 * d_model, math.ceil(d_model / 16)
        self.in_proj = as_built(nn.Linear(d_model, 2 * self.d_inner))
        conv = nn.Conv2d(self.d_inner, self.d_inner, conv_size, padding=conv_size // 2, groups=self.d_inner)
        self.conv2d = as_built(conv)
        self.x_proj = as_built(nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False))
        self.dt_proj = as_built(timescale_projection(self.dt_rank, self.d_inner))
        states = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(states.log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = as_built(nn.Linear(self.d_inner, d_model))
        self.direction_Bs = nn.Parameter(torch.zeros(5, d_state))

    def forward(self, hidden: Tensor, positions: Positions, needs: Sequence[str] = ()) -> tuple[Tensor, Evidence]:
        """Mix the tokens of a grid: (B, L, C) -> (B, L, C), and the requested evidence of the tokens that are read.

        Args:
            hidden: normalised tokens, (B, L, C).
            positions: of the tokens.
            needs: evidence to collect, names from ``mtr_lab.ops.STATS`` and ``"b"``, ``"c"``.
        """
        paths = positions.select_paths(self.paths)
        stats = tuple(name for name in needs if name in ops.STATS)
        x, z = project(self.in_proj, hidden).chunk(2, dim=-1)
        u, scanned = positions.sample(positions.convolve(x, partial(convolve_silu, self.conv2d)))
        low_rank, b, c = project(self.x_proj, u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        gate = z if scanned is positions else None
        walk = None if {"b", "c"} & set(needs) else scanned.walk(paths)
        if walk is None:
            y, sums, b, c = self._scan(u, low_rank, b, c, gate, scanned, paths, stats)
        else:
            order, steps, moves = walk
            delta, bias = self._timescales(low_rank)
            along = {"order": order, "steps": steps, "moves": F.embedding(moves, self.direction_Bs)}
            A = ops.state_matrix(self.A_log)
            y, sums = ops.scan_by_step(u, delta, A, b, c, self.D, delta_bias=bias, z=gate, stats=stats, **along)
        evidence = Evidence(
            sums.detach().transpose(0, 1),
            stats,
            self.d_inner,
            b.transpose(0, 1) if "b" in needs else None,
            c.transpose(0, 1) if "c" in needs else None,
            tuple(path.name for path in paths),
        )
        y = y if scanned is positions else positions.spread(y) * F.silu(z)
        return project(self.out_proj, y), evidence

    def _timescales(self, low_rank: Tensor, *, gaps: bool = False) -> tuple[Tensor, Tensor]:
        """Δ (B, L, E) and the bias (E,) that the scan adds to it: the bias of ``dt_proj`` is in their sum twice.

        With gaps, the bias alone has it twice: it is Δ of a token without input. So it is on a GPU, where the product
        without a bias is faster.
        """
        bias: Tensor = self.dt_proj.bias
        if low_rank.is_cuda and is_plain(self.dt_proj):
            return ops.linear(low_rank, self.dt_proj.weight), 2 * bias
        delta = project(self.dt_proj, low_rank)
        return (delta - bias, 2 * bias) if gaps else (delta, bias)

    def _scan(
        self,
        u: Tensor,
        low_rank: Tensor,
        b: Tensor,
        c: Tensor,
        gate: Tensor | None,
        positions: Positions,
        paths: Sequence[ScanPath],
        stats: Sequence[str],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The scan of any tokens: its output, its sums, and B and C of the tokens that are read, (G, B, L, N)."""
        options = positions.scan_arguments(paths)
        delta, bias = self._timescales(low_rank, gaps=options["gap"] is not None)
        pairs, moves = positions.pairs(paths, by_rank=self.pairing == "rank"), positions.moves(paths)
        delta, b, c = (_rows(values, pairs) for values in (delta, b, c))  # (G, B, L, ·)
        b = b + F.embedding(moves, self.direction_Bs)
        A, D, bias = (t.expand(len(paths), *t.shape) for t in (ops.state_matrix(self.A_log), self.D, bias))
        y, sums = ops.selective_scan(
            u.expand(len(paths), *u.shape), delta, A, b, c, D, z=gate, delta_bias=bias, stats=stats, **options
        )
        return y, sums, b, c

    def costs(self, tokens: int, layout: Layout, paths: Sequence[ScanPath], scanned: int | None = None) -> Costs:
        """Costs of one sequence of ``tokens`` tokens, ``scanned`` of them (all by default) along ``paths``.

        The literature counts all paths, without the gate. The convolution is computed on the whole grid of ``layout``.
        """
        scanned = tokens if scanned is None else scanned
        projections = 3 * tokens * self.d_model * self.d_inner  # in_proj and out_proj
        low_rank = scanned * self.d_inner * (2 * self.dt_rank + 2 * self.d_state)
        products = projections + low_rank + layout.patches * self.conv2d.weight.numel()
        channels = len(paths) * scanned * self.d_inner
        return Costs(
            flops=2 * products + channels * (9 * self.d_state + 2),
            literature=products + channels * (9 * self.d_state + 1),
            exponentials=channels * self.d_state,
        )


def _rows(values: Tensor, tokens: Tensor) -> Tensor:
    """The values (B, L, K) of tokens (G, B, M): (G, B, M, K), contiguous."""
    batch, length = values.shape[:2]
    first = length * torch.arange(batch, device=tokens.device)[:, None]  # row of the first token of each sequence
    return values.flatten(0, 1).index_select(0, (tokens + first).flatten()).unflatten(0, tokens.shape)
