"""The blocks of VMamba: a selective scan over a grid along four paths, with parameters for each of them, and an MLP.

Parameter names are the authors' (``forward_type="v05_noz"``), so that their checkpoints load strictly.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtr_lab import ops
from mtr_lab.backbones.costs import Costs
from mtr_lab.backbones.initialisation import timescale_projection
from mtr_lab.backbones.norms import LayerNorm
from mtr_lab.backbones.plain import as_built, convolve_silu, is_untouched, project
from mtr_lab.backbones.stage import Block
from mtr_lab.tokens import PATHS, Evidence, Layout, ScanPath
from mtr_lab.tokens.positions import Positions


class SS2D(nn.Module):
    """Rows, columns, and both reversed: each path has its own Δ, B, C, A and D. There is no gate.

    Args:
        d_model: width C of the token stream.
        d_state: N, states a channel.
        ssm_ratio: d_inner / d_model, rounded down.

    Source: Liu et al., "VMamba: Visual State Space Model", arXiv 2401.10166, section 4.2.
    """

    paths = tuple(PATHS[name] for name in ("forward", "columns", "backward", "columns_backward"))
    reads_grid = True
    samples_grid = True

    def __init__(self, d_model: int, d_state: int = 1, ssm_ratio: float = 2.0) -> None:
        super().__init__()
        self.d_model, self.d_state = d_model, d_state
        self.d_inner, self.dt_rank = int(ssm_ratio * d_model), math.ceil(d_model / 16)
        number, low_rank = len(self.paths), self.dt_rank + 2 * d_state
        self.in_proj = as_built(nn.Linear(d_model, self.d_inner, bias=False))
        conv = nn.Conv2d(self.d_inner, self.d_inner, 3, padding=1, groups=self.d_inner, bias=False)
        self.conv2d = as_built(conv)
        projections = [nn.Linear(self.d_inner, low_rank, bias=False) for _ in range(number)]
        self.x_proj_weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in projections]))
        timescales = [timescale_projection(self.dt_rank, self.d_inner) for _ in range(number)]
        self.dt_projs_weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in timescales]))
        self.dt_projs_bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in timescales]))
        states = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_logs = nn.Parameter(states.log().repeat(number * self.d_inner, 1))
        self.Ds = nn.Parameter(torch.ones(number * self.d_inner))
        self.out_norm = nn.LayerNorm(self.d_inner)
        self.out_proj = as_built(nn.Linear(self.d_inner, d_model, bias=False))

    def forward(self, hidden: Tensor, positions: Positions, needs: Sequence[str] = ()) -> tuple[Tensor, Evidence]:
        """Mix the tokens of a grid: (B, L, C) -> (B, L, C), and the requested evidence.

        Args:
            hidden: normalised tokens, (B, L, C).
            positions: of the tokens.
            needs: evidence to collect, names from ``mtr_lab.ops.STATS`` and ``"b"``, ``"c"``.
        """
        paths = positions.select_paths(self.paths)
        stats = tuple(name for name in needs if name in ops.STATS)
        u = positions.convolve(project(self.in_proj, hidden), partial(convolve_silu, self.conv2d))
        u, scanned = positions.sample(u)
        x_proj, dt_proj, dt_bias, A_log, D = self._parameters_of(paths)
        low_rank = ops.linear(u, x_proj.flatten(0, 1)).unflatten(2, x_proj.shape[:2]).permute(2, 0, 1, 3)
        A, along = ops.state_matrix(A_log), scanned.scan_arguments(paths)
        norm, scan_norms = self.out_norm, self._scan_norms()
        if scan_norms:
            along |= {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
        y, sums = ops.scan_low_rank(u, low_rank, dt_proj, A, D, delta_bias=dt_bias, stats=stats, **along)
        y = positions.spread(y if scan_norms else norm(y))
        _, b, c = low_rank.split([self.dt_rank, self.d_state, self.d_state], dim=-1)  # (G, B, L, N)
        evidence = Evidence(
            sums.detach().transpose(0, 1),
            stats,
            self.d_inner,
            b.transpose(0, 1) if "b" in needs else None,
            c.transpose(0, 1) if "c" in needs else None,
            tuple(path.name for path in paths),
        )
        normed, evidence = positions.merged(y, evidence)
        return project(self.out_proj, normed), evidence

    @property
    def merged_width(self) -> int:
        """E, the channels of the tokens that may merge before the output projection."""
        return self.d_inner

    def costs(
        self,
        tokens: int,
        layout: Layout,
        paths: Sequence[ScanPath],
        scanned: int | None = None,
        projected: int | None = None,
    ) -> Costs:
        """Costs of one sequence of ``tokens`` tokens: ``scanned`` of them along ``paths``, ``projected`` by out_proj.

        Both are all of them by default. The literature counts all paths, and no gate. The convolution is computed on
        the whole grid of ``layout``.
        """
        scanned, projected = (tokens if count is None else count for count in (scanned, projected))
        outside = (tokens + projected) * self.d_model * self.d_inner + layout.patches * self.conv2d.weight.numel()
        projections = scanned * self.d_inner * (2 * self.dt_rank + 2 * self.d_state)
        products, channels = outside + len(paths) * projections, len(paths) * scanned * self.d_inner
        return Costs(
            flops=2 * products + channels * (9 * self.d_state + 2),
            literature=products + channels * (9 * self.d_state + 1),
            exponentials=channels * self.d_state,
        )

    def _scan_norms(self) -> bool:
        """Whether ``ops.scan_low_rank`` computes ``out_norm``: a LayerNorm over E with a weight, and without hooks."""
        norm = self.out_norm
        own = type(norm) is nn.LayerNorm and is_untouched(norm) and norm.weight is not None
        return own and norm.weight.shape == (self.d_inner,)

    def _parameters_of(self, paths: Sequence[ScanPath]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x_proj (G, R + 2N, E), dt_proj (G, E, R), its bias (G, E), A_log (G, E, N) and D (G, E) of these paths."""
        per_path = (self.dt_projs_bias.shape[0], self.d_inner)
        A_logs, Ds = self.A_logs.unflatten(0, per_path), self.Ds.unflatten(0, per_path)
        parameters = self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, A_logs, Ds
        if len(paths) == len(self.paths):
            return parameters
        chosen = [self.paths.index(path) for path in paths]
        x_proj, dt_proj, dt_bias, A_log, D = (torch.stack([part[i] for i in chosen]) for part in parameters)
        return x_proj, dt_proj, dt_bias, A_log, D


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = as_built(nn.Linear(dim, hidden)), as_built(nn.Linear(hidden, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, dim) -> (B, L, dim)."""
        return project(self.fc2, F.gelu(project(self.fc1, tokens)))


class VSSBlock(Block):
    """A block with the authors' names: its mixer is ``op``, and the norm before its MLP ``norm2``."""

    def __init__(self, dim: int, d_state: int, ssm_ratio: float, mlp_ratio: float, drop_path: float) -> None:
        mlp = Mlp(dim, int(mlp_ratio * dim))
        super().__init__(SS2D(dim, d_state, ssm_ratio), LayerNorm(dim), mlp, LayerNorm(dim), drop_path)
        self.op, self.norm2 = self._modules.pop("mixer"), self._modules.pop("mlp_norm")

    @property
    def mixer(self) -> Any:
        """``op``."""
        return self.op

    @property
    def mlp_norm(self) -> Any:  # type: ignore[override]
        """``norm2``."""
        return self.norm2
