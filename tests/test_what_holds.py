"""The report's comparisons on metrics made up: which line is best, level, worse, and the tables of the page."""

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
IMAGES = 400


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return runpy.run_path(str(EXPERIMENTS / "what_holds.py"))


@pytest.fixture(scope="module")
def model(report: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of 400 images, ``good`` changes the output least; ``same`` differs from it by noise; Δ is behind chance."""
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.01, IMAGES)
    kl = {
        "none": 0,
        "good": 0.1,
        "same": 0.1,
        "mtr": 0.3,
        "mtr order=importance": 0.5,
        "random": 0.2,
        "random seed=1": 0.2,
        "small": 0.4,
    }
    hits = {"none": 360, "good": 350, "same": 350, "mtr": 200, "mtr order=importance": 100, "random": 250, "small": 280}
    lines, top1, divergence = [], [], []
    for line, mean in kl.items():
        right = np.arange(IMAGES) < hits.get(line, 250)
        values = np.abs(mean + (noise if line == "good" else random.normal(0, 0.01, IMAGES)))
        reduction = 0.0 if line == "none" else 0.4
        ratio = None if line == "small" else reduction
        figures = {"ratio": ratio, "reduction": reduction, "flops_true": 1e9, "images": IMAGES}
        figures |= {"top1": float(right.mean()), "top1_ci": [0.4, 0.6], "kl": float(values.mean())}
        lines.append({"line": line, "policy": line.split(" ")[0], **figures})
        top1.append(right)
        divergence.append(values)
    file = tmp_path_factory.mktemp("lines") / "lines.npz"
    record = {"task": "classification", "backbone": "vim_nano", "dataset": "few", "environment": {"commit": None}}
    texts = {"lines": lines, "record": record}
    arrays = {"top1": np.stack(top1), "kl": np.stack(divergence)}
    np.savez(file, **{name: json.dumps(value) for name, value in texts.items()}, **arrays)  # type: ignore[arg-type]
    return report["compare_classifier"](file)


def test_the_best_line_of_a_cell_and_those_level_with_it(model: dict[str, Any]) -> None:
    cell = model["standings"]["kl"]["0.4"]
    assert cell["best"] in ("good", "same")
    level = {line for line, paired in cell["others"].items() if paired["p_holm"] >= 0.05}
    assert level == {"good", "same"} - {cell["best"]}
    assert cell["others"].keys() == {"good", "same", "mtr", "random", "small"} - {
        cell["best"]
    }  # ablations are not compared
    assert "0.2" not in model["standings"]["kl"]


def test_claims_are_compared_with_the_mean_over_seeds(report: dict[str, Any], model: dict[str, Any]) -> None:
    against_chance = model["claims"]["Δ merged before random pruning (ten seeds)"]["0.4"]["kl"]
    assert against_chance["difference"] == pytest.approx(0.1, abs=0.005)
    assert report["sign"](against_chance) == "−"
    assert report["sign"](model["claims"]["order restored before not"]["0.4"]["kl"]) == "+"
    (mean,) = [line for line in model["lines"] if line["line"] == "random, mean"]
    assert mean["seeds"] == 2


def test_a_smaller_model_is_compared_in_the_cell_of_its_flops(report: dict[str, Any], model: dict[str, Any]) -> None:
    assert model["standings"]["top1"]["0.4"]["others"]["small"]["p_holm"] < 0.05
    row = report["choices_table"]([model]).splitlines()[-2]  # at 40 %
    assert row.endswith("| 70.0 / 0.400 |")


def test_tables_are_written_between_their_comments(
    report: dict[str, Any], model: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "few.json").write_text(json.dumps(model))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: standings -->\nold\n<!-- end of table -->\nafter\n")
    report["tables"](tmp_path / "lines", page)
    text = page.read_text()
    assert text.startswith("before\n<!-- table: standings -->\n| policy or model | KL | top-1 |")
    assert text.endswith("<!-- end of table -->\nafter\n")
    assert "old" not in text
    assert "| `mtr` | 0 / 0 / 1 | 0 / 0 / 1 |" in text


def test_the_tables_of_the_report_are_those_of_its_results(report: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text((EXPERIMENTS / "README.md").read_text())
    report["tables"](EXPERIMENTS / "results" / "lines", page)
    assert page.read_text() == (EXPERIMENTS / "README.md").read_text()
