"""Blocks and stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from mtr_lab import ops
from mtr_lab.backbones.costs import Costs, linear_costs
from mtr_lab.backbones.drop_path import DropPath
from mtr_lab.tokens import Evidence, Layout, ScanPath, TokenState
from mtr_lab.tokens.gather import take_or_zero
from mtr_lab.tokens.positions import Positions


class BlockReduction(Protocol):
    """What ``patch`` attaches to a block."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The evidence to collect, names of ``mtr_lab.ops.STATS`` and ``"b"``, ``"c"``."""

    def positions(self, state: TokenState) -> Positions:
        """What the mixer is told about its tokens."""

    def after_mixer(self, state: TokenState, evidence: Evidence) -> TokenState:
        """The tokens after the mixer, reduced if some are removed."""

    def around_mlp(self, state: TokenState, evidence: Evidence) -> ops.Plan | None:
        """The plan that merges tokens for the MLP alone; ``None`` for no plan."""


class Mixer(Protocol):
    """The module of a block that mixes its tokens."""

    paths: tuple[ScanPath, ...]
    """The directions in which it scans; empty for a mixer that does not scan, and so has no evidence (attention)."""
    # A mixer that convolves over the grid has ``reads_grid = True``, too: a reduced model then tracks ``source``.
    # One that scans the tokens of ``positions.sample`` and spreads its output has ``samples_grid = True``, too: its
    # ``costs`` take ``scanned``, the number of tokens that are scanned.
    # A mixer that convolves along the sequence, over ``Positions.neighbours``, has ``reads_neighbours = True``.
    # One whose tokens may merge before its output projection, by ``Positions.merged``, has ``merged_width``, too, the
    # channels of the tokens that merge; its ``costs`` take ``projected``, the number of tokens in the projection.
    # One that returns the output (B, S, C) of the tokens at ``positions.read`` alone has ``reads_tokens = True``, too:
    # its ``costs`` take ``read``, their number.

    def __call__(self, hidden: Tensor, positions: Positions, needs: Sequence[str] = ()) -> tuple[Tensor, Evidence]:
        """Normalised tokens (B, L, C) -> mixed tokens and the requested evidence (``Evidence.none`` without a scan)."""

    def costs(self, tokens: int, layout: Layout, paths: Sequence[ScanPath]) -> Costs:
        """Costs of one sequence of ``tokens`` tokens, scanned along ``paths``, convolved over ``layout``'s grid."""


class Block(nn.Module):
    """Add, normalise, mix, reduce if a policy is attached; with an MLP then add, normalise, transform.

    Args:
        mixer: see ``Mixer``.
        norm: (hidden, residual, plan) -> (normed, residual), see ``mtr_lab.backbones.norms``.
        mlp, mlp_norm: the second half of the block, if it has one.
        drop_path: probability, while training, that an output is not added to the residual stream: that of the block
            before, as in Vim; of a block with an MLP, those of its mixer and its MLP.
    """

    reduction: BlockReduction | None
    """The policy's part in this block; set and removed by ``mtr_lab.reduction``."""

    def __init__(
        self,
        mixer: nn.Module,
        norm: nn.Module,
        mlp: nn.Module | None = None,
        mlp_norm: nn.Module | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.mixer: Any = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.mlp_norm, self.mlp = mlp_norm, mlp
        self.reduction = None

    def forward(
        self,
        raw_hidden: Tensor,
        raw_residual: Tensor | None,
        index: Tensor,
        size: Tensor,
        special: Tensor,
        source: Tensor | None = None,
        pending: ops.Plan | None = None,
        layout: Layout | None = None,
        offset: Tensor | None = None,
        grid: Layout | None = None,
        special_alone: bool = False,
        delta_scale: Tensor | None = None,
    ) -> TokenState:
        """The fields of a ``TokenState`` -> the next state: ``block(*state)``, so that hooks on blocks get tensors."""
        # A reentrant checkpoint marks all floating-point outputs of a block as differentiable.
        size, delta_scale = size.detach(), None if delta_scale is None else delta_scale.detach()
        hidden = self.drop_path(raw_hidden) if self.mlp is None else raw_hidden
        normed, residual = self.norm(hidden, raw_residual, pending)
        state = TokenState(
            normed, residual, index, size, special, source, None, layout, offset, grid, special_alone, delta_scale
        )
        reduction = self.reduction
        if reduction is None:
            hidden, evidence = self.mix(normed, Positions(state))
        else:
            positions = reduction.positions(state)
            hidden, evidence = self.mix(normed, positions, reduction.needs)
            hidden, residual = positions.streams(hidden, residual)
        state = self.settle(state.with_streams(hidden, residual))
        if reduction is not None:
            state = reduction.after_mixer(state, evidence)
        return state if self.mlp is None else self._transformed(state, evidence)

    def mix(self, normed: Tensor, positions: Positions, needs: Sequence[str] = ()) -> tuple[Tensor, Evidence]:
        """The mixer's output and evidence. A family that scales the output overrides it."""
        mixed: tuple[Tensor, Evidence] = self.mixer(normed, positions, needs)
        return mixed

    def transform(self, normed: Tensor) -> Tensor:
        """The MLP's output. A family that scales it overrides it."""
        assert self.mlp is not None
        transformed: Tensor = self.mlp(normed)
        return transformed

    def settle(self, state: TokenState) -> TokenState:
        """What a family does with the streams after the mixer, before the policy reduces them: here nothing."""
        return state

    def _transformed(self, state: TokenState, evidence: Evidence) -> TokenState:
        """The second half: the MLP, on merged tokens if the policy has a plan for it."""
        assert self.mlp_norm is not None
        plan = None if self.reduction is None else self.reduction.around_mlp(state, evidence)
        normed, residual = self.mlp_norm(self.drop_path(state.raw_hidden), state.raw_residual, state.pending)
        if plan is None:
            return state.with_streams(self.drop_path(self.transform(normed)), residual)
        merged = self.drop_path(self.transform(ops.apply_plan(normed, *plan[:5])))
        return state.with_streams(take_or_zero(merged, plan.dest), residual)

    def costs(
        self,
        mixed: int,
        transformed: int,
        layout: Layout,
        paths: Sequence[ScanPath] | None = None,
        *,
        scanned: int | None = None,
        projected: int | None = None,
        read: int | None = None,
    ) -> Costs:
        """The costs for one sequence.

        Args:
            mixed: the number of tokens in the mixer.
            transformed: the number of tokens in the MLP.
            layout: of the unreduced tokens, or of the full grid that a reduction has left.
            paths: the paths to scan, by default all of the mixer's.
            scanned: the number of tokens that the mixer scans, if these are not all.
            projected: the number of tokens in the mixer's output projection, if these are not all.
            read: the number of tokens whose output alone is read, if these are not all.
        """
        counts = {"scanned": scanned, "projected": projected, "read": read}
        options = {name: count for name, count in counts.items() if count is not None}
        costs: Costs = self.mixer.costs(mixed, layout, self.mixer.paths if paths is None else paths, **options)
        return costs if self.mlp is None else costs + linear_costs(self.mlp, transformed)


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks with tokens of one grid."""

    blocks: Sequence[Block]
    width: int
    """C, channels of a token."""
    stride: int
    """Pixels between the patches of neighbouring tokens."""
    patch_size: int
    """Pixels of a patch's side."""
