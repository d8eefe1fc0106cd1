"""The MTR step: by hand, against a slow reference, and its invariants."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_policies import mtr as slow_mtr

from mtr_lab import UserError
from mtr_lab.reduction import apply, make_policy, policy_config
from mtr_lab.tokens import Evidence, TokenState


def policy(**changes):
    return make_policy(policy_config("mtr", **changes))


def evidence(delta: torch.Tensor, channels: int = 4) -> Evidence:
    """Evidence whose Δ, summed over two directions and averaged over the channels, is ``delta`` (B, L)."""
    halves = torch.stack([0.25 * delta, 0.75 * delta], dim=1)[..., None] * channels
    return Evidence(halves, ("delta",), channels)


def state(hidden: torch.Tensor, residual: torch.Tensor, special: list[list[int]]) -> TokenState:
    batch, length, _ = hidden.shape
    index = torch.arange(length).expand(batch, length)
    return TokenState(hidden, residual, index, torch.ones(batch, length), torch.tensor(special), index)


def test_eight_tokens_by_hand() -> None:
    """Class token at 3; of the other seven, 2 are removed and round(0.5 · 5) = 2 are targets.

    Importance ascending (class token left out): 5, 1 | 6, 0 | 4, 7, 2. Sources 5 and 1, targets 6 and 0. Token 5 points
    along x as token 0 does, token 1 along y as token 6 does.
    """
    score = torch.tensor([[0.4, 0.2, 0.9, 0.0, 0.5, 0.1, 0.3, 0.6]])
    stream = torch.tensor([[[8, 0], [0, 2], [1, 1], [9, 9], [5, 5], [4, 0], [0, 6], [-1, 2]]], dtype=torch.float32)
    hidden = stream - 1
    before = state(hidden, torch.ones_like(stream), [[3]])
    plan = policy()(before, evidence(score), remove=2)

    assert plan.keep.tolist() == [[0, 2, 3, 4, 6, 7]]
    assert plan.dest.tolist() == [[0, 4, 1, 2, 3, 0, 4, 5]]
    assert plan.weight.tolist() == [[0.5, 0.5, 1, 1, 1, 0.5, 0.5, 1]]

    after = apply(plan, before)
    assert after.stream.tolist() == [[[6, 0], [1, 1], [9, 9], [5, 5], [0, 4], [-1, 2]]]
    assert after.hidden.tolist() == [[[5, -1], [0, 0], [8, 8], [4, 4], [-1, 3], [-2, 1]]]
    assert after.residual.tolist() == [[[1, 1]] * 6]
    assert after.index.tolist() == [[0, 2, 3, 4, 6, 7]]
    assert after.size.tolist() == [[2, 1, 1, 1, 2, 1]]
    assert after.special.tolist() == [[2]]
    assert after.source.tolist() == [[0, 4, 1, 2, 3, 0, 4, 5]]


def test_several_sources_share_a_target_in_one_mean() -> None:
    score = torch.tensor([[0.1, 0.2, 0.3, 1.0]])
    hidden = torch.tensor([[[1.0], [2.0], [6.0], [7.0]]])
    before = state(hidden, torch.zeros_like(hidden), [[3]])
    plan = policy()(before, evidence(score), remove=2)
    after = apply(plan, before)
    assert after.hidden.flatten().tolist() == pytest.approx([3.0, 7.0])  # not ((1 + 2) / 2 + 6) / 2
    assert after.size.tolist() == [[3, 1]]


def test_size_weighted_merging_conserves_the_mean() -> None:
    torch.manual_seed(0)
    hidden, residual = torch.randn(2, 3, 20, 6).unbind()
    before = state(hidden, residual, [[10]] * 3)
    weighted = policy(merge="size")
    for _ in range(3):
        length = before.hidden.shape[1]
        before = apply(weighted(before, evidence(torch.rand(3, length)), remove=4), before)
    total = (before.hidden * before.size[..., None]).sum(1)
    assert torch.allclose(total, hidden.sum(1), atol=1e-5)
    assert before.size.sum(1).tolist() == [20, 20, 20]


@settings(deadline=None, max_examples=80, derandomize=True)
@given(data=st.data())
def test_equals_the_slow_reference(data: st.DataObject) -> None:
    length = data.draw(st.integers(3, 24), label="tokens")
    specials = data.draw(st.integers(0, min(3, length - 2)), label="special")
    remove = data.draw(st.integers(1, length - specials - 1), label="removed")
    fraction = data.draw(st.sampled_from([0.01, 0.3, 0.5, 1.0]), label="target fraction")
    batch, channels = 3, data.draw(st.sampled_from([1, 3, 8]), label="channels")
    torch.manual_seed(data.draw(st.integers(0, 2**16), label="seed"))
    hidden, residual = torch.randn(2, batch, length, channels).unbind()
    score = torch.rand(batch, length)
    special = [torch.randperm(length)[:specials].tolist() for _ in range(batch)]
    before = state(hidden, residual, special)
    after = apply(policy(target_fraction=fraction)(before, evidence(score), remove), before)

    for b in range(batch):
        expected_hidden, expected_residual, survivors, goes_to = slow_mtr(
            score[b].tolist(),
            (hidden + residual)[b].tolist(),
            hidden[b].tolist(),
            residual[b].tolist(),
            special[b],
            remove,
            fraction,
        )
        if channels == 1:  # every cosine is ±1: which of several equal targets is taken is left open
            assert after.hidden.shape[1] == len(survivors)
            continue
        assert after.index[b].tolist() == survivors
        assert after.source[b].tolist() == goes_to
        torch.testing.assert_close(after.hidden[b], torch.tensor(expected_hidden))
        torch.testing.assert_close(after.residual[b], torch.tensor(expected_residual))
        assert after.index[b].gather(0, after.special[b]).tolist() == special[b]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(length=st.integers(4, 40), remove=st.integers(1, 30), seed=st.integers(0, 2**16))
def test_invariants(length: int, remove: int, seed: int) -> None:
    remove = min(remove, length - 2)
    torch.manual_seed(seed)
    hidden, residual = torch.randn(2, 4, length, 5).unbind()
    score = torch.rand(4, length)
    before = state(hidden, residual, [[i % length] for i in range(4)])
    step = policy()
    after = apply(step(before, evidence(score), remove), before)

    assert after.hidden.shape == (4, length - remove, 5)
    assert bool((after.index.diff(dim=1) > 0).all())
    assert after.size.sum(1).tolist() == [length] * 4

    # An image's result does not depend on its batch mates, and follows it through a permutation of the batch.
    order = torch.randperm(4)
    shuffled = state(hidden[order], residual[order], before.special[order].tolist())
    after_shuffled = apply(step(shuffled, evidence(score[order]), remove), shuffled)
    assert torch.equal(after_shuffled.hidden, after.hidden[order])
    alone = state(hidden[:1], residual[:1], before.special[:1].tolist())
    after_alone = apply(step(alone, evidence(score[:1]), remove), alone)
    assert torch.equal(after_alone.index, after.index[:1])
    torch.testing.assert_close(after_alone.hidden, after.hidden[:1])


def test_least_important_by_delta_of_both_directions() -> None:
    """The score is the sum over the directions; each direction alone would choose another token."""
    sums = torch.tensor([[[9.0, 1.0, 5.0, 4.0], [0.0, 9.0, 5.0, 2.0]]])[..., None]  # sums 9, 10, 10, 6
    hidden = torch.randn(1, 4, 3)
    before = state(hidden, torch.zeros_like(hidden), [[2]])
    plan = policy()(before, Evidence(sums, ("delta",), 1), remove=1)
    assert plan.keep.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("features", ["stream", "hidden", "residual"])
def test_similarity_compares_the_configured_features(features: str) -> None:
    """Token 0 is removed; 1 or 2 is its nearest target by the stream, the hidden or the residual features."""
    x, y = [1.0, 0.0], [0.0, 1.0]
    hidden = torch.tensor([[x, x, y, x]]) * (1 if features == "hidden" else 0.1)
    residual = torch.tensor([[x, y, x, x]])
    if features == "stream":
        residual, hidden = hidden * 20, torch.tensor([[x, y, x, x]])
    before = state(hidden, residual, [[3]])
    plan = policy(features=features, target_fraction=1.0)(before, evidence(torch.tensor([[0.1, 0.2, 0.3, 1.0]])), 1)
    assert plan.dest[0, 0].item() == (1 if features == "residual" else 0)


@pytest.mark.parametrize("remove", [0, -1, 7, 8])
def test_removing_too_many_is_refused(remove: int) -> None:
    hidden = torch.randn(1, 8, 3)
    with pytest.raises(
        UserError, match=rf"cannot remove {remove} of 8 tokens, 1 of them special: at most 6 can be removed"
    ):
        policy()(state(hidden, hidden, [[0]]), evidence(torch.rand(1, 8)), remove)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("score", "delat", "unknown mtr.score 'delat'.*'delta'"),
        ("merge", "median", "unknown mtr.merge 'median'"),
        ("target_fraction", -0.1, r"target_fraction must be in \[0, 1\], got -0.1"),
        ("target_fraction", 1.5, r"target_fraction must be in \[0, 1\], got 1.5"),
    ],
)
def test_unknown_parts_and_values(part: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        policy(**{part: value})


def test_unknown_policies_and_keys() -> None:
    with pytest.raises(UserError, match="unknown policy 'mrt'.*'mtr'"):
        policy_config("mrt")
    with pytest.raises(UserError, match="unknown argument of policy mtr 'target'.*'target_fraction'"):
        policy_config("mtr", target=0.5)
