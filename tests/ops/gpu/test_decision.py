"""The decision in kernels against the policy composed of its parts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtr_lab import ops
from mtr_lab.ops.decision import ASYMMETRIC_PLAN
from mtr_lab.ops.gpu import decision as kernels
from mtr_lab.ops.plan import update_metadata
from mtr_lab.reduction.policy import make_policy, policy_config
from mtr_lab.tokens import Evidence, TokenState


def state(batch, length, special, channels=12, seed=0, summed=5):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    index = torch.rand(batch, 2 * length, generator=generator).argsort(1)[:, :length].sort(1).values
    places = torch.rand(batch, length, generator=generator).argsort(1)[:, :special]
    streams = (torch.randn(batch, length, channels, generator=generator) for _ in range(2))
    size = torch.randint(1, 5, (batch, length), generator=generator).float()
    sums = torch.rand(batch, 2, length, 3, generator=generator)
    return TokenState(*streams, index, size, places), Evidence(sums, ("output", "delta", "write"), summed)


def decide(policy, before, evidence, remove):
    with ops.use_backend("triton"):
        actual = policy(before, evidence, remove)
        assert actual.metadata is not None  # by the kernels
    with ops.use_backend("reference"):
        expected = policy(before, evidence, remove)
    expected = expected.with_offsets()._replace(
        metadata=update_metadata(expected, before.index, before.size, before.special)
    )
    for name in ("dest", "keep", "removed", "offsets"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    for name, metadata, right in zip(("index", "size", "special"), actual.metadata, expected.metadata, strict=True):
        assert torch.equal(metadata, right), name
    torch.testing.assert_close(actual.weight, expected.weight, rtol=1e-6, atol=0)


@pytest.mark.slow
@settings(max_examples=15 if torch.cuda.is_available() else 5)
@given(length=st.integers(4, 90), special=st.integers(0, 3), share=st.floats(0, 1), seed=st.integers(0, 99))
@pytest.mark.parametrize("merge", ["mean", "size", "prune"])
def test_equals_the_policy(merge, length, special, share, seed):
    policy = make_policy(policy_config("mtr", merge=merge))
    capacity = policy.capacity(length, special)
    if capacity:
        decide(policy, *state(2, length, min(special, length - 2), seed=seed), max(1, round(share * capacity)))


@pytest.mark.parametrize(
    ("run", "length", "special", "remove", "merge"),
    [
        (64, 65, 2, 1, "mean"),  # one token more than a program's
        (32, 150, 3, 70, "size"),
        (32, 150, 3, 70, "mean"),
        (16, 50, 0, 20, "prune"),
        pytest.param(kernels.RUN, 1100, 1, 600, "size", marks=pytest.mark.slow),
    ],
)
def test_several_programs_an_image(run, length, special, remove, merge, monkeypatch):
    monkeypatch.setattr(kernels, "RUN", run)
    before, evidence = state(2, length, special)
    evidence.sums.copy_(evidence.sums.mul(40).round())  # equal scores in different programs
    evidence.sums[0] = evidence.sums[0].sort(dim=1).values  # each program's tokens score below those of the next
    decide(make_policy(policy_config("mtr", merge=merge)), before, evidence, remove)


def test_index_and_sizes_that_images_share():
    before, evidence = state(3, 30, 1)
    index, size = before.index[:1].expand(3, -1), before.size[:1].expand(3, -1)
    decide(make_policy(policy_config("mtr", merge="size")), before._replace(index=index, size=size), evidence, 7)


@pytest.mark.parametrize("score", ["delta", "-delta", "output"])
@pytest.mark.parametrize("directions", ["both", "forward", "backward"])
def test_scores(score, directions):
    decide(make_policy(policy_config("mtr", score=score, directions=directions)), *state(2, 30, 1), 7)


@pytest.mark.parametrize("run", [kernels.RUN, 16])
def test_scores_that_are_not_finite(run, monkeypatch):
    monkeypatch.setattr(kernels, "RUN", run)
    before, evidence = state(2, 40, 1)
    nan, inf = float("nan"), float("inf")
    evidence.sums[:, 0, ::7, 1], evidence.sums[:, 1, 3::9, 1] = nan, nan
    evidence.sums[:, 0, 1, 1], evidence.sums[:, 0, 2, 1] = inf, -inf
    evidence.sums[:, :, 4, 1] = torch.tensor([inf, -inf])
    evidence.sums[:, :, 5, 1] = torch.tensor([-3.4028234663852886e38, 0])  # as low as minus infinity
    for score in ("delta", "-delta"):
        for remove in (5, 20, 35):
            decide(make_policy(policy_config("mtr", score=score)), before, evidence, remove)


@pytest.mark.parametrize("run", [kernels.RUN, 32])
def test_of_equally_similar_targets_the_least_important_takes_the_token(run, monkeypatch):
    monkeypatch.setattr(kernels, "RUN", run)
    before, evidence = state(2, 130, 1, channels=3)
    for stream in (before.hidden, before.residual):  # zeros of both signs
        stream.copy_(stream.sign() * (torch.arange(130) % 3 > 0)[:, None])
    decide(make_policy(policy_config("mtr", features="hidden")), before, evidence, 30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("run", [kernels.RUN, 32])
def test_streams_of_a_half_precision_model(run, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "RUN", run)
    before, evidence = state(2, 50, 1, channels=40)
    before = before._replace(raw_hidden=before.hidden.to(dtype))
    decide(make_policy(policy_config("mtr")), before, evidence, 9)


@pytest.mark.parametrize("features", ["stream", "hidden", "residual"])
def test_features(features):
    decide(make_policy(policy_config("mtr", features=features)), *state(2, 40, 1, channels=70), 9)


def test_equal_scores_go_in_their_order():
    before, evidence = state(2, 30, 1)
    evidence.sums.copy_(evidence.sums[:, :1].mul(4).sub(2).round())  # +0 and -0 are equal scores
    assert evidence.sums.signbit().logical_and(evidence.sums == 0).any()
    decide(make_policy(policy_config("mtr")), before, evidence, 8)


def test_nearly_equal_similarities():
    """Their differences are below the precision of TF32."""
    before, evidence = state(2, 90, 1, channels=40)
    before.residual.copy_(1 + 0.03 * before.residual)
    decide(make_policy(policy_config("mtr", features="residual")), before, evidence, 30)


@pytest.mark.parametrize(
    ("length", "removed", "dtype", "expected"),
    [
        (30, 4, torch.float32, "triton"),
        (kernels.MAX_LENGTH + 1, 4, torch.float32, "reference"),
        (300, kernels.MAX_REMOVED + 1, torch.float32, "reference"),
        (30, 4, torch.float64, "reference"),
    ],
)
def test_larger_decisions_run_in_plain_pytorch(length, removed, dtype, expected):
    terms, tokens, hidden = torch.empty(1, 2, length), torch.empty(1, length), torch.empty(1, length, 8, dtype=dtype)
    inputs = terms, 1.0, tokens, tokens, tokens[:, :1], hidden, None, removed, 4, False
    with ops.use_backend("triton"):
        assert ASYMMETRIC_PLAN.pick(*inputs).name == expected
    with ops.use_backend("reference"):
        assert ASYMMETRIC_PLAN.pick(*inputs).name == "reference"


@pytest.mark.parametrize("changes", [{"order": "importance"}, {"merge": "fuse"}, {"prune_first": 0.5}])
def test_other_policies_are_composed(changes):
    policy = make_policy(policy_config("mtr", **changes))
    before, evidence = state(1, 20, 1)
    with ops.use_backend("triton"):
        actual = policy(before, evidence, 4)
    with ops.use_backend("reference"):
        expected = policy(before, evidence, 4)
    assert torch.equal(actual.dest, expected.dest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_registration(dtype):
    before, _ = state(2, 20, 1)
    metadata = before.index, before.size, before.special
    streams = before.hidden.to(dtype), before.residual
    arguments = (before.size[:, None].to(dtype), 1.0, *metadata, *streams, 4, 7, True, "triton")
    operator = torch.ops.mtr_lab.asymmetric_plan.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.testing.assert_close(ops.decompositions()[operator](*arguments), operator(*arguments))
