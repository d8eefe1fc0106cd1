"""Blocks, and the stages they form."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from mtr_lab import ops
from mtr_lab.backbones.costs import Costs, linear_costs
from mtr_lab.backbones.drop_path import DropPath
from mtr_lab.tokens import Evidence, Layout, ScanPath, TokenState
from mtr_lab.tokens.positions import Positions


class BlockReduction(Protocol):
    """What a policy attaches to a block."""

    @property
    def aligned(self) -> bool:
        """Whether the scan's state decays over the places of removed tokens."""

    @property
    def size_exponent(self) -> float:
        """Δ of a token is multiplied by its size to this power."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The evidence to collect, names of ``mtr_lab.ops.STATS`` and ``"b"``, ``"c"``; none where nothing goes."""

    @property
    def choose_paths(self) -> Callable[[Sequence[ScanPath]], Sequence[ScanPath]] | None:
        """Picks the paths to scan from a mixer's own; ``None`` for all of them."""

    def after_mixer(self, state: TokenState, evidence: Evidence) -> tuple[TokenState, Evidence]:
        """The tokens after the mixer, reduced if some go, and their evidence if anything still reads it."""

    def around_mlp(self, state: TokenState, evidence: Evidence) -> ops.Plan | None:
        """The plan by which tokens are merged for the MLP alone; ``None`` for none."""


class Mixer(Protocol):
    """What mixes the tokens of a block: a module."""

    paths: tuple[ScanPath, ...]
    """The directions in which it scans, none if it shows no evidence (attention)."""
    # And ``reads_grid = True`` if it convolves over the grid: then ``source`` is tracked where tokens are reduced.

    def __call__(self, hidden: Tensor, positions: Positions, needs: Sequence[str] = ()) -> tuple[Tensor, Evidence]:
        """Normalised tokens (B, L, C) -> mixed ones, and the evidence asked for, ``Evidence.none`` without a scan."""

    def costs(self, tokens: int, layout: Layout, paths: Sequence[ScanPath]) -> Costs:
        """Costs of one sequence with ``tokens`` of the tokens of ``layout`` left, scanned along ``paths``."""


class Block(nn.Module):
    """Add, normalise, mix, reduce where a policy is attached, and if there is an MLP: add, normalise, transform.

    Args:
        mixer: see :class:`Mixer`.
        norm: of (hidden, residual, plan) to (normed, residual), see ``mtr_lab.backbones.norms``.
        mlp, mlp_norm: the second half of the block, if it has one.
        drop_path: how often, while training, what enters the block is not added to the residual stream: the output of
            the block before, as in the authors' code of Vim, and with an MLP that of this block's mixer too.
    """

    reduction: BlockReduction | None
    """What a policy attaches; set and removed by ``mtr_lab.reduction``."""

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
    ) -> TokenState:
        """The parts of one ``TokenState`` -> the next: ``block(*state)``, so that hooks on blocks see tensors."""
        size = size.detach()  # a reentrant checkpoint calls every floating-point output of a block differentiable
        normed, residual = self.norm(self.drop_path(raw_hidden), raw_residual, pending)
        state = TokenState(normed, residual, index, size, special, source, None, layout, offset)
        reduction = self.reduction
        if reduction is None:
            hidden, evidence = self.mixer(normed, Positions(state))
        else:
            positions = Positions(state, reduction.aligned, reduction.size_exponent, reduction.choose_paths)
            hidden, evidence = self.mixer(normed, positions, reduction.needs)
        state = state.with_streams(hidden, residual)
        if reduction is not None:
            state, evidence = reduction.after_mixer(state, evidence)
        return state if self.mlp is None else self._transformed(state, evidence)

    def _transformed(self, state: TokenState, evidence: Evidence) -> TokenState:
        """The second half: the MLP, on fewer tokens where a policy merges them for it alone."""
        assert self.mlp is not None
        assert self.mlp_norm is not None
        plan = None if self.reduction is None else self.reduction.around_mlp(state, evidence)
        normed, residual = self.mlp_norm(self.drop_path(state.raw_hidden), state.raw_residual, state.pending)
        if plan is None:
            return state.with_streams(self.mlp(normed), residual)
        merged = self.mlp(ops.apply_plan(normed, *plan[:5]))
        rows = plan.dest.clamp(min=0)[..., None].expand(-1, -1, merged.shape[2])
        return state.with_streams(merged.gather(1, rows).masked_fill((plan.dest < 0)[..., None], 0), residual)

    def costs(self, mixed: int, transformed: int, layout: Layout, paths: Sequence[ScanPath] | None = None) -> Costs:
        """Of one sequence.

        Args:
            mixed: how many tokens the mixer is given.
            transformed: how many the MLP is given, if there is one.
            layout: of the unreduced tokens.
            paths: those that are scanned, by default all of the mixer's.
        """
        own: Costs = self.mixer.costs(mixed, layout, self.mixer.paths if paths is None else paths)
        return own if self.mlp is None else own + linear_costs(self.mlp, transformed)


@dataclass(frozen=True)
class Stage:
    """Blocks whose tokens lie on one grid."""

    blocks: Sequence[Block]
    width: int
    """Channels C of a token."""
    stride: int
    """Pixels between the patches of neighbouring tokens."""
    patch_size: int
    """Pixels of a patch's side."""
