"""The dashboard: its data, its page, its server, its command line."""

import base64
import errno
import gzip
import hashlib
import http.client
import io
import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_runs import data_block, write_run, write_sweep
from PIL import Image

from mtr_lab import UserError
from mtr_lab.report.__main__ import main
from mtr_lab.report.dashboard.live import _Source, make_server
from mtr_lab.report.dashboard.page import build, page, to_json
from mtr_lab.report.dashboard.reader import Reader
from mtr_lab.results.comparison import compare, compare_all
from mtr_lab.results.predictions_file import load_predictions, save_predictions
from mtr_lab.results.schema import SPEEDS, write_result

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def test_the_page_holds_the_results_word_for_word(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep")
    build([tmp_path / "sweep"], tmp_path / "out" / "report.html")
    data = data_block((tmp_path / "out" / "report.html").read_text())
    assert [run["name"] for run in data["runs"]] == ["sweep/0", "sweep/1", "sweep/2"]
    for i, run in enumerate(data["runs"]):
        assert run["result"] == json.loads((tmp_path / "sweep" / str(i) / "result.json").read_text())
        assert run["paired"]
    assert data["notes"] == []


def test_a_page_is_made_without_pytorch(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    code = "import sys; from mtr_lab.report.__main__ import main; main(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path), "-o", str(tmp_path / "report.html")]
    imported = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1].split()
    assert "numpy" in imported
    assert not {"torch", "timm", "lightning"} & {*imported}


def test_files_folders_and_sweeps_are_found_once(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep")
    write_run(tmp_path / "sweep" / "10", "evit")
    (tmp_path / "sweep" / "2" / "result.json").rename(tmp_path / "sweep" / "2" / "kept.json")
    paths = [tmp_path / "sweep" / "2" / "kept.json", tmp_path / "sweep" / "1", tmp_path / "sweep"]
    names = [run["name"] for run in Reader(paths).data()["runs"]]
    assert names == ["kept", "1", "sweep/0", "sweep/10"]


def test_points_of_one_budget_are_compared(tmp_path: Path) -> None:
    for i, policy in enumerate(("mtr", "hsa")):
        result = write_run(tmp_path / policy, policy)
        asked = [{"key": "speedup", "asked": ratio, "promised": 2.0, "measured": None} for ratio in (1.2, 1.3 + i / 10)]
        for point, budget in zip(result["points"][1:], asked, strict=True):
            point |= {"ratio": None, "budget": budget}
        write_result(result, tmp_path / policy)
        predictions = load_predictions(tmp_path / policy)
        names = ["none@0", *(f"{policy}@speedup={budget['asked']:g}" for budget in asked)]
        save_predictions(replace(predictions, points=np.array(names)), tmp_path / policy)
    data = Reader([tmp_path]).data()
    assert not data["notes"]
    pairs = {(tuple(found["first"]), tuple(found["second"])) for found in data["differences"]}
    assert pairs == {((0, 0), (r, i)) for r in (0, 1) for i in (1, 2)} | {((0, 1), (1, 1))}


def test_differences_are_those_of_compare(tmp_path: Path) -> None:
    results = write_sweep(tmp_path)
    found = Reader([tmp_path]).data()["differences"]
    assert len(found) == 3 * 2 + 3 * 2  # each reduced point to its run's unreduced one, each pair at two ratios
    runs = [load_predictions(tmp_path / str(i)) for i in range(3)]
    significant = set()
    for difference in found:
        (r, i), (s, j) = difference["first"], difference["second"]
        assert results[r]["points"][i]["ratio"] in (0.0, results[s]["points"][j]["ratio"])
        for metric, expected in compare(runs[r], i, runs[s], j).items():
            assert difference[metric]["difference"] == pytest.approx(expected["difference"], abs=1e-12)
            assert difference[metric]["ci"] == pytest.approx(expected["ci"], abs=1e-12)
            assert difference[metric]["significant"] == expected["significant"]
            significant.add(expected["significant"])
    assert significant == {True, False}


def test_equal_points_do_not_differ_wherever_they_stand() -> None:
    rng = np.random.default_rng(0)
    points = [{"top1": rng.random(101), "kl": rng.random(101)} for _ in range(9)]
    points += [points[0]]
    (found,) = compare_all(points, [(0, 9)], resamples=500)
    assert found["kl"] == {"difference": 0.0, "ci": [0.0, 0.0], "significant": False, "p": 1.0}
    assert compare_all(points, []) == []


def test_an_interval_that_ends_at_zero_contains_it() -> None:
    """One image of 300 differs: more than 2.5 % of the resamples lack it, and their difference is exactly 0."""
    first, second = np.ones(300), np.ones(300)
    second[7] = 0
    (found,) = compare_all([{"top1": first}, {"top1": second}], [(0, 1)])
    assert found["top1"]["ci"][1] == 0.0
    assert not found["top1"]["significant"]


def test_runs_on_other_images_are_not_paired_and_a_note_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "mtr")
    write_run(tmp_path / "b", "write", images=150, first_image=100)
    data = Reader([tmp_path]).data()
    (note,) = data["notes"]
    assert re.search(r"/a and .*/b cannot be paired: 200 and 150 images, 100 of them in common", note)
    assert all(difference["first"][0] == difference["second"][0] for difference in data["differences"])
    write_run(tmp_path / "b", "write", dataset="imagenette")
    assert Reader([tmp_path]).data()["notes"] == []  # nobody would pair these


def test_predictions_that_do_not_fit_are_a_note(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "mtr")
    write_run(tmp_path / "other", "mtr", ratios=(0.3,))
    (tmp_path / "other" / "predictions.npz").replace(tmp_path / "a" / "predictions.npz")
    write_run(tmp_path / "b", "write")
    (tmp_path / "b" / "predictions.npz").write_bytes(b"not a zip")
    data = Reader([tmp_path]).data()
    assert [run["paired"] for run in data["runs"]] == [False, False, False]
    assert data["differences"] == []
    other = "/a is not in the paired differences: its predictions.npz has the points none@0, mtr@0.3"
    assert any(other in note for note in data["notes"])
    assert any("/b is not in the paired differences" in note for note in data["notes"])


def test_the_unreduced_model_of_a_sweep_is_one_point(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    points = Reader([tmp_path]).data()["points"]
    assert len(points) == 1 + 3 * 2
    assert {"run": 1, "point": 0, "places": [(0, 0), (1, 0), (2, 0)]} in points  # run 1 has the median speed
    write_run(tmp_path / "other", "evit", images=100)
    assert len(Reader([tmp_path]).data()["points"]) == len(points) + 1 + 2  # another outcome is another point


@pytest.mark.parametrize(
    ("settings", "other"),
    [
        ({"timing": {"batch_size": 16}}, {"timing": {"batch_size": 1}}),
        ({"trainer": {"cuda_graph": True}}, {"trainer": {"cuda_graph": False}}),
        ({"trainer": {"precision": "bf16-mixed"}}, {"trainer": {}}),
        ({"ops": {"backend": "triton"}}, {"ops": None}),
    ],
)
def test_speeds_of_different_settings_are_different_points(
    settings: dict[str, Any], other: dict[str, Any], tmp_path: Path
) -> None:
    def unreduced() -> list[list[tuple[int, int]]]:
        points = Reader([tmp_path]).data()["points"]
        return [point["places"] for point in points if point["point"] == 0]

    results = [
        write_run(tmp_path / str(i), "mtr", config=config) for i, config in enumerate([settings, settings, other])
    ]
    assert unreduced() == [[(0, 0), (1, 0)], [(2, 0)]]
    for i, result in enumerate(results):
        for name in SPEEDS:
            result["points"][0].pop(name, None)
        write_result(result, tmp_path / str(i))
    assert unreduced() == [[(0, 0), (1, 0), (2, 0)]]  # nothing was timed


def test_a_model_that_one_run_timed_is_shown_once_with_its_speed(tmp_path: Path) -> None:
    untimed = write_run(tmp_path / "0", "mtr")
    for point in untimed["points"]:
        for name in SPEEDS:
            point.pop(name, None)
    write_result(untimed, tmp_path / "0")
    write_run(tmp_path / "1", "write", speed=70)
    shown = [point for point in Reader([tmp_path]).data()["points"] if point["point"] == 0]
    assert shown == [{"run": 1, "point": 0, "places": [(1, 0), (0, 0)]}]


def test_variants_are_named_by_what_differs(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "mtr")
    write_run(tmp_path / "b", "mtr", mtr={"merge": "prune"}, ratios=(0.3,))
    write_run(tmp_path / "c", "write")
    assert [run["variant"] for run in Reader([tmp_path]).data()["runs"]] == ["", "merge=prune", ""]
    write_run(tmp_path / "b", "mtr")
    name = tmp_path.name
    assert [run["variant"] for run in Reader([tmp_path]).data()["runs"]] == ["", "", ""]  # a and b are equal
    write_run(tmp_path / "b", "mtr", quality=2)
    assert [run["variant"] for run in Reader([tmp_path]).data()["runs"]] == [f"({name}/a)", f"({name}/b)", ""]


def test_runs_over_fewer_images_are_variants(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "mtr", images=200)
    write_run(tmp_path / "b", "mtr", images=100)
    assert [run["variant"] for run in Reader([tmp_path]).data()["runs"]] == ["images=200", "images=100"]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((200, 100), ["images=200", "images=100"]),
        ((100, 100), ["dataset.test_split=val", "dataset.test_split=train"]),
    ],
)
def test_a_choice_of_images_is_named_by_their_number_if_that_differs(
    counts: tuple[int, int], expected: list[str], tmp_path: Path
) -> None:
    for images, split in zip(counts, ["val", "train"], strict=True):
        write_run(tmp_path / split, "mtr", images=images, config={"dataset": {"test_split": split}})
    assert [run["variant"] for run in reversed(Reader([tmp_path]).data()["runs"])] == expected


def test_settings_that_do_not_matter_are_no_variants(tmp_path: Path) -> None:
    for i, name in enumerate(["a", "b"]):
        matters_not = {"resume": bool(i), "objective": name, "logger": {"name": name}, "pictures": i}
        trainer, dataset = {"enable_progress_bar": bool(i)}, {"root": name, "num_workers": i}
        mtr = {"policy": "mtr", "ratio": [0.2 + i / 10], "resolution": [96 - i]}
        config = {**matters_not, "mtr": mtr, "trainer": trainer, "dataset": dataset, "seed": i}
        write_run(tmp_path / name, "mtr", ratios=(0.2 + i / 10,), config=config)
    assert [run["variant"] for run in Reader([tmp_path]).data()["runs"]] == ["seed=0", "seed=1"]


def test_no_text_leaves_the_data_block(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script><!--<script>{{script}}"
    result = write_run(tmp_path / "run", "mtr", backbone=hostile, dataset="<b>&amp;\u2028")
    html = page(Reader([tmp_path]).data())
    assert html.count("<script>alert") == 0
    assert len(re.findall(r"</script>", html)) == 3
    assert data_block(html)["runs"][0]["result"]["backbone"] == result["backbone"]
    assert data_block(html)["runs"][0]["result"]["dataset"] == result["dataset"]


def test_only_its_own_scripts_may_run_and_nothing_may_be_loaded(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "mtr")
    data = Reader([tmp_path]).data()
    html = page(data)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none';")
    assert "connect-src 'none'" in policy
    assert "connect-src 'self'" in page(data, live=True)
    (own,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    (plotly,) = re.findall(r'id="plotly">(.*?)</script>', html)
    for script in (own, gzip.decompress(base64.b64decode(plotly)).decode()):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2]


def test_numbers_that_are_not_finite_are_null() -> None:
    assert to_json({"kl": float("nan"), "runs": [float("inf"), 1.5]}) == '{"kl": null, "runs": [null, 1.5]}'


def test_pictures_are_embedded_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, name)
        (tmp_path / name / "pictures").mkdir()
        (tmp_path / name / "pictures" / "tokens.png").write_bytes(PIXEL)
    (tmp_path / "a" / "pictures" / "notes.txt").write_text("no picture")
    (tmp_path / "a" / "pictures" / "large.gif").write_bytes(b"GIF89a" + bytes(2000))
    monkeypatch.setattr("mtr_lab.report.dashboard.runs.PICTURE_BYTES", 1000)
    data = Reader([tmp_path]).data()
    (picture,) = data["runs"][0]["pictures"]
    assert picture["name"] == "tokens"
    content = base64.b64decode(picture["uri"].removeprefix("data:image/webp;base64,"))
    assert Image.open(io.BytesIO(content)).size == (1, 1)
    assert ["large.gif is left out" in note for note in data["notes"]] == [True]
    monkeypatch.setattr("mtr_lab.report.dashboard.reader.REPORT_PICTURE_BYTES", len(picture["uri"]) + 10)
    data = Reader([tmp_path]).data()
    assert [len(run["pictures"]) for run in data["runs"]] == [1, 0]
    assert any(note.startswith("1 pictures are left out") for note in data["notes"])


def test_links_among_the_pictures_are_not_followed(tmp_path: Path) -> None:
    """A run from elsewhere may hold a link to any file of the reader's."""
    secret = tmp_path / "secret"
    secret.write_bytes(PIXEL)
    for name in ("a", "b"):
        write_run(tmp_path / name, name)
    (tmp_path / "a/pictures").mkdir()
    (tmp_path / "a/pictures/x.png").symlink_to(secret)
    (tmp_path / "a/pictures/tokens.png").write_bytes(PIXEL)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/y.png").write_bytes(PIXEL)
    (tmp_path / "b/pictures").symlink_to(tmp_path / "elsewhere")
    runs = Reader([tmp_path / "a", tmp_path / "b"]).data()["runs"]
    assert [len(run["pictures"]) for run in runs] == [1, 0]


def test_a_picture_that_cannot_be_read_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", "mtr")
    (tmp_path / "run" / "pictures" / "folder.png").mkdir(parents=True)
    (tmp_path / "run" / "pictures" / "tokens.png").write_bytes(PIXEL)

    def refuse(path: Path, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as broken:
        broken.setattr("mtr_lab.report.dashboard.thumbnails.open_image", refuse)
        data = build([tmp_path / "run"], tmp_path / "report.html")
    assert data["runs"][0]["pictures"] == []
    assert data["notes"] == ["run: tokens.png is left out because it cannot be read: Input/output error."]
    assert [picture["name"] for picture in Reader([tmp_path]).data()["runs"][0]["pictures"]] == ["tokens"]


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_a_link_among_the_pictures_is_not_followed(tmp_path: Path, linked: str) -> None:
    """A report is passed on, and a link may lead to any file of the machine."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "tokens.png").write_bytes(b"secret")
    write_run(tmp_path / "run", "mtr")
    pictures = tmp_path / "run" / "pictures"
    if linked == "folder":
        pictures.symlink_to(tmp_path / "private")
    else:
        pictures.mkdir()
        (pictures / "tokens.png").symlink_to(tmp_path / "private" / "tokens.png")
    data = build([tmp_path / "run"], tmp_path / "report.html")
    assert data["runs"][0]["pictures"] == []
    assert data["notes"] == ["run: tokens.png is left out because it is a link."]
    assert base64.b64encode(b"secret").decode() not in (tmp_path / "report.html").read_text()


def test_a_result_that_cannot_be_read_is_not_the_reports_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, "mtr")

    def refuse(file: Path, name: str) -> None:
        raise OSError(errno.EIO, "Input/output error", str(file))

    monkeypatch.setattr("mtr_lab.report.dashboard.reader.read_run", refuse)
    with pytest.raises(OSError, match="result.json"):
        main([str(tmp_path), "-o", str(tmp_path / "report.html")])


def test_a_file_that_is_no_result_is_a_note_in_a_folder_and_an_error_by_name(tmp_path: Path) -> None:
    write_run(tmp_path / "good", "mtr")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "result.json").write_text("{")
    data = Reader([tmp_path]).data()
    assert len(data["runs"]) == 1
    assert "bad/result.json is not a result" in data["notes"][0]
    for path in (tmp_path / "bad", tmp_path / "bad" / "result.json"):
        with pytest.raises(UserError, match="is not a result"):
            Reader([path]).data()


def test_the_program_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path / "sweep")
    main([str(tmp_path / "sweep"), "-o", str(tmp_path / "report.html")])
    assert "3 runs, 7 points" in capsys.readouterr().out
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_without_an_output_the_report_is_report_html(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", "mtr")
    monkeypatch.chdir(tmp_path)
    main(["run"])
    assert Path("report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "-o", "r.html"], "mtr_lab: missing does not exist. Give result.json files"),
        (["empty", "-o", "r.html"], "mtr_lab: nothing to show. No result.json in empty."),
        (["wrong.json", "-o", "r.html"], "mtr_lab: wrong.json is not a result"),
        (["run", "-o", "run/result.json/r.html"], "mtr_lab: cannot write run/result.json/r.html"),
        (["run", "--live", "--port", "99999"], "mtr_lab: cannot serve on port 99999"),
        (["run", "wandb="], "wandb= is not a project: give wandb=PROJECT or wandb=ENTITY/PROJECT"),
        (["run", "wandb=team/"], "wandb=team/ is not a project"),
        (["run", "wandb=/lab"], "wandb=/lab is not a project"),
        (["run", "wandb=team/lab/runs", "-o", "r.html"], "wandb=team/lab/runs is not a project"),
        ([], "the following arguments are required: RESULTS"),
    ],
)
def test_a_mistake_is_one_message_and_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("wrong.json").write_text('{"schema": 1}')
    write_run(tmp_path / "run", "mtr")
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("r.html").exists()


def test_without_plotly_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, "mtr")
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(UserError, match=r"pip install 'mtr-lab\[report\]'"):
        build([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("package", "options", "extra"),
    [
        ("plotly", [], "report"),
        ("plotly", ["--live", "--port", "0"], "report"),
        ("matplotlib", ["-o", "figure.pdf"], "report"),
        ("wandb_workspaces", ["wandb=project"], "workspaces"),
    ],
)
def test_a_missing_package_is_said_before_results_are_read(
    package: str, options: list[str], extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit):
        main(["a-folder-that-does-not-exist", *options])
    assert f"needs the package {package}: pip install 'mtr-lab[{extra}]'" in capsys.readouterr().err


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    (tmp_path / "sweep").mkdir()
    with make_server([tmp_path / "sweep"], 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def get(server: ThreadingHTTPServer, path: str, tag: str = "") -> tuple[int, str, str]:
    """Status, ETag and content."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{path}", headers={"If-None-Match": tag})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.headers["ETag"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("ETag", ""), error.read().decode()


def get_as(server: ThreadingHTTPServer, host: str) -> tuple[int, str]:
    """Status and content of the data, asked for under the name of ``host``."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("GET", "/data.json", headers={"Host": host})
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, content


def test_the_server_follows_a_sweep(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    status, tag, content = get(server, "/data.json")
    assert status == 200
    assert json.loads(content)["runs"] == []
    assert get(server, "/data.json", tag)[0] == 304
    result = write_run(tmp_path / "sweep" / "0", "mtr")
    status, newer, content = get(server, "/data.json", tag)
    assert status == 200
    assert newer != tag
    assert json.loads(content)["runs"][0]["result"] == json.loads(json.dumps(result))
    assert get(server, "/data.json", newer)[0] == 304
    html = get(server, "/")[2]
    assert 'data-live="true"' in html
    assert data_block(html) == json.loads(content)
    assert get(server, "/../../etc/passwd")[0] == 404
    (tmp_path / "sweep").rename(tmp_path / "gone")
    status, tag, content = get(server, "/data.json", newer)
    assert (status, tag) == (503, "")
    assert "does not exist" in content


def test_an_answer_is_of_one_time(tmp_path: Path) -> None:
    """The answer to one request does not change when another request reads newer results."""
    source = _Source([tmp_path])
    older = source.refresh()
    assert source.refresh() is older
    write_run(tmp_path / "0", "mtr")
    newer = source.refresh()
    for snapshot, runs in [(older, 0), (newer, 1)]:
        assert len(snapshot.data["runs"]) == runs
        assert json.loads(snapshot.json) == json.loads(to_json(snapshot.data))
        assert snapshot.tag == f'"{hashlib.sha256(snapshot.json).hexdigest()}"'


def test_only_this_machines_names_are_answered(server: ThreadingHTTPServer) -> None:
    port = server.server_port
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert get_as(server, host)[0] == 200
    for host in (
        f"elsewhere.example:{port}",
        f"localhost.elsewhere.example:{port}",
        "localhost",
        f"localhost:{port + 1}",
    ):
        assert get_as(server, host) == (403, f"open http://localhost:{port}")


def test_it_serves_this_machine_only(server: ThreadingHTTPServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
