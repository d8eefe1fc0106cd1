import io

import pytest
from rich.console import Console

from mtr_lab.report.table import result_table
from mtr_lab.results.schema import Result


def render(result: Result, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(result_table(result))
    return stream.getvalue()


def row(text: str, policy: str, which: int = 0) -> tuple[list[str], list[str]]:
    """The words of both lines of the row of a policy."""
    lines = [line.split() for line in text.splitlines()]
    found = [i for i, line in enumerate(lines) if line and line[0] == policy][which]
    return lines[found], lines[found + 1]


@pytest.mark.parametrize("width", [80, 120, 160])
def test_every_figure_is_readable_at_usual_widths(width: int, result: Result) -> None:
    text = render(result, width)
    assert "\x1b" not in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    if width >= 110:  # one line per row
        words, _ = row(text, "mtr", 1)
        assert words[:5] == ["mtr", "40.2", "40.0", "6.46", *(["3.05"] if width == 160 else ["197"])]
        assert {"77.5–80.2", "90.0", ".134–.164", "15432", "21.5"} <= set(words)
        return
    first, second = row(text, "mtr", 1)
    assert first == ["mtr", "40.2", "6.46", "197", "78.9", "95.1", "90.0", "0.149", "15432", "21.5"]
    assert second == ["40.0", "3.05", "→", "118", "77.5–80.2", "94.3–95.8", "88.9–91.1", ".134–.164", "1234", "25.9"]


def test_the_unreduced_row_claims_no_uncertainty_about_itself(result: Result) -> None:
    first, second = row(render(result), "unreduced")
    assert first == ["unreduced", "0.0", "10.8", "197", "80.5", "95.1", "100", "0.000", "12346", "21.5"]
    assert second == ["0.0", "5.08", "79.1–81.8", "94.3–95.8", "1234", "25.9"]


def test_skipped_images_are_counted_once_and_named(result: Result) -> None:
    assert "skipped 1 unreadable file: n01/broken[red].JPEG" in render(result)
    for point in result["points"]:
        point["skipped"] = [f"{i}.jpg" for i in range(12)]
    assert "skipped 12 unreadable files: 0.jpg, 1.jpg, 2.jpg, …" in render(result)
    for point in result["points"]:
        point["skipped"] = []
    assert "skipped" not in render(result)


@pytest.mark.parametrize(
    ("task", "counts", "words"),
    [("classification", [1, 1, 1], "1 image;"), ("video", [1000, 1000, 20], "20 to 1 000 videos;")],
)
def test_images_and_videos_are_counted(result: Result, task: str, counts: list[int], words: str) -> None:
    result["task"] = task
    for point, images in zip(result["points"], counts, strict=True):
        point["images"] = images
    assert words in render(result)


def test_columns_follow_the_task(result: Result) -> None:
    for point in result["points"]:
        for key in ("top1", "top1_ci", "top5", "top5_ci", "img_per_s", "latency_ms", "peak_mib"):
            del point[key]  # type: ignore[misc]
    result["points"][0]["miou"] = 0.4123
    text = render(result)
    assert "top-1" not in text
    assert "img/s" not in text
    assert "mIoU" in text
    assert "41.2" in text


@pytest.mark.parametrize(
    ("budget", "shown"),
    [
        ({"key": "speedup", "asked": 1.5, "promised": 1.527, "measured": 1.48}, ["≥1.5×", "1.53", "1.48"]),
        ({"key": "speedup", "asked": 1.5, "promised": 1.527, "measured": None}, ["≥1.5×", "1.53", "–"]),
        ({"key": "max_drop", "asked": 0.02, "promised": 0.0187, "measured": 0.014}, ["≤2", "%", "1.9", "1.4"]),
    ],
)
def test_a_budget_shows_what_was_asked_promised_and_measured(result: Result, budget: dict, shown: list[str]) -> None:
    result["points"][1] |= {"ratio": None, "budget": budget}
    text = render(result, 80)
    first, second = row(text, "mtr")
    asked, (promised, measured) = shown[:-2], shown[-2:]
    assert first[2] == promised
    assert second[: len(asked) + 1] == [*asked, measured]
    assert max(map(len, text.splitlines())) <= 80
    assert ("in the timing" if budget["key"] == "speedup" else "change class") in " ".join(text.split())


@pytest.mark.parametrize("width", [80, 110, 140])
def test_a_row_has_one_speedup_and_its_interval(result: Result, width: int) -> None:
    speed = {"speedup": 1.301, "speedup_ci": [1.251, 1.352]}
    for point in result["points"]:
        point |= {"speedup": 1.0, "speedup_ci": [1.0, 1.0]}
    budget = {"key": "speedup", "asked": 1.3, "promised": 1.327, "measured": 1.21}  # of an older result
    result["points"][1] |= {"ratio": None, "budget": budget, **speed}
    text = render(result, width)
    assert max(map(len, text.splitlines())) <= width
    assert text.split().count("1.30") == 2  # meas. and ×
    assert "1.21" not in text
    assert ("1.25–1.35" in text) == (width == 140)


def test_unknown_numbers_and_long_names_fit(result: Result) -> None:
    point = result["points"][1]
    point["policy"] = "mtr_without_reordering"
    point["ratio"] = point["kl"] = point["peak_mib"] = None
    point["kl_ci"] = [0.2, 1.25]
    first, second = row(render(result, 100), "mtr_without_reordering")
    assert first == ["mtr_without_reordering", "20.2", "8.61", "197", "80.1", "95.1", "90.0", "–", "13717", "21.5"]
    assert second[0] == "–"
    assert second[-3:] == [".200–1.25", "–", "25.9"]
    folded = render(result, 80).splitlines()
    assert max(map(len, folded)) <= 80
    assert [line[:6].strip() for line in folded].count("mtr_wi") == 1


@pytest.mark.parametrize("width", [80, 120])
def test_the_size_of_a_smaller_picture_and_the_best_one(result: Result, width: int) -> None:
    plain = render(result, width)
    assert "picture" not in plain
    assert "best test resolution" not in plain
    resized = result["points"][2]
    resized |= {"policy": "resolution", "resolution": [96, 96], "flops_overhead": 0.0, "top1": 0.811}
    text = render(result, width)
    assert max(map(len, text.splitlines())) <= width
    assert "96×96" in text
    for point in result["points"]:
        point |= {"speedup": 1.43, "speedup_ci": [1.13, 1.68]}
    text = render(result, width)  # nine columns of figures: a narrow window goes without some
    assert max(map(len, text.splitlines())) <= width
    for words in (["policy", "resolution", "81.1", "1.43"], ["asked", "77.5–80.2"], [".134–.164"]):
        assert set(words) <= set(text.split())
    assert "best test resolution of 2: 96 × 96 px, Top-1 81.1 % on these images" in " ".join(text.split())
    resized["top1"] = 0.7
    assert "best test resolution of 2: the model's own, Top-1 80.5 %" in " ".join(render(result, width).split())


def test_a_narrow_window_goes_without_balanced_accuracy(result: Result) -> None:
    """Of few videos, whose intervals are wide."""
    result["task"] = "video"
    for point in result["points"]:
        point |= {"balanced_accuracy": 0.9, "balanced_accuracy_ci": [0.667, 0.981], "top1_ci": [0.596, 0.982]}
        point |= {"speedup": 0.999, "speedup_ci": [0.98, 1.02]}
    narrow, wide = render(result, 80), render(result, 160)
    assert "bal. acc." in wide
    assert "bal. acc." not in narrow
    assert max(map(len, narrow.splitlines())) <= 80
    for words in (["policy", "unreduced", "mtr"], ["59.6–98.2", "0.999", ".134–.164"]):
        assert set(words) <= set(narrow.split())
