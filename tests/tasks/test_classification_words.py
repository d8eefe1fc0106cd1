"""What the picture of a classified image says above the tokens."""

from types import SimpleNamespace
from typing import Any

import torch

from mtr_lab.tasks.classification.task import outcome


def test_class_and_probability_before_and_after() -> None:
    probabilities = {"unreduced": [0.7, 0.2, 0.1], "mtr, 40 % fewer FLOPs": [0.2, 0.6, 0.2]}
    evaluation = SimpleNamespace(forward_at=lambda point, images: torch.tensor([probabilities[point.words]]).log())
    drawing: Any = SimpleNamespace(
        evaluation=evaluation,
        image={"image": torch.zeros(1, 3, 4, 4), "label": torch.tensor([2])},
        points=[SimpleNamespace(words=words) for words in probabilities],
        class_names=["ant", "bee", "cat"],
    )
    before, after = (torch.tensor(values) for values in probabilities.values())
    kl = float((before * (before / after).log()).sum())
    assert outcome(drawing).splitlines() == [
        "truth: cat",
        "unreduced: ant, 70 %",
        f"mtr, 40 % fewer FLOPs: bee, 60 %, KL divergence {kl:.3f} nats",
    ]
    drawing.class_names = ()
    assert outcome(drawing).startswith("truth: class 2\nunreduced: class 0")
