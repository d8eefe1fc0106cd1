"""Runs that differ only in ``mtr.seed`` are one point, the mean over the seeds."""

import io
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from example_runs import ENVIRONMENT, write_run
from rich.console import Console

from mtr_lab.report.dashboard.reader import Reader
from mtr_lab.report.table import seed_tables
from mtr_lab.results.comparison import compare_all, per_image
from mtr_lab.results.predictions_file import load_predictions
from mtr_lab.results.schema import Result
from mtr_lab.results.seeds import mean_point, seed_groups


@pytest.fixture
def seeds(tmp_path: Path) -> list[Result]:
    """``random`` by seeds 2, 0 and 1 in ``tmp_path/0`` to ``2``; the second has no such setting, as older results."""
    return [
        write_run(tmp_path / str(i), "random", quality=1 + i, speed=100 + 10 * i, mtr=mtr)
        for i, mtr in enumerate([{"seed": 2}, {}, {"seed": 1}])
    ]


def test_the_mean_and_its_spread(seeds: list[Result]) -> None:
    groups = seed_groups(seeds)
    assert groups == [[(1, 1), (2, 1), (0, 1)], [(1, 2), (2, 2), (0, 2)]]
    mean, points = mean_point(seeds, groups[1]), [result["points"][2] for result in seeds]
    assert mean["seeds"] == [0, 1, 2]
    for metric in ("top1", "top5", "agreement", "kl"):
        values = [point[metric] for point in points]
        assert mean[metric] == pytest.approx(fmean(values))
        assert mean[f"{metric}_sd"] == pytest.approx(stdev(values))
        assert f"{metric}_ci" not in mean
    assert len({point["kl"] for point in points}) == 3
    assert mean["img_per_s"] == pytest.approx(1.4 * 110)
    for same in ("policy", "ratio", "reduction", "flops_true", "tokens", "images", "latency_ms", "peak_mib"):
        assert mean[same] == points[0][same]


def test_a_figure_that_one_run_lacks_has_no_mean(seeds: list[Result]) -> None:
    seeds[2]["points"][1]["kl"] = None
    del seeds[0]["points"][1]["img_per_s"]
    mean = mean_point(seeds, seed_groups(seeds)[0])
    assert mean["kl"] is mean["kl_sd"] is mean["img_per_s"] is None
    assert mean["top1"] is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"mtr": {"seed": 3, "merge": "prune"}},
        {"environment": {**ENVIRONMENT, "gpus": ["A GPU"]}},
        {"backbone": "vim_s"},
        {"weights": None},
        {"images": 150},
        {"ratios": (0.3,)},
    ],
)
def test_other_runs_are_no_part_of_the_mean(seeds: list[Result], tmp_path: Path, changes: dict[str, Any]) -> None:
    other = write_run(tmp_path / "other", "random", **{"mtr": {"seed": 3}, **changes})
    assert seed_groups([*seeds, other]) == seed_groups(seeds)


def test_settings_that_change_nothing_do_not_matter(seeds: list[Result], tmp_path: Path) -> None:
    apart = [write_run(tmp_path / str(ratio), "random", (ratio,), mtr={"seed": 3}) for ratio in (0.2, 0.4)]
    assert [len(group) for group in seed_groups([*seeds, *apart])] == [4, 4]


def test_a_seed_that_was_run_twice_is_not_averaged(seeds: list[Result], tmp_path: Path) -> None:
    again = write_run(tmp_path / "again", "random", (0.2,), mtr={"seed": 1})
    assert [place[1] for group in seed_groups([*seeds, again]) for place in group] == [2, 2, 2]
    variants = [run["variant"] for run in Reader([tmp_path]).data()["runs"]]
    assert [variant.removeprefix(f"({tmp_path.name}/") for variant in variants] == ["0)", "1)", "2)", "again)"]


def test_the_table_has_one_row_a_ratio(seeds: list[Result], tmp_path: Path) -> None:
    (table,) = seed_tables([*seeds, write_run(tmp_path / "mtr", "mtr")])
    stream = io.StringIO()
    Console(file=stream, width=80).print(table)
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines() if line.startswith(("unreduced", "random", "3 seeds", "mtr"))]
    assert [row[0] for row in rows] == ["unreduced", "random", "3", "random", "3"]
    mean = mean_point(seeds, seed_groups(seeds)[1])
    assert rows[3][4:6] == [f"{100 * mean['top1']:.1f}", f"{100 * mean['top5']:.1f}"]
    assert rows[4][4:8] == ["→", "53", "±", f"{100 * mean['top1_sd']:.1f}"]
    assert "±: standard deviation over the seeds" in text
    assert seed_tables(seeds[:1]) == []


def test_backbones_have_tables_of_their_own(seeds: list[Result], tmp_path: Path) -> None:
    others = [write_run(tmp_path / f"s{i}", "random", backbone="vim_s", mtr={"seed": i}) for i in range(2)]
    titles = [str(table.title) for table in seed_tables([*seeds, *others])]
    assert [title.split(" ")[0] for title in titles] == ["vim_nano", "vim_s"]


def test_the_dashboard_shows_one_point_and_keeps_the_runs(seeds: list[Result], tmp_path: Path) -> None:
    data = Reader([tmp_path]).data()
    assert [run["result"]["config"]["mtr"].get("seed") for run in data["runs"]] == [2, None, 1]
    assert [run["variant"] for run in data["runs"]] == ["", "", ""]
    unreduced, *means = data["points"]
    assert unreduced["places"] == [(0, 0), (1, 0), (2, 0)]
    assert [(point["run"], point["point"]) for point in means] == [(1, 1), (1, 2)]
    assert [point["places"] for point in means] == seed_groups(seeds)
    assert [point["mean"] for point in means] == [mean_point(seeds, group) for group in seed_groups(seeds)]


def test_differences_are_those_of_the_mean(seeds: list[Result], tmp_path: Path) -> None:
    """The mean of three runs, for each image, is paired with another policy."""
    write_run(tmp_path / "3", "mtr", ratios=(0.4,))
    data = Reader([tmp_path]).data()
    mtr = load_predictions(tmp_path / "3")
    runs = [load_predictions(tmp_path / str(i)) for i in range(3)]
    mean = {name: np.mean([per_image(run, 2)[name] for run in runs], axis=0) for name in per_image(mtr, 1)}
    (expected,) = compare_all([per_image(mtr, 1), mean], [(0, 1)])
    differences = {(pair["first"], pair["second"]): pair for pair in data["differences"]}
    found = differences[(3, 1), (1, 2)]
    for metric, difference in expected.items():
        assert found[metric]["difference"] == pytest.approx(difference["difference"], abs=1e-12)
        assert found[metric]["ci"] == pytest.approx(difference["ci"], abs=1e-12)
        assert found[metric]["significant"] == difference["significant"]
    assert len(data["differences"]) == len(differences) == 4  # three to the unreduced model, one at the same ratio
    assert ((3, 0), (1, 1)) in differences  # the unreduced models are equal


def test_without_the_predictions_of_one_the_mean_is_not_compared(seeds: list[Result], tmp_path: Path) -> None:
    (tmp_path / "2" / "predictions.npz").unlink()
    assert Reader([tmp_path]).data()["differences"] == []


def test_equal_means_do_not_differ() -> None:
    """Three thirds do not add up to one in floating point, yet an interval that ends at 0 has to end at exactly 0."""
    hits = np.random.default_rng(0).integers(0, 2, size=(3, 101)).astype(float)
    (found,) = compare_all([{"top1": hits.sum(0)}, {"top1": hits[::-1].sum(0)}], [(0, 1)], runs=[3, 3])
    assert found["top1"] == {"difference": 0.0, "ci": [0.0, 0.0], "significant": False, "p": 1.0}
    ones = np.ones(300)
    second = 3 * ones
    second[7] = 2
    (found,) = compare_all([{"top1": ones}, {"top1": second}], [(0, 1)], runs=[1, 3])
    assert found["top1"]["difference"] == pytest.approx(-1 / 900)
    assert found["top1"]["ci"][1] == 0.0


def test_results_that_hold_no_policy_are_left_alone(tmp_path: Path) -> None:
    results = [write_run(tmp_path / str(i), "random", config={"mtr": None}) for i in range(2)]
    assert seed_groups(results) == []
