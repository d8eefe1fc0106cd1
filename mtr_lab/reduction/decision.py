"""The decision of a policy on one sequence: score → group → match → merge → order."""

import torch
from torch import Tensor

from mtr_lab import ops
from mtr_lab.reduction import lines, merge
from mtr_lab.reduction.counts import candidates
from mtr_lab.reduction.group import GROUPINGS, ascending
from mtr_lab.reduction.match import FEATURES, MATCHINGS, grid_axes
from mtr_lab.reduction.order import ORDERS
from mtr_lab.reduction.plan import Plan, make_plan
from mtr_lab.reduction.scope import CLIP, FRAME, ranks_in_frames
from mtr_lab.reduction.select import SELECTIONS
from mtr_lab.reduction.settings import BOTH, Settings
from mtr_lab.tokens import Evidence, TokenState
from mtr_lab.tokens.pooling import tokens_outside


def decide(settings: Settings, state: TokenState, evidence: Evidence, remove: int) -> Plan:
    """The plan that removes ``remove`` tokens of each sequence, a number that is possible; see ``counts``."""
    if settings.keeps_grid:
        return _by_lines(settings, state, evidence, remove)
    if _is_asymmetric(settings):
        return _asymmetric(settings, state, evidence, remove)
    if _is_among_neighbours(settings):
        return _among_neighbours(settings, state, evidence, remove)
    return _by_parts(settings, state, evidence, remove)


def importance(settings: Settings, state: TokenState, evidence: Evidence) -> Tensor:
    """The score of each token, (B, L) float32; higher is more important."""
    return ops.importance(*_terms(settings, state, evidence))


def _terms(settings: Settings, state: TokenState, evidence: Evidence) -> tuple[Tensor, float]:
    """The terms (B, K, L) whose sum over K is the score, and the divisor of that sum."""
    scoring = settings.scoring
    if settings.needs and settings.directions != BOTH:
        evidence = evidence.along(settings.directions)
    terms = scoring.function(state, evidence, **({"seed": settings.seed} if scoring.draws else {}))
    scale = evidence.channels if scoring.mean else 1
    divisor = float(-scale if settings.score.startswith("-") else scale)
    if settings.scope == FRAME:
        return ranks_in_frames(ops.importance(terms, divisor), state)[:, None], 1.0
    return terms, divisor


def _by_lines(settings: Settings, state: TokenState, evidence: Evidence, remove: int) -> Plan:
    """Every row, then every column of the grid loses tokens."""
    merging = settings.merging
    features = FEATURES[settings.features](state) if merging.into == "nearest" else None
    rule = lines.Rule(settings.window, MATCHINGS[settings.matching].cosine, merging.mass, merging.normalised)
    return lines.plan(state, remove, rule, features, importance(settings, state, evidence))


def _is_asymmetric(settings: Settings) -> bool:
    """Whether ``ops.asymmetric_plan`` makes these plans."""
    parts, into = (settings.grouping, settings.matching), settings.merging.into
    return parts == ("asymmetric", "cosine") and into in ("nearest", "nothing") and _is_plain(settings)


def _asymmetric(settings: Settings, state: TokenState, evidence: Evidence, remove: int) -> Plan:
    length, special = int(state.index.shape[1]), int(state.special.shape[1])
    _, _, targets = candidates(settings, length, special, remove)
    streams = _streams(settings, state) if settings.merging.into == "nearest" else (None, None)
    terms, metadata = _terms(settings, state, evidence), (state.index, state.size, state.special)
    return ops.asymmetric_plan(ops.DecisionInputs(*terms, *metadata, *streams, remove, targets, _by_size(settings)))


def _is_among_neighbours(settings: Settings) -> bool:
    """Whether ``ops.neighbour_plan`` makes these plans."""
    parts = settings.grouping, settings.matching
    into = settings.merging.into
    return parts == ("alternate", "neighbours") and into == "nearest" and settings.scope == CLIP and _is_plain(settings)


def _among_neighbours(settings: Settings, state: TokenState, evidence: Evidence, remove: int) -> Plan:
    factor, metadata = SELECTIONS[settings.selection], (state.index, state.size, state.special)
    score = importance(settings, state, evidence) if settings.selection == "score" else state.size
    weight = None if factor is None else factor(state, score)
    streams, by_size, axes = _streams(settings, state), _by_size(settings), grid_axes(state)
    return ops.neighbour_plan(ops.NeighbourInputs(*metadata, weight, *streams, remove, by_size, axes))


def _is_plain(settings: Settings) -> bool:
    """Whether all removed tokens go the same way, and the survivors keep their order: what fused decisions do."""
    return (
        settings.order == "index"
        and settings.merging.mass in (merge.equal, merge.by_size)
        and settings.merging.normalised
        and settings.prune_first == settings.prune_share == settings.zone == 0
    )


def _by_size(settings: Settings) -> bool:
    return settings.merging.mass is merge.by_size


def _streams(settings: Settings, state: TokenState) -> tuple[Tensor | None, Tensor | None]:
    """The streams whose sum are the features, ``None`` for one that is left out."""
    hidden = state.hidden if settings.features in ("stream", "hidden") else None
    residual = state.residual if settings.features in ("stream", "residual") else None
    return hidden, residual


def _by_parts(settings: Settings, state: TokenState, evidence: Evidence, remove: int) -> Plan:
    """Any grouping, matching, merge rule and order."""
    length, special = int(state.index.shape[1]), int(state.special.shape[1])
    first, sources, _ = candidates(settings, length, special, remove)
    grouping, merging, matching = GROUPINGS[settings.grouping], settings.merging, MATCHINGS[settings.matching]
    factor, merged = SELECTIONS[settings.selection], remove - first
    score = importance(settings, state, evidence)
    tokens = tokens_outside(state.special, length, settings.zone)
    if grouping.ranked or first:
        tokens = ascending(tokens, score)
    pruned, tokens = tokens[:, :first], tokens[:, first:]
    if first and not grouping.ranked:
        tokens = tokens.sort(dim=1).values

    source, target = grouping.split(tokens, merged, settings.target_fraction)
    if merging.compares(sources, merged):
        into, similarity = matching.match(state, FEATURES[settings.features](state), source, target)
        if source.shape[1] > merged:
            weight = None if factor is None else factor(state, score).gather(1, source)
            distance = ops.weighted_distance(similarity, weight, cosine=matching.cosine)
            if settings.scope == FRAME:
                distance = ranks_in_frames(distance, state, source)
            chosen = distance.argsort(dim=1, stable=True)[:, :merged]
            source, into = source.gather(1, chosen), into.gather(1, chosen)
    if merging.into == "one":
        target = target[:, :1]
        into = target.expand_as(source)
    elif merging.into == "nothing":
        into = torch.full_like(source, -1)

    source, into = torch.cat([pruned, source], dim=1), torch.cat([torch.full_like(pruned, -1), into], dim=1)
    key = ORDERS[settings.order](state, score, target, source)
    mass = merging.mass(state, score)
    plan = make_plan(source, into, key, mass)
    if not merging.normalised:
        plan = plan._replace(weight=(plan.dest >= 0).to(plan.weight.dtype))
    dropped = round(settings.prune_share * merged)
    if dropped == 0:
        return plan
    into = into.clone()
    into[:, first : first + dropped] = -1
    return make_plan(source, into, key, mass)._replace(residual=plan)
