"""The bidirectional Mamba mixer that Vim and VideoMamba share.

Parameter names are the upstream ones (Vim's ``bimamba_type="v2"``, VideoMamba's ``bimamba=True``), so that the
authors' checkpoints load strictly.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtr_lab import ops
from mtr_lab.backbones.costs import Costs
from mtr_lab.backbones.plain import as_built, is_plain
from mtr_lab.tokens import PATHS, Evidence, Layout, Path
from mtr_lab.tokens.positions import Positions

INNER = ("conv1d", "conv1d_b", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b")
"""The modules of a mixer whose parameters are used without calling them, unless a hook or an adapter is on one."""


class BiMamba(nn.Module):
    """Mamba mixer with a forward and a backward scan over one input projection.

    Args:
        d_model: width C of the token stream.
        d_state: N, states a channel.
        halve: divide the sum of the two directions by two, as Vim does (VideoMamba does not).
        d_conv: width of the causal convolution.
        expand: d_inner = expand · d_model.

    Source: Zhu et al., "Vision Mamba", arXiv 2401.09417, algorithm 1.
    """

    paths = (PATHS["forward"], PATHS["backward"])
    reverse = (False, True)

    def __init__(self, d_model: int, d_state: int, *, halve: bool, d_conv: int = 4, expand: int = 2) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16)
        self.halve = halve
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        for suffix in ("", "_b"):
            conv = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1)
            x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
            dt_proj = _timescale_projection(self.dt_rank, self.d_inner)
            for name, module in (("conv1d", conv), ("x_proj", x_proj), ("dt_proj", dt_proj)):
                self.add_module(f"{name}{suffix}", as_built(module))
        states = torch.arange(1, d_state + 1, dtype=torch.float32).expand(self.d_inner, d_state)
        self.A_log = nn.Parameter(states.log())
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.A_b_log = nn.Parameter(states.log())
        self.D_b = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self._laid_out: tuple[Any, ops.Layout] | None = None

    def forward(
        self, hidden: Tensor, positions: Positions | None = None, needs: Sequence[str] = ()
    ) -> tuple[Tensor, Evidence]:
        """Mix the tokens: (B, L, C) -> (B, L, C), and the evidence asked for.

        Args:
            hidden: normalised tokens, (B, L, C).
            positions: where they are; ``None`` for an unreduced sequence.
            needs: evidence to collect, names from ``mtr_lab.ops.STATS`` and ``"b"``, ``"c"``.
        """
        gap = None if positions is None else positions.gap(self.paths)
        stretch = None if positions is None else positions.stretch
        xz = self.in_proj(hidden)
        stats = tuple(name for name in needs if name in ops.STATS)
        plain = all(is_plain(getattr(self, name)) for name in INNER)
        if plain and ops.fuses(xz):
            y, sums, b, c = self._fused(xz, gap, stretch, stats)
        else:
            y, sums, b, c = self._composed(xz, gap, stretch, stats, plain)
        evidence = Evidence(
            sums.detach().transpose(0, 1),
            stats,
            self.d_inner,
            b.transpose(0, 1) if "b" in needs else None,
            c.transpose(0, 1) if "c" in needs else None,
            tuple(path.name for path in self.paths),
        )
        return self.out_proj(y), evidence

    def costs(self, tokens: int, layout: Layout, paths: Sequence[Path]) -> Costs:
        """Of one sequence of so many tokens, scanned along ``paths``.

        The literature counts one of the directions, and the convolution with its padding.
        """
        width, inner, rank, states = self.d_model, self.d_inner, self.dt_rank, self.d_state
        projections = 3 * width * inner * tokens  # in_proj and out_proj
        direction = tokens * inner * (self.d_conv + rank + 2 * states + rank)  # conv1d, x_proj, dt_proj
        padding = self.d_conv * inner * (self.d_conv - 1)
        scan = 9 * tokens * inner * states + 2 * tokens * inner
        directions = len(paths)
        return Costs(
            flops=2 * (projections + directions * direction) + directions * scan,
            literature=projections + direction + padding + scan,
            exponentials=directions * tokens * inner * states,
        )

    def _fused(
        self, xz: Tensor, gap: Tensor | None, stretch: Tensor | None, stats: tuple[str, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, L, 2E) -> what the output projection takes, the statistics, B and C; for inference."""
        return ops.mamba_inner(
            xz,
            self._layout(xz.dtype),
            rank=self.dt_rank,
            states=self.d_state,
            reverse=self.reverse,
            gap=gap,
            stretch=stretch,
            stats=stats,
            scale=0.5 if self.halve else 1.0,
        )

    def _composed(
        self, xz: Tensor, gap: Tensor | None, stretch: Tensor | None, stats: tuple[str, ...], plain: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same from single, differentiable operations; unless ``plain``, the inner modules are called."""
        if self._laid_out is not None and not torch.compiler.is_compiling():
            self._laid_out = None  # a gradient may follow, and an optimiser that changes parameters unseen
        x, z = xz.chunk(2, dim=-1)
        u, delta, b, c, bias = self._projected(x) if plain else self._projected_by_modules(x, gap is not None)
        y, sums = ops.selective_scan(
            u,
            delta,
            self._a(),
            b,
            c,
            torch.stack([self.D, self.D_b]),
            z=z,
            delta_bias=bias,
            reverse=self.reverse,
            gap=gap,
            stretch=stretch,
            stats=stats,
        )
        return y * 0.5 if self.halve else y, sums, b, c

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(B, L, E) -> u and Δ before its bias, (G, B, L, E), B and C, (G, B, L, N), and the bias, (G, E)."""
        conv_weight = self._both("conv1d", "weight").squeeze(2)
        u = ops.causal_conv1d(x, conv_weight, self._both("conv1d", "bias"), reverse=self.reverse)
        projected = torch.bmm(u.flatten(1, 2), self._both("x_proj", "weight").transpose(1, 2))
        low_rank, b, c = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = torch.bmm(low_rank, self._both("dt_proj", "weight").transpose(1, 2))
        b, c = (t.view(*u.shape[:3], self.d_state) for t in (b, c))
        return u, delta.view_as(u), b, c, self._both("dt_proj", "bias")

    def _projected_by_modules(self, x: Tensor, aligned: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """As ``_projected``, by calling the modules of each direction, as the authors do: hooks and adapters act.

        Δ then comes with its bias, which is returned apart only where the scan is ``aligned`` and needs it.
        """
        directions, biases = [], []
        for suffix, backward in zip(("", "_b"), self.reverse, strict=True):
            conv1d, x_proj, dt_proj = (getattr(self, f"{name}{suffix}") for name in ("conv1d", "x_proj", "dt_proj"))
            read = x.flip(1) if backward else x
            u = F.silu(conv1d(read.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
            low_rank, b, c = x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
            delta = dt_proj(low_rank)
            if aligned:  # a token without input: the bias, and whatever an adapter adds to it
                biases.append(dt_proj(low_rank.new_zeros(1, 1, self.dt_rank)).flatten())
                delta = delta - biases[-1]
            directions.append([t.flip(1) if backward else t for t in (u, delta, b, c)])
        u, delta, b, c = map(torch.stack, zip(*directions, strict=True))
        return u, delta, b, c, torch.stack(biases) if aligned else None

    def train(self, mode: bool = True) -> "BiMamba":
        """Between training and evaluation parameters change."""
        self._laid_out = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_laid_out": None}

    def _layout(self, dtype: torch.dtype) -> ops.Layout:
        """The parameters in the kernels' layout: copied when one of them has changed, not at every call.

        A change is seen by the tensors' versions, and expected after a pass with gradients (fused optimisers leave the
        versions as they are) and after ``train`` or ``eval``. What writes to ``parameter.data`` has to call one of
        these.
        """
        # Not named_parameters(), which would take longer than what it saves.
        parameters = [self.A_log, self.A_b_log, self.D, self.D_b]
        for name in INNER:
            parameters += [p for p in getattr(self, name)._parameters.values() if p is not None]
        if torch.compiler.is_compiling() or any(p.is_inference() for p in parameters):
            return self._lay_out(dtype)
        key = (dtype, *((p.data_ptr(), p._version, p.dtype) for p in parameters))
        if self._laid_out is None or self._laid_out[0] != key:
            self._laid_out = key, self._lay_out(dtype)
        return self._laid_out[1]

    def _lay_out(self, dtype: torch.dtype) -> ops.Layout:
        return ops.lay_out(
            self._both("conv1d", "weight").squeeze(2),
            self._both("conv1d", "bias"),
            self._both("x_proj", "weight"),
            self._both("dt_proj", "weight"),
            self._both("dt_proj", "bias"),
            self._a(),
            torch.stack([self.D, self.D_b]),
            dtype,
        )

    def _a(self) -> Tensor:
        """The state matrix of both directions, (G, E, N), negative, in float32 (float64 for float64)."""
        logarithms = torch.stack([self.A_log, self.A_b_log])
        return -torch.exp(logarithms.to(torch.promote_types(logarithms.dtype, torch.float32)))

    def _both(self, module: str, parameter: str) -> Tensor:
        """A parameter of the forward and of the backward direction, stacked: (G, *)."""
        modules = (getattr(self, module), getattr(self, f"{module}_b"))
        return torch.stack([getattr(m, parameter) for m in modules])


def _timescale_projection(dt_rank: int, d_inner: int) -> nn.Linear:
    """Low rank -> Δ before softplus; the bias starts where softplus gives Δ log-uniform in [0.001, 0.1]."""
    projection = nn.Linear(dt_rank, d_inner)
    nn.init.uniform_(projection.weight, -(dt_rank**-0.5), dt_rank**-0.5)
    delta = torch.exp(torch.empty(d_inner).uniform_(math.log(0.001), math.log(0.1))).clamp(min=1e-4)
    with torch.no_grad():
        projection.bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # inverse of softplus
    return projection


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """The authors' decay rule: 0 for the first block, then linearly from 0 to just under ``rate``."""
    return [rate * max(block - 1, 0) / max(depth - 1, 1) for block in range(depth)]


def initialise(model: nn.Module, depth: int) -> None:
    """The authors' initialisation of what is not a Mamba parameter; output projections shrink with depth."""
    for name, parameter in model.named_parameters():
        if name.endswith("out_proj.weight"):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            with torch.no_grad():
                parameter.div_(math.sqrt(depth))
        elif name in ("pos_embed", "cls_token", "head.weight"):
            nn.init.trunc_normal_(parameter, std=0.02)
        elif name == "head.bias":
            nn.init.zeros_(parameter)
