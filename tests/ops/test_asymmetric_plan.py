"""The nearest target and the asymmetric decision against loops over tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mtr_lab import ops


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def positions(batch: int, length: int, count: int, seed: int = 0) -> torch.Tensor:
    return tokens(batch, length, seed=seed).argsort(1)[:, :count]


def test_nearest_equals_a_loop_over_pairs():
    features, places = tokens(2, 12, 5), positions(2, 12, 9)
    source, target = places[:, :4], places[:, 4:]
    into, similarity = ops.nearest(features, source, target)
    rows = features.double().numpy() / np.linalg.norm(features.double().numpy(), axis=-1, keepdims=True)
    for b, a in np.ndindex(source.shape):
        cosines = [rows[b, source[b, a]] @ rows[b, t] for t in target[b]]
        assert into[b, a] == target[b, int(np.argmax(cosines))]
        assert similarity[b, a].item() == pytest.approx(max(cosines), abs=1e-6)


def test_of_equally_near_targets_the_first_is_taken():
    features = torch.ones(1, 5, 3)
    into, _ = ops.nearest(features, torch.tensor([[0, 4]]), torch.tensor([[3, 1, 2]]))
    assert into.tolist() == [[3, 3]]


def test_nearest_is_a_registered_operator_without_a_gradient():
    features, places = tokens(2, 9, 4).requires_grad_(), positions(2, 9, 7)
    inputs = (features.detach(), places[:, :3], places[:, 3:])
    torch.library.opcheck(torch.ops.mtr_lab.nearest.default, (*inputs, "reference"))
    _, similarity = ops.nearest(features, *inputs[1:])
    assert not similarity.requires_grad
    with FlopCounterMode(display=False) as counter:
        ops.nearest(*inputs)
    assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 4


def decided(terms, scale, size, special, features, removed, targets, by_size):
    """For one image: the survivors, the merge target of each token, and its weight in the mean."""
    length = len(size)
    score = [sum(float(x) for x in terms[:, i]) / scale for i in range(length)]
    ranked = sorted((i for i in range(length) if i not in special), key=lambda i: (score[i], i))
    source, target = ranked[:removed], ranked[removed : removed + targets]
    into = {i: i for i in range(length) if i not in source}
    for i in source:
        if features is not None:
            unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
            into[i] = max(target, key=lambda t: unit[i] @ unit[t])
    mass = {i: size[i] if by_size else 1.0 for i in into}
    total = {j: sum(mass[i] for i in into if into[i] == j) for j in into.values()}
    return sorted(set(into) - set(source)), into, {i: mass[i] / total[into[i]] for i in into}


@settings(max_examples=20)
@given(length=st.integers(5, 40), special=st.integers(0, 2), by_size=st.booleans(), drop=st.booleans())
def test_asymmetric_plan_equals_a_loop_over_tokens(length, special, by_size, drop):
    removed = (length - special) // 3
    targets = (length - special - removed + 1) // 2
    terms, size = tokens(2, 2, length), torch.randint(1, 5, (2, length)).float()
    index, places = positions(2, 2 * length, length).sort(1).values, positions(2, length, special, seed=1)
    hidden, residual = (None, None) if drop else (tokens(2, length, 6, seed=2), tokens(2, length, 6, seed=3))
    inputs = terms, -2.0, index, size, places, hidden, residual, removed, targets, by_size
    plan = ops.asymmetric_plan(ops.DecisionInputs(*inputs))
    for b in range(2):
        features = None if hidden is None else (hidden + residual)[b].double().numpy()
        arguments = size[b].tolist(), places[b].tolist(), features, removed, targets, by_size
        keep, into, share = decided(terms[b].double().numpy(), -2.0, *arguments)
        assert plan.keep[b].tolist() == keep
        assert plan.dest[b].tolist() == [keep.index(into[i]) if i in into else -1 for i in range(length)]
        for i in into:
            assert plan.weight[b, i].item() == pytest.approx(share[i], rel=1e-6)


def test_special_tokens_stay_whatever_their_score():
    terms = torch.tensor([[[-1e300, 1e300, -torch.inf, torch.nan, 5.0]]], dtype=torch.float64)
    index, size, special = torch.arange(5)[None], torch.ones(1, 5), torch.tensor([[0]])
    plan = ops.asymmetric_plan(ops.DecisionInputs(terms, 1.0, index, size, special, None, None, 3, 1, False))
    assert plan.keep.tolist() == [[0, 1]]
    assert ops.importance(terms, 1.0)[0, 3] == 0
