"""The bidirectional Mamba block the families share: norm, mixer, reduction step.

Parameter names are the upstream ones (Vim's ``bimamba_type="v2"``, VideoMamba's ``bimamba=True``), so that the
authors' checkpoints load strictly.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtr_lab import ops
from mtr_lab.backbones.drop_path import DropPath
from mtr_lab.backbones.plain import as_built, is_plain
from mtr_lab.backbones.token_state import Evidence, TokenState

INNER = ("conv1d", "conv1d_b", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b")
"""The modules of a mixer whose parameters are used without calling them, unless a hook or an adapter is on one."""


class Step(Protocol):
    """A reduction step attached to a block: reads the block's state and evidence, returns a shorter state."""

    remove: int
    """How many tokens to remove from each image; the step rests at 0."""
    needs: tuple[str, ...]
    """The evidence to collect, names from ``mtr_lab.ops.STATS`` and ``"b"``, ``"c"``."""

    def __call__(self, state: TokenState, evidence: Evidence) -> TokenState: ...


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
        self.packed = ops.PackedCache()

    def forward(
        self,
        hidden: Tensor,
        *,
        order: Tensor | None = None,
        gap: Tensor | None = None,
        stretch: Tensor | None = None,
        needs: Sequence[str] = (),
    ) -> tuple[Tensor, Evidence]:
        """Mix the tokens: (B, L, C) -> (B, L, C), and the evidence asked for.

        Args:
            hidden: normalised tokens, (B, L, C).
            order, gap, stretch: as in ``mtr_lab.ops.selective_scan``.
            needs: evidence to collect, names from ``mtr_lab.ops.STATS`` and ``"b"``, ``"c"``.
        """
        xz = self.in_proj(hidden)
        stats = tuple(name for name in needs if name in ops.STATS)
        options: Any = {"reverse": self.reverse, "order": order, "gap": gap, "stretch": stretch, "stats": stats}
        inner = [getattr(self, name) for name in INNER]
        scale = 0.5 if self.halve else 1.0
        if all(map(is_plain, inner)):
            y, sums, b, c = ops.mamba_inner(xz, self._weights(inner), scale=scale, packed=self.packed, **options)
        else:
            self.packed.clear()
            x, z = xz.chunk(2, dim=-1)
            u, delta, b, c, bias = self._projected_by_modules(x, gap is not None)
            A, D = ops.state_matrix((self.A_log, self.A_b_log)), torch.stack([self.D, self.D_b])
            y, sums = ops.selective_scan(u, delta, A, b, c, D, z=z, delta_bias=bias, **options)
            y = y if scale == 1 else y * scale
        evidence = Evidence(
            sums.detach().transpose(0, 1),
            stats,
            self.d_inner,
            b.transpose(0, 1) if "b" in needs else None,
            c.transpose(0, 1) if "c" in needs else None,
        )
        return self.out_proj(y), evidence

    def _weights(self, inner: Sequence[Any]) -> ops.MambaWeights:
        """The parameters of both directions, those of the modules ``INNER`` among them."""
        conv1d, conv1d_b, x_proj, x_proj_b, dt_proj, dt_proj_b = inner
        return ops.MambaWeights(
            conv_weight=(conv1d.weight, conv1d_b.weight),
            conv_bias=(conv1d.bias, conv1d_b.bias),
            x_proj=(x_proj.weight, x_proj_b.weight),
            dt_proj=(dt_proj.weight, dt_proj_b.weight),
            dt_bias=(dt_proj.bias, dt_proj_b.bias),
            A_log=(self.A_log, self.A_b_log),
            D=(self.D, self.D_b),
        )

    def _projected_by_modules(self, x: Tensor, aligned: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """What the scan reads, by calling the modules of each direction, as the authors do: hooks and adapters act.

        Tokens (B, L, E) -> u and Δ, (G, B, L, E), B and C, (G, B, L, N), and the bias, (G, E). Δ comes with its bias,
        which is returned apart only where the scan is ``aligned`` and needs it.
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
        """Drops the packed weights: parameters may have changed."""
        self.packed.clear()
        return super().train(mode)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the sum of the hidden and the residual stream."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(
        self, hidden: Tensor, residual: Tensor | None = None, plan: ops.Plan | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, L, C) twice -> (normed, residual), (B, M, C) each, as ``mtr_lab.ops.rms_norm_add``."""
        return ops.rms_norm_add(hidden, residual, self.weight, self.eps, plan=plan)


class Block(nn.Module):
    """Add, normalise, mix, and reduce where a step is attached.

    ``step`` is set and removed by ``mtr_lab.reduction``; ``align`` makes the scan decay its state over the
    places of tokens that are gone, ``stretch`` multiplies Δ of a token by its size to that power.
    """

    def __init__(self, mixer: BiMamba, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = RMSNorm(mixer.d_model)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.step: Step | None = None
        self.align = False
        self.stretch = 0.0

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        index: Tensor,
        size: Tensor,
        special: Tensor,
        source: Tensor | None = None,
        plan: ops.Plan | None = None,
    ) -> TokenState:
        """The parts of one ``TokenState`` -> the next: ``block(*state)``, so that hooks on blocks see tensors."""
        size = size.detach()  # a reentrant checkpoint calls every floating-point output of a block differentiable
        normed, residual = self.norm(self.drop_path(hidden), residual, plan)
        gap = None
        if self.align:
            missing = index.diff(dim=1) - 1
            gap = F.pad(torch.stack([missing, missing.flip(1)], dim=1), (1, 0))
        step = self.step if self.step is not None and self.step.remove > 0 else None
        stretch = size**self.stretch if self.stretch else None
        hidden, evidence = self.mixer(normed, gap=gap, stretch=stretch, needs=step.needs if step else ())
        state = TokenState(hidden, residual, index, size, special, source)
        return step(state, evidence) if step else state


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
