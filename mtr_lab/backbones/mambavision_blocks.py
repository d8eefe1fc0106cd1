"""The blocks of MambaVision: convolutions on maps, and Mamba or attention among the tokens of a window."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtr_lab import ops
from mtr_lab.backbones.costs import Costs
from mtr_lab.backbones.drop_path import DropPath
from mtr_lab.backbones.norms import LayerNorm
from mtr_lab.backbones.plain import as_built, is_plain
from mtr_lab.backbones.stage import Block
from mtr_lab.tokens import PATHS, Evidence, Layout, ScanPath
from mtr_lab.tokens.gather import take, take_or_zero
from mtr_lab.tokens.positions import Positions

WIDTH = 3
"""Taps of the convolutions."""


class PatchEmbed(nn.Module):
    """The stem: two convolutions of stride 2."""

    def __init__(self, channels: int, in_dim: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, wider in ((channels, in_dim), (in_dim, dim)):
            layers += [nn.Conv2d(width, wider, 3, 2, 1, bias=False), nn.BatchNorm2d(wider, eps=1e-4), nn.ReLU()]
        self.conv_down = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, dim, ⌈H / 4⌉, ⌈W / 4⌉)."""
        return self.conv_down(images)


class Downsample(nn.Module):
    """A convolution of stride 2 that doubles the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, rows, columns) -> (B, 2C, ⌈rows / 2⌉, ⌈columns / 2⌉)."""
        return self.reduction(maps)


class Level(nn.Module):
    """The blocks of a stage, and what follows them."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: Downsample | None) -> None:
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample


class ConvBlock(nn.Module):
    """Two convolutions of a map, added to it."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(dim, dim, 3, 1, 1), nn.BatchNorm2d(dim)
        self.act1 = nn.GELU(approximate="tanh")
        self.conv2, self.norm2 = nn.Conv2d(dim, dim, 3, 1, 1), nn.BatchNorm2d(dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, rows, columns) -> the same shape."""
        hidden = self.act1(self.norm1(self.conv1(maps)))
        return maps + self.drop_path(self.norm2(self.conv2(hidden)))


class MambaVisionMixer(nn.Module):
    """One half of the channels is convolved and scanned forward, the other half only convolved; both are projected.

    The convolutions are centred, not causal. The scan has no gate. Its Δ gets the bias of ``dt_proj`` twice, as in the
    authors' code, with which the weights were trained.

    Args:
        d_model: width C; the scan has E = C / 2 channels.
        d_state: N, states a channel.

    Source: Hatamizadeh and Kautz, "MambaVision", arXiv 2407.08083, equation 6.
    """

    paths = (PATHS["forward"],)
    reads_neighbours = True

    def __init__(self, d_model: int, d_state: int) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_inner = d_model, d_state, d_model // 2
        self.dt_rank = math.ceil(d_model / 16)
        self.merged_width = d_model
        self.in_proj = nn.Linear(d_model, d_model, bias=False)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.conv1d_x, self.conv1d_z = (self._convolution() for _ in range(2))

    def _convolution(self) -> nn.Conv1d:
        return cast(nn.Conv1d, as_built(nn.Conv1d(self.d_inner, self.d_inner, WIDTH, groups=self.d_inner, bias=False)))

    def forward(self, hidden: Tensor, positions: Positions, needs: Sequence[str] = ()) -> tuple[Tensor, Evidence]:
        """Mix the tokens: (B, L, C) -> (B, L, C), and the requested evidence."""
        u, z = self._convolve(self.in_proj(hidden), positions)
        low_rank, b, c = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta, bias = self.dt_proj(low_rank), cast(Tensor, self.dt_proj.bias)
        options = positions.scan_arguments(self.paths)
        if options["gap"] is not None:  # over a gap the state decays as over tokens whose Δ is the bias, here twice
            delta, bias = delta - bias, 2 * bias
        A, D = ops.state_matrix([self.A_log]), self.D[None]
        stats = tuple(name for name in needs if name in ops.STATS)
        y, sums = ops.selective_scan(
            u[None], delta[None], A, b[None], c[None], D, delta_bias=bias[None], stats=stats, **options
        )
        b, c = (t[:, None] if name in needs else None for name, t in (("b", b), ("c", c)))
        evidence = Evidence(sums.detach().transpose(0, 1), stats, self.d_inner, b, c, (self.paths[0].name,))
        mixed, evidence = positions.merged(torch.cat([y, z], dim=-1), evidence)
        return self.out_proj(mixed), evidence

    def _convolve(self, xz: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Both halves of the channels, (B, L, E) each, after their convolution and SiLU."""
        near, convs = positions.neighbours(), (self.conv1d_x, self.conv1d_z)
        index, source = near["index"], near["source"]
        if source is not None and all(map(is_plain, convs)):
            # A causal convolution that is read one position later. The last position has zeros behind it.
            weight = torch.cat([self.conv1d_x.weight, self.conv1d_z.weight]).transpose(0, 1)
            after = {"index": index + WIDTH // 2, "source": F.pad(source, (0, WIDTH // 2), value=-1)}
            convolved = ops.causal_conv1d(xz, weight, weight.new_zeros(1, self.d_model), **after)[0]
            x, z = convolved.chunk(2, dim=-1)
            return x, z
        xz = xz if source is None else take_or_zero(xz, source)
        halves = xz.chunk(2, dim=-1)
        x, z = (F.silu(_centred(half.mT, conv)).mT for conv, half in zip(convs, halves, strict=True))
        return (x, z) if source is None else (take(x, index), take(z, index))

    def costs(self, tokens: int, layout: Layout, paths: Sequence[ScanPath], *, projected: int | None = None) -> Costs:
        """Costs of one sequence of ``tokens`` tokens, ``projected`` of them in out_proj."""
        width, inner, rank, states = self.d_model, self.d_inner, self.dt_rank, self.d_state
        projections = width**2 * (tokens + (tokens if projected is None else projected))
        products = projections + tokens * (WIDTH * width + inner * (rank + 2 * states + rank))
        scan = tokens * inner * (9 * states + 2)
        return Costs.products(products) + Costs(scan, scan, tokens * inner * states)


def _centred(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """A convolution of x (B, E, L) that keeps the length."""
    output: Tensor = conv(x if conv.padding == "same" else F.pad(x, (WIDTH // 2, WIDTH // 2)))
    return output


class Attention(nn.Module):
    """Attention among the tokens of a window; a merged token counts as often as the tokens that it stands for."""

    paths: tuple[ScanPath, ...] = ()

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, hidden: Tensor, positions: Positions, needs: Sequence[str] = ()) -> tuple[Tensor, Evidence]:
        """Mix the tokens: (B, L, C) -> (B, L, C), without evidence."""
        state = positions.state
        assert state is not None
        q, k, v = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        whole = state.layout is not None and hidden.shape[1] == state.layout.tokens
        mixed = ops.attention(q, k, v, None if whole else state.size)
        return self.proj(mixed.transpose(1, 2).flatten(2)), Evidence.none(hidden)

    def costs(self, tokens: int, layout: Layout, paths: Sequence[ScanPath]) -> Costs:
        """Costs of one sequence of ``tokens`` tokens."""
        width = self.proj.in_features
        return Costs.products(4 * tokens * width**2 + 2 * tokens**2 * width)


class MambaVisionBlock(Block):
    """A mixer and an MLP, with the authors' names; the scale of their outputs is a parameter in some models."""

    def __init__(
        self, mixer: nn.Module, dim: int, mlp_ratio: float, drop_path: float, layer_scale: float | None
    ) -> None:
        hidden = int(dim * mlp_ratio)
        layers = (("fc1", nn.Linear(dim, hidden)), ("act", nn.GELU()), ("fc2", nn.Linear(hidden, dim)))
        super().__init__(mixer, LayerNorm(dim), nn.Sequential(OrderedDict(layers)), LayerNorm(dim), drop_path)
        self.norm1, self.norm2 = self._modules.pop("norm"), self._modules.pop("mlp_norm")
        scales = (None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2))
        self.gamma_1, self.gamma_2 = scales

    @property
    def norm(self) -> Any:  # type: ignore[override]
        """``norm1``."""
        return self.norm1

    @property
    def mlp_norm(self) -> Any:  # type: ignore[override]
        """``norm2``."""
        return self.norm2

    def mix(self, normed: Tensor, positions: Positions, needs: Sequence[str] = ()) -> tuple[Tensor, Evidence]:
        """The mixer's output, scaled, and its evidence."""
        hidden, evidence = super().mix(normed, positions, needs)
        return hidden if self.gamma_1 is None else hidden * self.gamma_1, evidence

    def transform(self, normed: Tensor) -> Tensor:
        """The MLP's output, scaled."""
        hidden = super().transform(normed)
        return hidden if self.gamma_2 is None else hidden * self.gamma_2


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation of the sum of the hidden and the residual stream."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, residual: Tensor | None = None, plan: ops.Plan | None = None
    ) -> tuple[Tensor, Tensor]:
        """Two streams (B, L, C) -> normed and residual, (B, M, C)."""
        if plan is not None:
            hidden, residual = ops.reduce_streams(plan, hidden, residual)
        stream = hidden if residual is None else hidden + residual
        normed = super().forward(stream.to(self.weight.dtype).mT[..., None])[..., 0].mT
        return normed, stream
