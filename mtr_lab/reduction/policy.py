"""A policy decides which tokens of a sequence are removed, and which survivors absorb them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from mtr_lab.backbones import Backbone, blocks_of
from mtr_lab.errors import UserError, unknown
from mtr_lab.policy_files import find_policy, policy_files, read_policy
from mtr_lab.reduction import counts, decision, lines
from mtr_lab.reduction.partial_blocks import SCANS, sampled_blocks
from mtr_lab.reduction.plan import Plan
from mtr_lab.reduction.scope import CLIP, FRAME
from mtr_lab.reduction.settings import BLOCK, BOTH, MLP, NO_INPUT, WHOLE, Settings
from mtr_lab.tokens import Evidence, Layout, TokenState


@dataclass(frozen=True)
class Policy(Settings):
    """What ``Settings`` describe: which models fit, how many tokens a step can remove, and which ones.

    A subclass may override ``__call__``, ``capacity`` and ``flops``.
    """

    def only_after_mixers(self) -> Self:
        """This policy without its parts at other places."""
        return replace(self, paths="all", input=NO_INPUT, last_block=WHOLE)

    def check(self, model: Backbone) -> None:
        """Raise a ``UserError`` if the model cannot provide what the policy reads."""
        name, scan = type(model).__name__, SCANS[self.paths]
        mixers = [block.mixer.paths for block in blocks_of(model) if block.mixer.paths]
        if self.needs and not mixers:
            raise UserError(
                f"mtr.score={self.score} reads the evidence of a scan, and {name} has no scan: choose another score."
            )
        if scan is not None and scan.samples and not any(sampled_blocks(model, scan)):
            raise UserError(
                f"mtr.paths={self.paths} scans one of each 2 x 2 tokens of every stage but the last, in mixers that "
                f"scan a grid along four paths, and {name} has none there: choose another policy."
            )
        if self.needs and self.directions != BOTH and scan is not None and scan.skips:
            raise UserError(
                f"mtr.directions={self.directions} with mtr.paths={self.paths}, which may skip that direction: set "
                "mtr.directions=both."
            )
        for paths in mixers:
            scanned = [path.name for path in (paths if scan is None else scan.choose(paths))]
            if self.needs and self.directions != BOTH and self.directions not in scanned:
                raise UserError(
                    f"mtr.directions={self.directions}: {name} scans {', '.join(scanned)}. Name one of these, or set "
                    "mtr.directions=both for all of them."
                )
        if self.scope == FRAME and len(model.input_shape) != 4:
            raise UserError(f"mtr.scope={FRAME}: {name} takes images here, and an image is one frame: set {CLIP}.")
        if self.cells is not None:
            self.cells.check(model)
        if self.merges_in_mlp and not any(block.mlp is not None for block in blocks_of(model)):
            raise UserError(f"mtr.merge_at={MLP}: the blocks of {name} have no MLP. Leave mtr.merge_at={BLOCK}.")
        if self.scoring.class_token and not all(layout.special for layout in model.layouts()):
            raise UserError(
                f"mtr.score={self.score} compares tokens with the class token, and {name} has none: choose another "
                "score, or a policy that does not need it (reduction=mtr, write, rmeeto, utr, hsa, …)."
            )

    def __call__(self, state: TokenState, evidence: Evidence, remove: int) -> Plan:
        """The plan that removes that many tokens of each sequence; L - ``remove`` survive.

        Raises:
            UserError: the sequence cannot lose ``remove`` tokens.
        """
        length, special = int(state.index.shape[1]), int(state.special.shape[1])  # tensors under torch.jit.trace
        if not self.keeps_grid and not counts.fits(self, length, special, remove):
            raise UserError(
                f"{self.policy} cannot remove {remove} of {length} tokens, {special} of them special: "
                f"at most {self.capacity(length, special)} can be removed."
            )
        return decision.decide(self, state, evidence, remove)

    def importance(self, state: TokenState, evidence: Evidence) -> Tensor:
        """The score of each token, (B, L) float32; higher is more important."""
        return decision.importance(self, state, evidence)

    def capacity(self, length: int, special: int) -> int:
        """The most tokens that one step can remove from ``length`` tokens, ``special`` special ones among them."""
        return counts.capacity(self, length, special)

    def possible(self, wanted: int, tokens: int, layout: Layout) -> int:
        """The most tokens, up to ``wanted``, that one step can remove from ``tokens`` of the tokens of a layout."""
        if self.keeps_grid:
            return max((n for n in lines.removals(tokens, layout) if n <= wanted), default=0)
        return min(wanted, self.capacity(tokens, len(layout.special)))

    def grid(self, layout: Layout, tokens: int) -> Layout:
        """The layout that convolutions over the grid are computed on when ``tokens`` remain of a layout."""
        return lines.cached_grids(layout)[tokens] if self.keeps_grid else layout

    def remaining(self, tokens: int, remove: int) -> int:
        """How many of ``tokens`` enter the next block if a block removes that many."""
        return tokens if self.merges_in_mlp else tokens - remove

    def flops(self, length: int, special: int, remove: int, channels: int, axes: int = 2) -> int:
        """True FLOPs of one reduction step on one sequence: similarities, and applying the plan to two streams.

        ``axes``: of the grid that the tokens stood on, for matching among neighbours.
        """
        return counts.flops(self, length, special, remove, channels, axes)

    def step_flops(self, tokens: int, layout: Layout, remove: int, channels: int) -> int:
        """True FLOPs of one reduction step on ``tokens`` of the tokens of a layout, for one sequence."""
        if self.keeps_grid and remove:
            flops = lines.flops(tokens, layout, remove, channels, merges=self.merging.into == "nearest")
        else:
            among = {"axes": len(layout.axes)} if self.matching == "neighbours" else {}
            flops = self.flops(tokens, len(layout.special), remove, channels, **among)
        return flops - 2 * remove * channels if self.merges_in_mlp else flops  # of one stream


def policy_names() -> tuple[str, ...]:
    """The policies of the package: the files in conf/reduction."""
    return tuple(policy_files())


def policy_config(policy: str | Path | Policy, /, **changes: Any) -> dict[str, Any]:
    """The configuration of a policy, with changes.

    Args:
        policy: the name of a policy of the package, the path of a YAML file, or a policy, which has no schedule and
            gets that of ``mtr``.

    Raises:
        UserError: an unknown policy or key, or a file that is not a policy's.
    """
    if isinstance(policy, Policy):
        config = read_policy(find_policy("mtr")) | {field.name: getattr(policy, field.name) for field in fields(policy)}
    else:
        config = read_policy(find_policy(policy))
    for key in changes:
        if key not in config:
            raise unknown(f"argument of policy {config['policy']}", key, config)
    return {**config, **changes}


def make_policy(config: Mapping[str, Any], kind: type[Policy] = Policy) -> Policy:
    """The policy that a configuration describes; keys of the schedule are ignored."""
    return kind(**{field.name: config[field.name] for field in fields(kind) if field.name in config})
