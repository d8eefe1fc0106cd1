"""The dashboard in a browser: what a reader sees and can do, without a network.

``MTR_LAB_SCREENSHOTS=FOLDER`` keeps the screenshots.
"""

import csv
import io
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from example_runs import ENVIRONMENT, data_block, write_run, write_sweep
from test_dashboard import PIXEL

from mtr_lab.report.dashboard.live import make_server
from mtr_lab.report.dashboard.page import build

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path"),
]
playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
Page = Any


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep, a run on other hardware, a run of another task without timing or predictions, and their report."""
    folder = tmp_path_factory.mktemp("dashboard")
    write_sweep(folder / "sweep")
    (folder / "sweep" / "0" / "pictures").mkdir()
    (folder / "sweep" / "0" / "pictures" / "tokens.png").write_bytes(PIXEL)
    gpu = {**ENVIRONMENT, "gpus": ["A GPU"]}
    write_run(folder / "sweep" / "gpu", "mtr", environment=gpu, backbone="vim_s", speed=5000)
    dense = write_run(folder / "dense", "mtr", task="segmentation", dataset="ade20k")
    kept = {"policy", "ratio", "reduction", "flops_literature", "flops_true", "flops_overhead", "tokens", "images"}
    for i, point in enumerate(dense["points"]):
        for key in point.keys() - kept - {"skipped"}:
            del point[key]
        point["miou"] = 0.4 - 0.02 * i
    (folder / "dense" / "result.json").write_text(json.dumps(dense))
    (folder / "dense" / "predictions.npz").unlink()
    build([folder / "sweep", folder / "dense"], folder / "report.html")
    return folder


@pytest.fixture
def page(browser: Any, folder: Path) -> Iterator[Page]:
    yield from opened(browser, (folder / "report.html").as_uri())


def opened(browser: Any, address: str, **options: Any) -> Iterator[Page]:
    """A page, which has to end without errors and without requests to other hosts."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True, **options)
    requests, errors = [], []
    context.route("http*://**", lambda route: route.continue_() if route.request.url.startswith(own) else route.abort())
    own = address if address.startswith("http") else "file:"
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.goto(address)
    page.locator("html[data-ready=true]").wait_for()
    yield page
    context.close()
    assert errors == []
    foreign = [url for url in requests if url.partition("#")[0] != address and not url.startswith(("data:", "blob:"))]
    assert [url for url in foreign if own == "file:" or url != f"{address}data.json"] == []


def shot(page: Page, name: str, **options: Any) -> None:
    if "MTR_LAB_SCREENSHOTS" in os.environ:
        page.screenshot(path=Path(os.environ["MTR_LAB_SCREENSHOTS"]) / f"{name}.png", **options)


def results(folder: Path) -> list[dict[str, Any]]:
    files = [folder / "dense", *(folder / "sweep" / name for name in ("0", "1", "2", "gpu"))]
    return [json.loads((file / "result.json").read_text()) for file in files]


def traces(page: Page, chart: str) -> list[dict[str, Any]]:
    """What a chart shows, without the Pareto front."""
    script = """id => document.querySelector(`#${id} .plot`).data.map(
        ({name, x, y, customdata, error_x, error_y, line}) =>
        ({name, x, y, customdata, shape: line?.shape, hi: error_y?.array, far: error_x?.array}))"""
    return page.evaluate(script, chart)


def cells(page: Page, table: str) -> list[list[str]]:
    """The visible text of a table's rows, a line break between a cell's two lines."""
    script = (
        "id => Array.from(document.getElementById(id).tBodies[0].rows, row => [...row.cells].map(c => c.innerText))"
    )
    return page.evaluate(script, table)


def choose(page: Page, facet: str, value: str) -> None:
    page.get_by_role("group", name=facet, exact=True).get_by_role("button", name=value, exact=True).click()


def test_charts_show_the_numbers_of_the_files(page: Page, folder: Path) -> None:
    drawn = {}
    for trace in traces(page, "cost"):
        if trace["customdata"]:
            for values in zip(trace["customdata"], trace["x"], trace["y"], trace["hi"], strict=True):
                drawn[values[0]] = values[1:]
    expected = {}
    for name, result in zip(("dense", "sweep/0", "sweep/1", "sweep/2", "sweep/gpu"), results(folder), strict=True):
        for i, point in enumerate(result["points"]):
            if "top1" in point and (i or name in ("sweep/1", "sweep/gpu")):  # of three equal ones that of median speed
                high = 100 * (point["top1_ci"][1] - point["top1"])
                expected[f"{name}#{i}"] = (point["flops_true"] / 1e9, 100 * point["top1"], high)
    assert drawn.keys() == expected.keys()
    for name, (x, *others) in expected.items():
        assert drawn[name][0] == pytest.approx(x, abs=0.03 * 0.6)  # beside others of the same cost
        assert list(drawn[name][1:]) == pytest.approx(others)
    assert "unreduced" in page.locator("#cost .plot").inner_text()
    assert page.locator("#cost .xtitle").text_content() == "True GFLOPs per image"
    assert page.locator("#speed .xtitle").text_content() == "Speed, × unreduced in the same run"
    write = next(trace for trace in traces(page, "speed") if "write" in trace["name"])
    assert write["x"] == [1.2, 1.4]
    assert write["far"] == pytest.approx([0.02, 0.04])
    choose(page, "Task", "segmentation")
    assert "No point shown was timed." in page.locator("#speed .missing").inner_text()
    choose(page, "Task", "classification")
    shot(page, "1280", full_page=True)


def test_every_metric_and_cost_can_be_chosen(page: Page, folder: Path) -> None:
    assert page.locator("#metrics label").all_inner_texts() == ["Top-1", "Top-5", "Agreement", "KL"]
    page.get_by_role("radio", name="KL").check()
    page.locator("#speed select").select_option(label="Latency of one image, median, ms")
    assert page.locator("#cost .ytitle").text_content() == "KL to the unreduced model, nats an image"
    (write,) = (trace for trace in traces(page, "speed") if trace["customdata"] and "write" in trace["name"])
    points = results(folder)[2]["points"][1:]
    assert write["x"] == [point["latency_ms"]["p50"] for point in points]
    assert write["y"] == [point["kl"] for point in points]


def test_the_pareto_front_is_a_step_line_through_the_best(page: Page, folder: Path) -> None:
    choose(page, "Backbone", "vim_nano")
    page.get_by_role("radio", name="KL").check()
    (front,) = (trace for trace in traces(page, "cost") if trace["name"] == "Pareto front")
    points = [point for result in results(folder)[1:4] for point in result["points"]]
    best = [p for p in points if not any(q["flops_true"] <= p["flops_true"] and q["kl"] < p["kl"] for q in points)]
    expected = sorted({(point["flops_true"] / 1e9, point["kl"]) for point in best})
    assert [front["x"], front["y"]] == [pytest.approx(values) for values in zip(*expected, strict=True)]
    assert front["shape"] == "hv"
    (front,) = (trace for trace in traces(page, "speed") if trace["name"] == "Pareto front")
    assert front["shape"] == "vh"
    assert front["y"] == sorted(front["y"])  # the faster, the further from the unreduced model
    page.locator("#speed select").select_option(label="Images per second")
    assert all(trace["name"] != "Pareto front" for trace in traces(page, "speed"))  # runs are timed apart


def test_runs_over_other_numbers_of_images_share_no_front(browser: Any, tmp_path: Path) -> None:
    for name, images in (("all", 200), ("some", 100)):
        write_run(tmp_path / name, "mtr", images=images)
    build([tmp_path], tmp_path / "report.html")
    for page in opened(browser, (tmp_path / "report.html").as_uri()):
        assert [trace["name"] for trace in traces(page, "cost")].count("Pareto front") == 2


def test_seeds_are_one_point_with_its_spread(browser: Any, tmp_path: Path) -> None:
    for i in range(3):
        write_run(tmp_path / "runs" / str(i), "random", quality=1 + i, speed=100 + 20 * i, mtr={"seed": i})
    write_run(tmp_path / "runs" / "mtr", "mtr")
    data = build([tmp_path / "runs"], tmp_path / "report.html")
    (mean,) = [point["mean"] for point in data["points"] if "mean" in point and point["mean"]["ratio"] == 0.4]
    for page in opened(browser, (tmp_path / "report.html").as_uri()):
        (drawn,) = [trace for trace in traces(page, "cost") if trace["name"].startswith("random")]
        assert drawn["name"] == "random · mean of 3 seeds"
        assert drawn["y"][1] == pytest.approx(100 * mean["top1"])
        assert drawn["hi"][1] == pytest.approx(100 * mean["top1_sd"])
        rows = [row for row in cells(page, "points") if row[0].startswith("random")]
        assert len(rows) == 2
        assert [row[0] for row in rows] == ["random\nmean of 3 seeds"] * 2
        assert f"{100 * mean['top1']:.1f}\n± {100 * mean['top1_sd']:.1f}" in rows[1]
        assert f"{mean['img_per_s']:.0f}" in rows[1]
        assert "1.40\n± 0.00" in rows[1]
        page.locator("#baseline").select_option(label="the unreduced model")
        assert [row[0].split("\n")[0] for row in cells(page, "differences")].count("random") == 2
        page.locator("#points .opener", has_text="random").nth(1).click()
        assert "Mean of the seeds 0, 1, 2, ± the standard deviation" in page.locator("#details").inner_text()
        page.keyboard.press("Escape")
        actions = page.locator("#points-actions")
        content = downloaded(page, actions.get_by_role("button", name="CSV")).decode()
        (row,) = (row for row in csv.DictReader(io.StringIO(content)) if row["seeds"] and row["ratio"] == "0.4")
        assert (row["seeds"], float(row["top1"]), float(row["top1_sd"])) == ("0 1 2", mean["top1"], mean["top1_sd"])
        latex = downloaded(page, actions.get_by_role("button", name="LaTeX")).decode()
        assert r"random $\cdot$ mean of 3 seeds" in latex
        shot(page, "seeds", full_page=True)


def test_filters_by_each_facet(page: Page) -> None:
    def shown() -> tuple[str, int]:
        return page.locator("#shown").inner_text().split(" points")[0], len(cells(page, "points"))

    assert shown() == ("10 of 10", 10)
    for facet, value, left in (
        ("Backbone", "vim_s", 3),
        ("Hardware", "A GPU", 3),
        ("Policy", "write", 2 + 2),  # and the unreduced models, as references
        ("Asked ratio", "40.0 %", 4 + 2),
    ):
        choose(page, facet, value)
        assert shown() == (f"{left} of 10", left)
        page.get_by_role("button", name="Show all", exact=True).click()
    page.locator("#search").fill("WRITE 40")
    assert shown() == ("3 of 10", 3)
    page.get_by_role("button", name="Show all", exact=True).click()
    assert page.locator("#search").input_value() == ""
    choose(page, "Policy", "write")
    choose(page, "Policy", "random")
    choose(page, "Asked ratio", "20.0 %")
    names = [trace["name"] for trace in traces(page, "cost") if trace["customdata"]]
    assert sum("write" in name for name in names) == sum("random" in name for name in names) == 1
    assert not any("mtr" in name for name in names)
    assert shown() == ("4 of 10", 4)
    choose(page, "Task", "segmentation")  # a separate section, in which neither policy is
    assert shown() == ("2 of 3", 2)  # of the chosen ratio
    assert [label.strip() for label in page.locator("#metrics label").all_inner_texts()] == ["mIoU"]


def test_the_table_holds_the_numbers_and_sorts(page: Page, folder: Path) -> None:
    choose(page, "Backbone", "vim_nano")
    points = [point for result in results(folder)[1:4] for point in result["points"]]
    headings = [text.split("\n")[0] for text in page.locator("#points thead th").all_inner_texts()]
    top1, kl = headings.index("Top-1, %"), headings.index("KL, nats")
    seen = {(row[0].split("\n")[0].strip(), row[top1], row[kl].split("\n")[0]) for row in cells(page, "points")}
    assert seen == {
        (
            "unreduced" if point["policy"] == "none" else point["policy"],
            f"{100 * point['top1']:.1f}\n{100 * point['top1_ci'][0]:.1f} – {100 * point['top1_ci'][1]:.1f}",
            f"{point['kl']:.3f}" if point["kl"] < 1 else f"{point['kl']:#.3g}",
        )
        for point in points
    }
    heading = page.locator("#points thead th", has_text="KL")
    for direction in ("ascending", "descending"):
        heading.get_by_role("button").click()
        assert heading.get_attribute("aria-sort") == direction
        values = [float(row[kl].split("\n")[0]) for row in cells(page, "points")]
        assert values == sorted(values, reverse=direction == "descending")
    page.locator("#points thead th", has_text="Policy").get_by_role("button").click()
    policies = [row[0].strip() for row in cells(page, "points")]
    assert set(policies) == {"unreduced", "mtr", "random", "write"}
    assert policies == sorted(policies)


def test_sizes_of_pictures_come_after_shares_and_videos_are_counted(browser: Any, tmp_path: Path) -> None:
    result = write_run(tmp_path, "resolution", (0.3, 0.5), images=1000, task="video")
    more = [{**result["points"][1], "ratio": None, "resolution": [side, side]} for side in (104, 44)]
    (tmp_path / "result.json").write_text(json.dumps({**result, "points": [*result["points"], *more]}))
    (tmp_path / "predictions.npz").unlink()
    build([tmp_path], tmp_path / "report.html")
    for page in opened(browser, (tmp_path / "report.html").as_uri()):
        chips = page.get_by_role("group", name="Asked ratio", exact=True).get_by_role("button").all_inner_texts()
        assert chips == ["30.0 %", "50.0 %", "44 × 44 px", "104 × 104 px"]
        assert "1\u00a0000 videos" in page.locator("#summary").inner_text()
        page.locator("#points .opener").last.click()
        assert {"videos", "videos per second"} <= set(page.locator("#details th").all_inner_texts())


def test_differences_in_pairs_change_sign_with_the_baseline(page: Page) -> None:
    data = data_block(page.content())
    choose(page, "Backbone", "vim_nano")
    policy = [run["result"]["config"]["mtr"]["policy"] for run in data["runs"]]
    (found,) = (
        pair
        for pair in data["differences"]
        if [policy[pair[end][0]] for end in ("first", "second")] == ["mtr", "write"] and pair["first"][1] == 1
    )
    rows = {}
    for baseline, other in (("mtr", "write"), ("write", "mtr")):
        label = page.locator("#baseline option", has_text=f"{baseline}").first.inner_text()
        page.locator("#baseline").select_option(label=label)
        rows[other] = next(r for r in cells(page, "differences") if r[0].strip().startswith(other) and r[1] == "20.0")
    headings = [text.split("\n")[0] for text in page.locator("#differences thead th").all_inner_texts()]
    kl = headings.index("Δ KL")
    lo, hi = found["kl"]["ci"]
    assert hi < 0, "write must be better than mtr for this test to show anything"
    assert "−" + f"{-found['kl']['difference']:.3f}\n−{-lo:.3f} … −{-hi:.3f}" in rows["write"][kl]
    assert "+" + f"{-found['kl']['difference']:.3f}\n+{-hi:.3f} … +{-lo:.3f}" in rows["mtr"][kl]
    assert "▲" in rows["write"][kl]
    assert "▼" in rows["mtr"][kl]
    page.locator("#baseline").select_option(label="the unreduced model")
    assert len(cells(page, "differences")) == 6
    caption = page.locator("#differences-caption").inner_text()
    assert "paired bootstrap over images" in caption
    choose(page, "Task", "segmentation")
    assert not page.locator("#differences").is_visible()
    assert "Nothing to compare" in page.locator("#differences-caption").inner_text()


def test_a_click_on_a_point_shows_all_about_it(page: Page, folder: Path) -> None:
    choose(page, "Policy", "mtr")
    choose(page, "Asked ratio", "40.0 %")
    choose(page, "Backbone", "vim_nano")
    at = """() => { const plot = document.querySelector("#cost .plot");
        const [x, y] = plot.data.find(t => t.customdata?.[0] === "sweep/0#2") && ["x", "y"].map(axis =>
            plot._fullLayout[`${axis}axis`].d2p(plot.data.find(t => t.customdata?.[0] === "sweep/0#2")[axis][0]));
        const box = plot.querySelector(".nsewdrag").getBoundingClientRect(); return [box.x + x, box.y + y]; }"""
    x, y = page.evaluate(at)
    page.mouse.move(x - 3, y)
    page.mouse.move(x, y)
    page.mouse.click(x, y)
    details = page.locator("#details")
    details.wait_for(state="visible")
    text = details.inner_text()
    point = results(folder)[1]["points"][2]
    assert "mtr at 40.0 %" in text
    assert "sweep/0" in text
    assert f"{100 * point['top1']:.1f} %" in text
    assert ", ".join(map(str, point["tokens"])) in text
    assert "0123456789abcdef" in text
    assert "A CPU" in text
    size = "() => document.querySelector('#details img').naturalWidth"
    assert page.evaluate(size) == 1
    assert 'mtr_lab.patch(model, "mtr", ratio=0.4)' in text
    search = page.get_by_label("Search the configuration")
    search.fill("merge")
    assert details.locator("section", has=search).locator("tr").all_inner_texts() == ["mtr.merge\tmean"]
    search.fill("nothing has this name")
    assert "No setting matches" in details.inner_text()
    shot(page, "1280-details")


def test_the_keyboard_is_enough(page: Page) -> None:
    page.get_by_role("button", name="write", exact=True).first.focus()
    page.keyboard.press("Space")
    assert page.locator("#shown").inner_text().startswith("4 of 10")
    assert page.evaluate("() => document.activeElement.dataset.chip") == "policy=write"
    opener = page.locator("#points .opener", has_text="write").first
    opener.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.activeElement.id") == "details-title"
    page.keyboard.press("Escape")
    assert not page.locator("#details").is_visible()
    assert page.evaluate("() => document.activeElement.textContent").startswith("write")
    heading = page.locator("#points thead th", has_text="KL").get_by_role("button")
    heading.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")  # the heading was drawn anew, and still has the focus
    assert page.locator("#points thead th", has_text="KL").get_attribute("aria-sort") == "descending"


def downloaded(page: Page, button: Any) -> bytes:
    with page.expect_download() as download:
        button.click()
    return Path(download.value.path()).read_bytes()


def test_csv_has_the_visible_points_unrounded(page: Page, folder: Path) -> None:
    choose(page, "Policy", "write")
    choose(page, "Backbone", "vim_nano")
    content = downloaded(page, page.locator("#points-actions").get_by_role("button", name="CSV")).decode()
    rows = list(csv.DictReader(io.StringIO(content)))
    assert [row["policy"] for row in rows] == ["none", "write", "write"]
    for row, point in zip(rows, results(folder)[2]["points"], strict=True):
        for key in ("ratio", "reduction", "flops_true", "top1", "agreement", "kl", "img_per_s", "peak_mib"):
            assert float(row[key]) == point[key]
        assert [float(row["kl_lo"]), float(row["kl_hi"])] == point["kl_ci"]
        assert float(row["latency_p95_ms"]) == point["latency_ms"]["p95"]
        assert row["tokens"] == " ".join(map(str, point["tokens"]))
    differences = downloaded(page, page.locator("#differences-actions").get_by_role("button", name="CSV")).decode()
    first = next(csv.DictReader(io.StringIO(differences)))
    assert first["baseline"] in ("mtr", "random")
    assert first["kl_significant"] in ("true", "false")


def test_latex_and_png(page: Page, folder: Path) -> None:
    choose(page, "Backbone", "vim_nano")
    latex = downloaded(page, page.locator("#points-actions").get_by_role("button", name="LaTeX")).decode()
    lines = latex.splitlines()
    assert any(line.startswith(r"\begin{tabular}{@{}lS[table-format=") for line in lines)
    assert r"\end{tabular}" in lines
    heading = next(i for i, line in enumerate(lines) if r"\emph{40.0 \% of the FLOPs removed}" in line)
    group = {line.split(" ")[0]: line for line in lines[heading + 1 : heading + 4]}
    assert set(group) == {"mtr", "write", "random"}
    point = results(folder)[2]["points"][2]
    assert rf"\bfseries {point['kl']:.3f}" in group["write"]  # the best of the three
    assert any(r"\underline" in line for line in group.values())
    page.locator(".columns summary").click()
    page.locator(".columns").get_by_label("Removed (%)").check()
    page.locator(".columns").get_by_label("KL (nats)").uncheck()
    latex = downloaded(page, page.locator("#points-actions").get_by_role("button", name="LaTeX")).decode()
    assert "{Removed" in latex
    assert "{KL" not in latex
    differences = downloaded(page, page.locator("#differences-actions").get_by_role("button", name="LaTeX")).decode()
    assert r"$\Delta$ KL \\" in differences
    assert r"& nats \\" in differences
    assert "$-$" in differences
    for chart in ("cost", "speed", "tokens"):
        drawing = downloaded(page, page.locator(f"#{chart}").get_by_role("button", name="SVG"))
        assert drawing.startswith(b"<svg")
        picture = downloaded(page, page.locator(f"#{chart}").get_by_role("button", name="PNG"))
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(picture[16:20], "big") == 1800
        if "MTR_LAB_SCREENSHOTS" in os.environ:
            (Path(os.environ["MTR_LAB_SCREENSHOTS"]) / f"export-{chart}.png").write_bytes(picture)


@pytest.mark.parametrize("width", [1440, 1280, 768, 400])
def test_the_page_does_not_scroll_sideways(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    chart = "([w, id]) => document.querySelector(`#${id} .main-svg`)?.getBoundingClientRect().right <= w"
    for name in ("cost", "speed", "tokens"):
        page.wait_for_function(chart, arg=[width, name])
    assert page.evaluate("() => document.documentElement.scrollWidth") == width
    shot(page, f"{width}-narrowed", full_page=True)
    page.locator("#points .opener").nth(3).click()
    box = page.locator("#details").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert page.evaluate("() => document.documentElement.scrollWidth") == width
    shot(page, f"{width}-panel")


def test_in_print_the_charts_have_a_legend_and_fit_the_page(page: Page) -> None:
    assert page.locator("#cost .legend").count() == 0
    page.set_viewport_size({"width": 688, "height": 1000})  # A4 less its margins
    page.emulate_media(media="print", color_scheme="dark")
    page.wait_for_selector("#cost .legend")
    for hidden in ("#filters", "#points-actions", "#baseline-line", "#metrics"):
        assert not page.locator(hidden).is_visible()
    for chart in ("cost", "speed", "tokens"):
        box = page.locator(f"#{chart} .main-svg").first.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 688
    assert page.evaluate("() => document.documentElement.scrollWidth") == 688
    background = "() => document.querySelector('#cost .plot')._fullLayout.paper_bgcolor"
    assert page.evaluate(background) == "#ffffff"
    shot(page, "print", full_page=True)
    if "MTR_LAB_SCREENSHOTS" in os.environ:
        page.pdf(path=Path(os.environ["MTR_LAB_SCREENSHOTS"]) / "print.pdf", format="A4")


def test_many_schedules_can_be_printed(browser: Any, tmp_path: Path) -> None:
    """Plotly fits a legend into the chart's height: a long legend must not shrink the chart to nothing."""
    for i in range(13):
        tokens = [[197] * 8, [197 - i] * 8, [150 - i] * 8]
        result = write_run(tmp_path / str(i), f"a policy of some considerable length {i}", images=20)
        for point, counts in zip(result["points"], tokens, strict=True):
            point["tokens"] = counts
        (tmp_path / str(i) / "result.json").write_text(json.dumps(result))
        (tmp_path / str(i) / "predictions.npz").unlink()
    build([tmp_path], tmp_path / "report.html")
    for page in opened(browser, (tmp_path / "report.html").as_uri()):
        page.emulate_media(media="print")
        page.locator("#cost .legend").wait_for()
        for chart in ("cost", "speed", "tokens"):
            assert page.locator(f"#{chart} .nsewdrag").bounding_box()["height"] > 150


def test_names_from_files_stay_text(browser: Any, tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
    link = '<a href="https://example.com">click</a>'
    fields = {"dataset": hostile, "backbone": link, "environment": {**ENVIRONMENT, "cpu": hostile}}
    for name, merge in (("a", hostile), ("b", "=1+1")):
        write_run(tmp_path / name, link, mtr={"merge": merge, hostile: hostile}, **fields)
    build([tmp_path], tmp_path / "report.html")
    for page in opened(browser, (tmp_path / "report.html").as_uri()):
        assert page.locator("#summary").inner_text().count(hostile) == 2
        assert page.locator("img, body a").count() == 0
        assert page.locator("script").count() == 3
        content = downloaded(page, page.locator("#points-actions").get_by_role("button", name="CSV")).decode()
        rows = list(csv.DictReader(io.StringIO(content)))
        assert {row["policy"] for row in rows} == {"none", link}
        assert {row["dataset"] for row in rows} == {hostile}
        page.locator("#points .opener").nth(1).click()
        assert hostile in page.locator("#details").inner_text()
        assert page.locator("img, body a").count() == 0


def test_a_result_with_next_to_nothing_is_shown(browser: Any, tmp_path: Path) -> None:
    result = write_run(tmp_path, "mtr", ratios=(0.3,))
    for point in result["points"]:
        for key in [key for key in point if key not in ("policy", "ratio", "reduction", "images")]:
            point[key] = {"tokens": [], "skipped": []}.get(key) if key[:5] not in ("top1", "top1_") else point[key]
        for key in [key for key, value in point.items() if value is None and key not in _REQUIRED]:
            del point[key]
    result["points"][1] |= {"ratio": None, "kl": None, "kl_ci": [None, None]}
    del result["weights"]
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "predictions.npz").unlink()
    build([tmp_path], tmp_path / "report.html")
    for page in opened(browser, (tmp_path / "report.html").as_uri()):
        assert "No point shown was timed." in page.locator("#speed .missing").inner_text()
        assert "counts given" in page.locator("#facets").inner_text()
        page.locator("#points .opener").nth(1).click()
        assert "not measured" in page.locator("#details").inner_text()


_REQUIRED = ("flops_literature", "flops_true", "flops_overhead")


def test_live_points_appear_without_a_reload(browser: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "sweep" / "0", "mtr")
    with make_server([tmp_path / "sweep"], 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for page in opened(browser, f"http://127.0.0.1:{server.server_port}/"):
            page.evaluate("() => { window.notReloaded = true; }")
            choose(page, "Asked ratio", "40.0 %")
            page.get_by_role("radio", name="KL").check()
            page.locator("#live", has_text="Following, 1 runs so far").wait_for()
            result = write_run(tmp_path / "sweep" / "1", "write", quality=2)
            page.locator("#points .opener", has_text="write").wait_for()
            assert page.evaluate("() => window.notReloaded")
            assert page.locator("#shown").inner_text().startswith("3 of 5")  # the filter still holds
            drawn = [trace for trace in traces(page, "cost") if trace["name"] == "write"]
            assert [trace["y"] for trace in drawn] == [[result["points"][2]["kl"]]]
        server.shutdown()


def test_a_smaller_picture_and_a_smaller_model_are_lines(browser: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "mtr", "mtr")
    sizes = write_run(tmp_path / "sizes", "resolution")
    for point, side in zip(sizes["points"][1:], (96, 80), strict=True):
        point |= {"resolution": [side, side], "flops_overhead": 0.0}
    (tmp_path / "sizes" / "result.json").write_text(json.dumps(sizes))
    small = write_run(tmp_path / "small", "mtr", backbone="vim_ti")
    for point in small["points"]:
        point["flops_true"] /= 2
    (tmp_path / "small" / "result.json").write_text(json.dumps(small))
    build([tmp_path], tmp_path / "report.html")
    for page in opened(browser, (tmp_path / "report.html").as_uri()):
        choose(page, "Backbone", "vim_nano")
        table = {row[0].split("\n")[0].strip(): row for row in cells(page, "points")}
        assert "80 × 80" in table["resolution"]
        assert table["vim_ti"][1].split() == ["50.0"]
        assert any(trace["name"] == "vim_ti" for trace in traces(page, "cost"))
        assert "vim_nano: best test resolution of 3" in page.locator("#points-caption").inner_text()
        page.locator("#baseline").select_option(label="vim_ti")
        assert {row[0].split("\n")[0].strip() for row in cells(page, "differences")} == {"mtr", "resolution"}
        assert "Holm" in page.locator("#differences-caption").inner_text()
        shot(page, "lines", full_page=True)


def test_an_unreduced_model_shows_no_pictures_of_a_reduced_point(page: Page) -> None:
    choose(page, "Backbone", "vim_nano")
    for name, pictures in (("unreduced", 0), ("mtr", 0), ("mtr", 1)):
        openers = page.locator("#points .opener", has_text=name)
        (openers.last if pictures else openers.first).click()
        assert page.locator("#details img").count() == pictures
    page.get_by_role("button", name="Enlarge tokens").click()
    assert page.locator("#lightbox img").is_visible()
    assert "mtr at 40.0 % · tokens" in page.locator("#lightbox").inner_text()
    whole = page.locator("#lightbox img").bounding_box()["width"]
    page.locator("#lightbox img").click()  # at full size: the picture is one pixel
    assert page.locator("#lightbox img").bounding_box()["width"] < whole
    page.keyboard.press("Escape")
    assert not page.locator("#lightbox").is_visible()


def test_without_speeds_the_costs_fill_the_row(page: Page) -> None:
    width = "document.querySelector('#cost .main-svg').getBoundingClientRect().width"
    half = page.evaluate(width)
    choose(page, "Task", "segmentation")
    assert page.evaluate(width) > 1.9 * half
    assert not page.locator("#speed .actions").is_visible()
    choose(page, "Task", "classification")
    assert page.evaluate(width) == half


def test_a_point_is_chosen_by_a_goal(page: Page, folder: Path) -> None:
    choose(page, "Backbone", "vim_nano")
    page.get_by_role("radio", name="Agreement").check()
    points = [point for result in results(folder)[1:4] for point in result["points"][1:]]
    page.locator("#goal").select_option(label="fastest within")
    page.locator("#limit").fill("60")
    fitting = [point for point in points if 100 * (1 - point["agreement"]) <= 60]
    best = max(fitting, key=lambda point: (point["speedup"], point["reduction"]))
    assert f'mtr_lab.patch(model, "{best["policy"]}", ratio={best["ratio"]}' in page.locator("#chosen").inner_text()
    page.locator("#goal").select_option(label="best at no more than")
    page.locator("#limit").fill("0.7")
    best = max((p for p in points if p["flops_true"] <= 0.7e9), key=lambda point: point["agreement"])
    chosen = page.locator("#chosen").inner_text()
    assert f"reduction={best['policy']} mtr.ratio={best['ratio']}" in chosen
    page.locator("#limit").fill("0.01")
    assert "No point shown meets this limit." in page.locator("#chosen").inner_text()


def test_the_address_holds_the_view(browser: Any, page: Page, folder: Path) -> None:
    choose(page, "Policy", "write")
    page.get_by_role("radio", name="KL").check()
    page.locator("#points thead th", has_text="KL").get_by_role("button").click()
    page.locator("#theme").click()
    address, rows = page.url, cells(page, "points")
    assert "#" in address
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    again = context.new_page()
    again.goto(address)
    again.locator("html[data-ready=true]").wait_for()
    assert cells(again, "points") == rows
    assert again.get_by_role("radio", name="KL").is_checked()
    assert again.evaluate("() => document.documentElement.dataset.theme") == "dark"
    context.close()


def test_curves_of_training_runs(browser: Any, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "training.json").write_text(json.dumps({"config": {"backbone": {"name": "vim_ti"}}}))
        (tmp_path / name / "metrics.csv").write_text("epoch,step,train_loss,val_top1\n0,9,2.5,\n1,19,1.5,0.4\n")
    build([tmp_path], tmp_path / "report.html")
    for page in opened(browser, (tmp_path / "report.html").as_uri()):
        assert [(trace["name"], trace["x"], trace["y"]) for trace in traces(page, "training")] == [
            ("first", [1, 2], [2.5, 1.5]),
            ("second", [1, 2], [2.5, 1.5]),
        ]
        page.locator("#training select").select_option(label="Held-out top-1, %")
        assert traces(page, "training")[0]["y"] == [40]
        assert not page.locator("#points-section").is_visible()


def test_curves_are_those_of_the_task_in_view(browser: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run", "mtr")
    write_run(tmp_path / "other", "mtr", (0.2,), task="video")
    for task in ("classification", "video", "segmentation"):
        (tmp_path / task).mkdir()
        record = {"config": {"backbone": {"name": "vim_ti"}, "task": {"name": task}}}
        (tmp_path / task / "training.json").write_text(json.dumps(record))
        (tmp_path / task / "metrics.csv").write_text("epoch,step,train_loss\n0,9,2.5\n1,19,1.5\n")
    build([tmp_path], tmp_path / "report.html")
    for page in opened(browser, (tmp_path / "report.html").as_uri()):
        for task in ("classification", "video"):
            choose(page, "Task", task)
            names = [trace["name"] for trace in traces(page, "training")]
            assert names == ([task, "segmentation"] if task < "s" else ["segmentation", task])


def test_an_ablation_has_an_axis_for_each_setting(browser: Any, tmp_path: Path) -> None:
    for i, (merge, order) in enumerate([("mean", "index"), ("prune", "index"), ("mean", "importance")]):
        write_run(tmp_path / str(i), "mtr", quality=1 + i, mtr={"merge": merge, "order": order})
    build([tmp_path], tmp_path / "report.html")
    for page in opened(browser, (tmp_path / "report.html").as_uri()):
        text = page.locator("#ablation").text_content()
        assert all(name in text for name in ("merge", "order", "prune", "importance", "removed, %", "Top-1, %"))
        assert page.locator("#ablation polyline").count() == 6
        for width in (1440, 800):
            page.set_viewport_size({"width": width, "height": 800})
            drawn = "() => document.querySelector('#ablation svg').style.width === `${ablation.clientWidth}px`"
            page.wait_for_function(drawn)
            assert page.locator("#ablation text").first.bounding_box()["height"] < 18  # 12 px at any width
        page.locator("#ablation polyline").first.dispatch_event("click")
        assert page.locator("#details").is_visible()


def test_many_rows_are_shown_on_request_and_many_schedules_are_one_line_with_gaps(browser: Any, tmp_path: Path) -> None:
    for i in range(31):
        result = write_run(tmp_path / str(i), "mtr", images=20, quality=1 + i / 10, mtr={"first_block": i})
        for ratio, point in enumerate(result["points"]):
            point["tokens"] = [197, 197 - i * (ratio > 0), 120 + 40 * ratio]
        (tmp_path / str(i) / "result.json").write_text(json.dumps(result))
    build([tmp_path], tmp_path / "report.html")
    for page in opened(browser, (tmp_path / "report.html").as_uri()):
        assert len(cells(page, "points")) == 50
        page.locator("#points-more button").click()
        assert len(cells(page, "points")) > 61
        assert page.locator("#tokens .main-svg").count() == 0  # out of view
        page.locator("#tokens").scroll_into_view_if_needed()
        page.locator("#tokens .main-svg").first.wait_for()
        unreduced, reduced = traces(page, "tokens")
        assert unreduced["y"] == [197, 197, 120, 120, None]
        schedules = " ".join("" if count is None else str(count) for count in reduced["y"]).split("  ")
        assert {schedule.strip() for schedule in schedules} >= {
            f"197 {197 - i} {count} {count}" for i in range(31) for count in (160, 200)
        }
