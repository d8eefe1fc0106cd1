"""The table of metrics: what each declares, and what a new file in it changes."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from example_runs import write_run
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console

from mtr_lab import UserError
from mtr_lab.report.dashboard.reader import Reader
from mtr_lab.report.loggers import log_result
from mtr_lab.report.table import result_table
from mtr_lab.results import metrics
from mtr_lab.results.classifications import Classifications
from mtr_lab.results.comparison import compare
from mtr_lab.results.metrics import accuracy, all_metrics, score, shown_metrics, task_metrics
from mtr_lab.results.predictions_file import load_predictions
from mtr_lab.results.schema import Result, read_result, write_result
from mtr_lab.tasks.classification.task import Classification

CONFIDENCE = """
import numpy as np
from mtr_lab.measure.statistics import bootstrap_interval
from mtr_lab.results.metrics.metric import MeanOverImages

METRIC = MeanOverImages(
    key="confidence", task="classification", order=25, name="Confidence", heading="conf.", axis="Mean confidence, %",
    latex="Confidence (\\\\%)", unit="%", better=1, mean_interval=bootstrap_interval,
    per_image=lambda predictions, point: np.exp(predictions.log_probs[point].astype(float)).max(axis=1),
)
"""


@pytest.fixture
def confidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The key of a metric that exists only as one more file."""
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "confidence.py").write_text(CONFIDENCE)
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(tmp_path / "metrics")])
    all_metrics.cache_clear()
    yield "confidence"
    del sys.modules["mtr_lab.results.metrics.confidence"]
    monkeypatch.undo()
    all_metrics.cache_clear()


def test_a_new_file_is_a_metric_of_results_tables_charts_and_comparisons(confidence: str, tmp_path: Path) -> None:
    result = write_run(tmp_path / "run", "mtr")
    predictions = load_predictions(tmp_path / "run")
    assert isinstance(predictions, Classifications)
    expected = [np.exp(log_probs.astype(float)).max(axis=1).mean() for log_probs in predictions.log_probs]
    assert [score(predictions, i)[confidence] for i in range(3)] == expected
    assert [point[confidence] for point in read_result(tmp_path / "run")["points"]] == expected
    stream = io.StringIO()
    Console(file=stream, width=120).print(result_table(result))
    assert "conf." in stream.getvalue()
    assert f"{100 * expected[2]:.1f}" in stream.getvalue()
    logger = CSVLogger(tmp_path)
    log_result(result, [], logger)
    assert "mtr/confidence" in (Path(logger.log_dir) / "metrics.csv").read_text()
    data = Reader([tmp_path / "run"]).data()
    assert [m["key"] for m in data["axes"]["metrics"]][:3] == ["top1", "top5", "confidence"]
    found = compare(predictions, 0, predictions, 2)[confidence]
    assert found["difference"] == pytest.approx(expected[2] - expected[0])
    assert {**data["differences"][1][confidence], **found} == data["differences"][1][confidence]
    assert confidence in Classification({}).metrics


def test_a_result_is_checked_against_its_metrics(confidence: str, tmp_path: Path) -> None:
    result = write_run(tmp_path, "mtr")
    for value, problem in (
        ("0.5", 'confidence is "0.5", expected a number'),
        ([0.5], r"confidence is \[0.5\], expected a number"),
    ):
        result["points"][1][confidence] = value  # type: ignore[literal-required]
        (tmp_path / "result.json").write_text(json.dumps(result))
        with pytest.raises(UserError, match=rf"points\[1\]\.{problem}"):
            read_result(tmp_path)
    result["points"][1] |= {confidence: 0.5, f"{confidence}_ci": 0.4}  # type: ignore[typeddict-item]
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match=r"points\[1\]\.confidence_ci is .*, expected a list"):
        read_result(tmp_path)


def test_metrics_have_their_own_keys_and_places() -> None:
    keys = [key for metric in all_metrics() for key in metric.keys]
    assert len(set(keys)) == len(keys)
    assert len({metric.order for metric in all_metrics()}) == len(all_metrics())


@pytest.mark.parametrize(
    ("task", "keys"),
    [
        ("classification", ["top1", "top5", "agreement", "kl"]),
        ("segmentation", ["miou"]),
        ("detection", ["map", "ap50"]),
    ],
)
def test_the_first_metric_of_a_task_is_its_accuracy(task: str, keys: list[str]) -> None:
    assert [metric.key for metric in task_metrics(task)] == keys
    first = accuracy([dict.fromkeys(keys, 0.5)])
    assert first is not None
    assert first.key == keys[0]
    assert accuracy([{"kl": 0.1, "agreement": 0.9}]) is None


def test_only_metrics_of_the_points_are_shown(result: Result, tmp_path: Path) -> None:
    result["points"][0]["miou"] = 0.4
    points = read_result(write_result(result, tmp_path))["points"]
    assert [metric.key for metric in shown_metrics(points)] == ["top1", "top5", "miou", "agreement", "kl"]
