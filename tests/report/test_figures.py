"""``mtr-lab report DIR -o figure.pdf``."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from example_result import point
from example_runs import write_run, write_sweep

from mtr_lab.report.__main__ import main
from mtr_lab.report.figures import CHARTS
from mtr_lab.report.looks import look


@pytest.mark.parametrize(("ending", "start"), [(".pdf", b"%PDF"), (".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_a_figure_in_each_format_is_the_same_every_time(ending: str, start: bytes, tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep")
    contents = set()
    for name in ("a", "b"):
        main([str(tmp_path / "sweep"), "-o", str(tmp_path / f"{name}{ending}")])
        contents.add((tmp_path / f"{name}{ending}").read_bytes())
    (content,) = contents
    assert content.startswith(start)


@pytest.mark.parametrize("chart", CHARTS)
def test_charts_have_the_policies_and_their_colours(chart: str, tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep")
    main([str(tmp_path / "sweep"), "-o", str(tmp_path / "figure.svg"), "--chart", chart])
    drawing = (tmp_path / "figure.svg").read_text()
    assert 'width="234pt"' in drawing  # 3.25 inches
    for policy in ("mtr", "write", "random"):
        assert policy in drawing
        assert look(policy).colour in drawing or chart == "tokens"  # equal schedules are one line


@pytest.mark.parametrize("count", [2, 30])
def test_points_are_near_their_figures_and_intervals_within_the_axes(count: int) -> None:
    figure, axes = plt.subplots(figsize=(3.25, 2.4))
    points = [point("none", 0.0, 0.8, 0.0), *(point("mtr", 0.4, 0.7, 0.1) for _ in range(count))]
    drawn = [
        {**p, "line": f"{i:02}", "backbone": "vim_s", "speedup": 1.5, "speedup_ci": [0.5, 9.0]}  # type: ignore[misc]
        for i, p in enumerate(points)
    ]
    CHARTS["speed"](axes, drawn)
    figure.draw_without_rendering()
    markers = [line for line in axes.lines if line.get_marker() not in ("None", "_", "|")]
    places = [line.get_transform().transform(line.get_xydata()[0]) for line in markers]
    far = [abs(place - axes.transData.transform((1.5, 70.0)))[0] * 72 / figure.dpi for place in places]
    assert len(far) == count
    assert 0.5 < max(far) < 4  # pt
    low, high = axes.get_xlim()
    assert low < 0.5
    assert high > 9
    plt.close(figure)


def test_a_long_legend_has_several_lines_and_many_settings_are_one_entry(tmp_path: Path) -> None:
    for policy in ("mtr", "write", "random", "hsa", "tome"):
        write_run(tmp_path / "few" / policy, policy)
    for i in range(17):
        write_run(tmp_path / "many" / str(i), "mtr", quality=1 + i, images=20, mtr={"first_block": i})
    heights = []
    for name in ("few", "many"):
        main([str(tmp_path / name), "-o", str(tmp_path / f"{name}.svg")])
        drawing = (tmp_path / f"{name}.svg").read_text()
        heights.append(float(re.search(r'height="([\d.]+)pt"', drawing)[1]))  # type: ignore[index]
        assert "first_block" not in drawing
    assert [round(height - 0.75 * 234) for height in heights] == [20, 10]  # lines of a legend


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "a", "mtr")
    write_run(tmp_path / "runs" / "b", "mtr", task="segmentation")
    with pytest.raises(SystemExit) as exit:
        main([str(tmp_path / "runs"), "-o", str(tmp_path / "figure.pdf")])
    assert exit.value.code == 2
    assert "a figure shows one task, these results have classification, segmentation" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path / "runs"), "--chart", "kl"])
    assert "--chart kl is for a figure" in capsys.readouterr().err
