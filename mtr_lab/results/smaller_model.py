"""A smaller model in the figures of a larger one: the alternative to reducing that one."""

from dataclasses import replace
from typing import Any

import numpy as np

from mtr_lab.results.environment import hardware_name
from mtr_lab.results.metrics import score, task_metrics
from mtr_lab.results.predictions import Predictions
from mtr_lab.results.schema import SPEEDS, Result


def beside(large: Result, of_large: Predictions, small: Result, of_small: Predictions) -> tuple[Result, Predictions]:
    """The smaller model, unreduced, as if it were a policy of the larger one.

    Its FLOPs, its agreement and its divergence are relative to the larger model.

    Args:
        large, small: results of one task on the same images, by models of the same classes.
        of_large, of_small: their predictions.

    Returns:
        A result of the larger model with two points: that model unreduced, and the smaller one, whose ``policy`` and
        ``model`` are the smaller model's name. And the predictions at both.

    Raises:
        ValueError: the images are not the same, or in another order; or the classes are not the same.
    """
    name, unreduced = small["backbone"], large["points"][0]
    own = {key: value for key, value in small["points"][0].items() if not key.startswith("speedup")}
    if hardware_name(small["environment"]) != hardware_name(large["environment"]):
        own = {key: value for key, value in own.items() if key not in SPEEDS}
    predictions = of_large.select(slice(0, 1)).concat(replace(of_small.select(slice(0, 1)), points=np.array([name])))
    relative = {key for metric in task_metrics(large["task"]) for key in metric.keys}
    point: dict[str, Any] = {key: value for key, value in own.items() if key.removesuffix("_ci") not in relative}
    point |= {"policy": name, "model": name, "ratio": None, **score(predictions, 1)}
    point["reduction"] = 1 - small["points"][0]["flops_true"] / unreduced["flops_true"]  # type: ignore[operator]
    result: Any = {
        **large,
        "config": {**small["config"], "weights": small.get("weights")},
        "points": [unreduced, point],
    }
    return result, predictions
