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
from mtr_lab.backbones.initialisation import timescale_projection
from mtr_lab.backbones.plain import as_built, is_plain, project
from mtr_lab.tokens import PATHS, Evidence, Layout, ScanPath
from mtr_lab.tokens.gather import take, take_or_zero
from mtr_lab.tokens.positions import Positions

INNER = ("conv1d", "x_proj", "dt_proj")
"""The modules of a direction. Their parameters are used directly; modules with a hook or an adapter are called."""
SUFFIX = {"forward": "", "backward": "_b"}
"""By direction: the suffix of the names of its modules and parameters."""


class BiMamba(nn.Module):
    """Mamba mixer with a forward and a backward scan over one input projection.

    Args:
        d_model: width C of the token stream.
        d_state: N, states a channel.
        average_directions: divide the sum of the two directions by two, as in Vim (not in VideoMamba).
        d_conv: width of the causal convolution.
        expand: d_inner = expand · d_model.

    Source: Zhu et al., "Vision Mamba", arXiv 2401.09417, algorithm 1.
    """

    paths = (PATHS["forward"], PATHS["backward"])
    reads_neighbours = reads_tokens = True

    def __init__(
        self, d_model: int, d_state: int, *, average_directions: bool, d_conv: int = 4, expand: int = 2
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16)
        self.merged_width = self.d_inner
        self.average_directions = average_directions
        self.in_proj = as_built(nn.Linear(d_model, 2 * self.d_inner, bias=False))
        for suffix in SUFFIX.values():
            conv = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1)
            x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
            dt_proj = timescale_projection(self.dt_rank, self.d_inner)
            for name, module in (("conv1d", conv), ("x_proj", x_proj), ("dt_proj", dt_proj)):
                self.add_module(f"{name}{suffix}", as_built(module))
        states = torch.arange(1, d_state + 1, dtype=torch.float32).expand(self.d_inner, d_state)
        self.A_log = nn.Parameter(states.log())
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.A_b_log = nn.Parameter(states.log())
        self.D_b = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = as_built(nn.Linear(self.d_inner, d_model, bias=False))
        self.packed = ops.PackedCache()

    def forward(
        self, hidden: Tensor, positions: Positions | None = None, needs: Sequence[str] = ()
    ) -> tuple[Tensor, Evidence]:
        """Mix the tokens: (B, L, C) -> (B, L, C), or of ``positions.read`` (B, S, C), and the requested evidence.

        Args:
            hidden: normalised tokens, (B, L, C).
            positions: of the tokens; ``None`` for an unreduced sequence.
            needs: evidence to collect, names from ``mtr_lab.ops.STATS`` and ``"b"``, ``"c"``.
        """
        positions = positions or Positions()
        paths = positions.select_paths(self.paths)
        if positions.read is not None:
            return project(self.out_proj, self._read(hidden, positions, paths, positions.read)), Evidence.none(hidden)
        stats = tuple(name for name in needs if name in ops.STATS)
        options = {**positions.scan_arguments(paths), "stats": stats}
        xz = project(self.in_proj, hidden)
        inner = [[getattr(self, name + SUFFIX[path.name]) for path in paths] for name in INNER]
        neighbours = positions.neighbours()
        scale = 0.5 if self.average_directions else 1.0
        if all(is_plain(module) for modules in inner for module in modules):
            weights = self._weights(paths, *inner)
            y, sums, b, c = ops.mamba_inner(xz, weights, scale=scale, packed=self.packed, **neighbours, **options)
        else:
            self.packed.clear()
            x, z = xz.chunk(2, dim=-1)
            aligned = options["gap"] is not None
            u, delta, b, c, bias = self._projected_by_modules(x, paths, *inner, aligned=aligned, **neighbours)
            A_log, D = self._states(paths)
            A = ops.state_matrix(A_log)
            y, sums = ops.selective_scan(u, delta, A, b, c, torch.stack(D), z=z, delta_bias=bias, **options)
            y = y if scale == 1 else y * scale
        evidence = Evidence(
            sums.detach().transpose(0, 1),
            stats,
            self.d_inner,
            b.transpose(0, 1) if "b" in needs else None,
            c.transpose(0, 1) if "c" in needs else None,
            tuple(path.name for path in paths),
        )
        y, evidence = positions.merged(y, evidence)
        return project(self.out_proj, y), evidence

    def _read(self, hidden: Tensor, positions: Positions, paths: Sequence[ScanPath], read: Tensor) -> Tensor:
        """The input (B, S, E) of out_proj, for the tokens at ``read`` (B, S) alone."""
        if is_plain(self.in_proj):
            x, z = (
                ops.linear(tokens, weight)
                for tokens, weight in zip((hidden, take(hidden, read)), self.in_proj.weight.chunk(2), strict=True)
            )
        else:
            x, z = self.in_proj(hidden).chunk(2, dim=-1)
            z = take(z, read)
        options, neighbours = positions.scan_arguments(paths), positions.neighbours()
        inner = [[getattr(self, name + SUFFIX[path.name]) for path in paths] for name in INNER]
        scale = 0.5 if self.average_directions else 1.0
        if all(is_plain(module) for modules in inner for module in modules):
            weights = self._weights(paths, *inner)
            return ops.mamba_inner_read(x, z, read, weights, scale=scale, packed=self.packed, **neighbours, **options)
        aligned = options["gap"] is not None
        u, delta, b, c, bias = self._projected_by_modules(x, paths, *inner, aligned=aligned, **neighbours)
        A_log, D = self._states(paths)
        y, _ = ops.selective_scan(u, delta, ops.state_matrix(A_log), b, c, torch.stack(D), delta_bias=bias, **options)
        return ops.gated(y, z, read, scale)

    def costs(
        self,
        tokens: int,
        layout: Layout,
        paths: Sequence[ScanPath],
        *,
        projected: int | None = None,
        read: int | None = None,
    ) -> Costs:
        """Costs of one sequence of ``tokens`` tokens, scanned along ``paths``.

        The literature counts a single direction, and the padding of the convolution, too.

        Args:
            tokens, layout, paths: as in ``Mixer.costs``.
            projected: the number of tokens in out_proj, by default all.
            read: the number of tokens whose output alone is read.
        """
        width, inner, rank, states = self.d_model, self.d_inner, self.dt_rank, self.d_state
        directions = len(paths)
        scanned, scan = directions * tokens, directions * tokens * inner * (9 * states + 2)
        projections = 2 * tokens + (tokens if projected is None else projected)  # in_proj and out_proj
        if read is not None:
            projections = tokens + 2 * read
            if ops.reads_one_token(read, [path.reverse for path in paths]):
                scanned = tokens + 1
                scan = inner * (ops.STATE_FLOPS * scanned * states + directions * (ops.OUTPUT_FLOPS * states + 2))
        products = scanned * inner * (self.d_conv + rank + 2 * states + rank)  # conv1d, x_proj, dt_proj
        padding = self.d_conv * inner * (self.d_conv - 1)
        return Costs(
            flops=2 * (width * inner * projections + products) + scan,
            literature=width * inner * projections + (products + scan) // max(directions, 1) + padding,
            exponentials=scanned * inner * states,
        )

    def _weights(self, paths: Sequence[ScanPath], conv1d: Any, x_proj: Any, dt_proj: Any) -> ops.MambaWeights:
        """The parameters of these directions, with those of their modules ``INNER``."""
        A_log, D = self._states(paths)
        return ops.MambaWeights(
            conv_weight=[module.weight for module in conv1d],
            conv_bias=[module.bias for module in conv1d],
            x_proj=[module.weight for module in x_proj],
            dt_proj=[module.weight for module in dt_proj],
            dt_bias=[module.bias for module in dt_proj],
            A_log=A_log,
            D=D,
        )

    def _states(self, paths: Sequence[ScanPath]) -> tuple[list[Tensor], list[Tensor]]:
        """A_log and D of these directions."""
        suffixes = [SUFFIX[path.name] for path in paths]
        return [getattr(self, f"A{s}_log") for s in suffixes], [getattr(self, f"D{s}") for s in suffixes]

    def _projected_by_modules(
        self,
        x: Tensor,
        paths: Sequence[ScanPath],
        *inner: list[Any],
        aligned: bool,
        index: Tensor | None,
        source: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """The inputs of the scan, computed by calling the modules of each direction, so that hooks and adapters run.

        Tokens (B, L, E) -> u and Δ, (G, B, L, E), B and C, (G, B, L, N), and the bias of Δ, (G, E). Δ contains its
        bias, unless the scan is ``aligned`` and needs the bias separately. ``index`` and ``source`` are as in
        ``mtr_lab.ops.causal_conv1d``.
        """
        directions, biases = [], []
        x = x if source is None else take_or_zero(x, source)
        for path, conv1d, x_proj, dt_proj in zip(paths, *inner, strict=True):
            tokens = x.flip(1) if path.reverse else x
            u = F.silu(conv1d(tokens.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
            if index is not None:  # in reading order
                u = take(u, x.shape[1] - 1 - index.flip(1) if path.reverse else index)
            low_rank, b, c = x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
            delta = dt_proj(low_rank)
            if aligned:  # Δ of a token without input: the bias, with what an adapter adds to it
                biases.append(dt_proj(low_rank.new_zeros(1, 1, self.dt_rank)).flatten())
                delta = delta - biases[-1]
            directions.append([t.flip(1) if path.reverse else t for t in (u, delta, b, c)])
        u, delta, b, c = map(torch.stack, zip(*directions, strict=True))
        return u, delta, b, c, torch.stack(biases) if aligned else None

    def train(self, mode: bool = True) -> "BiMamba":
        """Drops the packed weights: parameters may have changed."""
        self.packed.clear()
        return super().train(mode)
