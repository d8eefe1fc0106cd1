"""Paired differences between runs."""

import numpy as np
import pytest
import torch

from mtr_lab import UserError
from mtr_lab.measure.statistics import bootstrap_interval
from mtr_lab.results.classifications import Classifications, top_classes
from mtr_lab.results.comparison import compare, correct, per_image
from mtr_lab.results.resampling import Difference


def run(seed: int, n: int = 200, noise: float = 1.0, images: int = 0) -> Classifications:
    """A run with the same unreduced point for all seeds, and a second point that is off by ``noise``."""
    base = np.random.default_rng(1).normal(size=(n, 6)) * 3
    logits = np.stack([base, base + noise * np.random.default_rng(seed).normal(size=(n, 6))])
    log_probs = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)
    labels = np.where(np.random.default_rng(2).random(n) < 0.8, base.argmax(-1), 0)
    ids = np.array([f"{images}/{i}" for i in range(n)])
    top5 = top_classes(torch.from_numpy(log_probs)).numpy()
    return Classifications(ids, ids, labels, np.array(["none@0", "mtr@0.3"]), top5, log_probs)


def test_differences_equal_a_brute_force_bootstrap() -> None:
    first, second = run(3), run(4, noise=2.0)
    found = compare(first, 1, second, 1, resamples=2000, seed=5)
    correct = [(r.top5[1, :, 0] == r.labels).astype(float) for r in (first, second)]
    paired = correct[1] - correct[0]
    assert found["top1"]["difference"] == pytest.approx(paired.mean())
    rng = np.random.default_rng(99)
    means = [rng.choice(paired, len(paired)).mean() for _ in range(2000)]
    assert found["top1"]["ci"] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)
    p, q = np.exp(first.log_probs[0].astype(float)), first.log_probs
    kl_first = (p * (q[0] - q[1])).sum(-1)
    kl_second = (p * (second.log_probs[0] - second.log_probs[1])).sum(-1)
    assert found["kl"]["difference"] == pytest.approx((kl_second - kl_first).mean(), abs=1e-5)
    assert found["kl"]["significant"]
    assert found["agreement"]["difference"] < 0


@pytest.mark.parametrize("n", [1, 101, 200])
def test_intervals_are_those_of_the_mean_difference(n: int) -> None:
    first, second = run(3, n), run(4, n, noise=2.0)
    metrics = [per_image(first, 1), per_image(second, 1)]
    for name, found in compare(first, 1, second, 1, seed=5).items():
        expected = bootstrap_interval(metrics[1][name] - metrics[0][name], seed=5)
        assert found["ci"] == pytest.approx(expected, abs=1e-12)


def test_a_point_does_not_differ_from_itself() -> None:
    for difference in compare(run(3), 1, run(3), 1).values():
        assert difference == {"difference": 0.0, "ci": [0.0, 0.0], "significant": False, "p": 1.0}


def test_pairing_makes_the_interval_narrower() -> None:
    """Two points agree on most images, so that their paired interval is narrower than an unpaired one."""
    first, second = run(3), run(3, noise=1.05)
    lo, hi = compare(first, 1, second, 1)["top1"]["ci"]
    assert hi - lo < 0.08  # unpaired: about 2 · 1.96 · √(2 · 0.8 · 0.2 / 200) = 0.16


def test_runs_on_other_images_are_refused() -> None:
    with pytest.raises(UserError, match="cannot be paired: 200 and 150 images, 150 of them in common"):
        compare(run(3), 1, run(3, n=150), 1)
    with pytest.raises(UserError, match="0 of them in common"):
        compare(run(3), 1, run(3, images=1), 1)


def test_p_values_of_accuracies_are_those_of_the_sign_test() -> None:
    first, second = run(3, noise=2.0), run(4, noise=2.5)
    right = [(r.top5[1, :, 0] == r.labels).astype(int) for r in (first, second)]
    gained, lost = (right[1] > right[0]).sum(), (right[1] < right[0]).sum()
    heads = np.random.default_rng(0).binomial(gained + lost, 0.5, 200_000)
    as_far = np.abs(heads - (gained + lost) / 2) >= abs(gained - lost) / 2
    assert compare(first, 1, second, 1)["top1"]["p"] == pytest.approx(as_far.mean(), abs=0.005)


def test_p_values_of_divergences_are_uniform_without_a_difference() -> None:
    p = [compare(run(2 * i), 1, run(2 * i + 1), 1, resamples=200)["kl"]["p"] for i in range(60)]
    assert 0.3 < np.mean(p) < 0.7
    assert np.mean(np.array(p) < 0.5) == pytest.approx(0.5, abs=0.2)
    assert compare(run(1), 1, run(2, noise=2.0), 1)["kl"]["p"] < 1e-6


def test_holms_correction_is_for_all_rows_of_a_table() -> None:
    def row(p: float) -> dict[str, Difference]:
        return {"kl": {"difference": 0.1, "ci": [0.0, 0.2], "significant": False, "p": p}}

    rows = [row(0.03), row(0.01), row(0.02), {"top1": row(0.04)["kl"]}]
    correct(rows)
    assert [next(iter(row.values()))["p_holm"] for row in rows] == pytest.approx([0.04, 0.03, 0.04, 0.04])
