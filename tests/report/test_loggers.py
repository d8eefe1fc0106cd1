import csv
import json
import struct
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from composed import composed
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record
from wandb_server import WandbServer

from mtr_lab.report.loggers import _flat, log_result, wandb_logger
from mtr_lab.report.wandb_login import wandb_mode
from mtr_lab.results.schema import Result, write_result

WANDB_VARIABLES = (
    "WANDB_MODE",
    "WANDB_API_KEY",
    "WANDB_IDENTITY_TOKEN_FILE",
    "WANDB_BASE_URL",
    "WANDB_CONFIG_DIR",
    "NETRC",
)


@pytest.fixture
def logged_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without a login to Weights & Biases."""
    home = tmp_path / "home"
    home.mkdir()
    for name in WANDB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(home)
    return home


def csv_rows(logger: CSVLogger) -> list[dict[str, str]]:
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_row_a_ratio_that_starts_unreduced(result: Result, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    log_result(result, [], logger)
    rows = csv_rows(logger)
    assert [int(row["step"]) for row in rows] == [0, 20, 40]
    assert [float(row["mtr/top1"]) for row in rows] == [0.805, 0.801, 0.789]
    assert [float(row["mtr/kl"]) for row in rows] == [0.0, 0.0312, 0.149]
    assert float(rows[2]["mtr/latency_p95"]) == 25.9
    assert not [name for name in rows[0] if name.startswith("none/")]
    assert "ratio" in (Path(logger.log_dir) / "hparams.yaml").read_text()


def test_policies_share_rows_and_null_is_left_out(result: Result, tmp_path: Path) -> None:
    result["points"].append({**result["points"][2], "policy": "hsa", "kl": None})
    result["points"].append({**result["points"][2], "policy": "hsa", "ratio": None, "reduction": 0.31})
    logger = CSVLogger(tmp_path)
    log_result(result, [], logger)
    rows = {int(row["step"]): row for row in csv_rows(logger)}
    assert sorted(rows) == [0, 20, 31, 40]
    assert rows[0]["hsa/top1"] == rows[0]["mtr/top1"] == "0.805"
    assert rows[40]["hsa/kl"] == ""
    assert rows[31]["mtr/top1"] == ""


def test_a_budget_is_logged_as_numbers(result: Result) -> None:
    budget = {"key": "speedup", "asked": 1.5, "promised": 1.53, "measured": 1.48}
    flat = _flat(result["points"][1] | {"budget": budget})
    assert {key: value for key, value in flat.items() if "speedup" in key} == {
        "speedup_asked": 1.5,
        "speedup_promised": 1.53,
        "speedup_measured": 1.48,
    }
    assert "budget" not in flat


def test_an_unreduced_model_alone_is_logged_as_itself(result: Result, tmp_path: Path) -> None:
    result["points"] = result["points"][:1]
    logger = CSVLogger(tmp_path)
    log_result(result, [], [logger])
    assert csv_rows(logger)[0]["none/top1"] == "0.805"


def test_tensorboard_draws_a_curve_over_the_reduction(result: Result, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    log_result(result, [], logger)
    events = EventAccumulator(logger.log_dir).Reload().Scalars("mtr/agreement")
    assert [event.step for event in events] == [0, 20, 40]
    assert [event.value for event in events] == pytest.approx([1.0, 0.9, 0.9])


@pytest.mark.parametrize(
    ("name", "written"),
    [("csv", "metrics.csv"), ("tensorboard", "tensorboard/events*"), ("wandb", "wandb/offline-run-*/*.wandb")],
)
def test_configured_loggers_write_into_the_run_folder(
    name: str, written: str, result: Result, tmp_path: Path, logged_out: Path
) -> None:
    config = composed("config", f"logger={name}").logger[name]
    log_result(result, [], instantiate(config, save_dir=str(tmp_path)))
    assert len(list(tmp_path.glob(written))) == 1


def test_no_loggers_are_fine(result: Result) -> None:
    log_result(result, [], [])


def test_wandb_without_a_login_keeps_table_and_files_on_disk(
    result: Result, tmp_path: Path, logged_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = wandb_logger("mtr_lab", str(tmp_path))
    loggers: list[Logger] = [logger, CSVLogger(tmp_path)]
    log_result(result, [write_result(result, tmp_path)], loggers)

    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    stored = b"".join(record.SerializeToString() for record in wandb_records(tmp_path))
    for text in (b"mtr@0.4/top1", b"points.table.json", b"result.json"):
        assert text in stored
    (table,) = run.glob("files/media/table/points*.table.json")
    assert '"kl_hi"' in table.read_text()


def wandb_records(folder: Path) -> list[Record]:
    """Read what an offline run recorded: W&B's messages in LevelDB's log format (blocks of 32 KiB).

    Each chunk has CRC (4 bytes), length (2) and type (1): 1 whole, 2 first, 3 middle, 4 last.
    """
    (file,) = folder.glob("**/offline-run-*/*.wandb")
    for _ in range(600):  # W&B's own process writes the last records after the run has finished
        content = file.read_bytes()
        records = parse_records(content)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end")


def parse_records(content: bytes) -> list[Record]:
    assert content[:4] == b":W&B"
    records, position, message = [], 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        if kind == 0:
            break
        if position + 7 + length > len(content):
            break
        message += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(message))
            message = b""
    return records


def named(items: Iterable[Any]) -> dict[str, Any]:
    """W&B's key-value pairs, keys that are paths as nested dicts, the values parsed."""
    found: dict[str, Any] = {}
    for item in items:
        *path, last = item.nested_key or [item.key]
        node = found
        for part in path:
            node = node.setdefault(part, {})
        node[last] = json.loads(item.value_json)
    return found


def test_wandb_records_group_config_metrics_charts_pictures_and_files(
    result: Result, tmp_path: Path, logged_out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (8, 6), "red").save(pictures / "tench.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    (pictures / "link.png").symlink_to(pictures / "tench.png")  # links are not followed
    logger = wandb_logger("lab", str(tmp_path), group="x" * 100 + "/sweeps/" + "y" * 100)
    log_result(result, [write_result(result, tmp_path)], logger, pictures)
    assert "broken.png is not logged" in capsys.readouterr().out

    records = wandb_records(tmp_path)
    kinds: dict[str, list[Any]] = {}
    for record in records:
        kind = record.WhichOneof("record_type")
        kinds.setdefault(kind, []).append(getattr(record, kind))
    run = kinds["run"][0]
    assert run.project == "lab"
    assert run.run_group == ("x" * 100 + "/sweeps/" + "y" * 100)[-128:]
    config: dict[str, Any] = {}
    for update in [run.config, *kinds["config"]]:
        config |= named(update.update)
    assert config["backbone"] == "vim_s"
    assert config["config"] == result["config"]
    assert config["weights"] == result["weights"]
    history = [named(row.item) for row in kinds["history"]]
    assert [row["mtr/top1"] for row in history if "mtr/top1" in row] == [0.805, 0.801, 0.789]
    summary = {}
    for update in kinds["summary"]:
        summary |= named(update.update)
    assert summary["mtr@0.4/kl"] == 0.149

    media = {key: value for row in history for key, value in row.items() if isinstance(value, dict)}
    (run_folder,) = (tmp_path / "wandb").glob("offline-run-*")

    def table(key: str) -> dict[str, Any]:
        return json.loads((run_folder / "files" / media[key]["path"]).read_text())

    assert table("tokens_table")["columns"] == ["point", "block", "tokens"]
    blocks = [row[1:] for row in table("tokens_table")["data"] if row[0] == "mtr@0.4"]
    assert blocks == list(map(list, enumerate(result["points"][2]["tokens"])))
    assert table("trade_off_table")["data"] == [
        ["mtr", point["reduction"], point["top1"]] for point in result["points"]
    ]
    charts = [named(update.update).get("_wandb", {}).get("visualize", {}) for update in kinds["config"]]
    assert {name for chart in charts for name in chart} == {"tokens", "trade_off"}
    assert Image.open(run_folder / "files" / media["pictures/tench"]["path"]).size == (8, 6)
    assert "pictures/broken" not in media
    (artifact,) = [artifact for artifact in kinds["artifact"] if artifact.type == "result"]
    assert [entry.path for entry in artifact.manifest.contents] == ["result.json"]


def assert_arrived(server: WandbServer, result: Result) -> None:
    first, *_, last = server.asked("upsertBucket")
    assert (first["project"], first["groupName"]) == ("lab", "sweeps/night")
    config = {key: item["value"] for key, item in json.loads(last["config"]).items()}
    assert config["backbone"] == "vim_s"
    assert config["config"] == result["config"]
    assert config["weights"] == result["weights"]
    history = server.lines("wandb-history.jsonl")
    assert [row["mtr/top1"] for row in history if "mtr/top1" in row] == [0.805, 0.801, 0.789]
    assert server.lines("wandb-summary.json")[-1]["mtr@0.4/kl"] == 0.149
    assert server.streamed[-1]["complete"]
    assert server.streamed[-1]["exitcode"] == 0
    assert [name for name in server.files if name.startswith("media/table/points")]
    name = f"result-{first['name']}"
    assert name in [artifact["artifactID"] for artifact in server.asked("commitArtifact")]
    assert json.loads(server.files[f"{name}/result.json"]) == result
    assert list(json.loads(server.files[f"{name}/wandb_manifest.json"])["contents"]) == ["result.json"]


@pytest.mark.timeout(60)  # it tries again for hours
def test_wandb_uploads_a_run_as_it_goes(
    result: Result, tmp_path: Path, logged_out: Path, wandb_server: WandbServer
) -> None:
    log_result(result, [write_result(result, tmp_path)], wandb_logger("lab", str(tmp_path), group="sweeps/night"))
    assert not list(tmp_path.glob("wandb/offline-run-*"))
    assert_arrived(wandb_server, result)


@pytest.mark.timeout(60)
def test_wandb_sync_uploads_an_offline_run(
    result: Result, tmp_path: Path, logged_out: Path, wandb_server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as offline:
        offline.setenv("WANDB_MODE", "offline")
        log_result(result, [write_result(result, tmp_path)], wandb_logger("lab", str(tmp_path), group="sweeps/night"))
    wandb_records(tmp_path)  # waits for the last one
    assert not wandb_server.calls
    (run,) = tmp_path.glob("wandb/offline-run-*")
    sync = subprocess.run([sys.executable, "-m", "wandb", "sync", run], capture_output=True, text=True, timeout=50)
    assert sync.returncode == 0, sync.stderr
    assert_arrived(wandb_server, result)


def test_wandb_runs_of_a_sweep_are_separate(result: Result, tmp_path: Path, logged_out: Path) -> None:
    for job in ("0", "1"):
        (tmp_path / job).mkdir()
        log_result(result, [], WandbLogger(save_dir=str(tmp_path / job), mode="offline"))
        assert len(list((tmp_path / job / "wandb").glob("offline-run-*/*.wandb"))) == 1


@pytest.mark.parametrize(
    ("variables", "files", "expected"),
    [
        ({}, {}, "offline"),
        ({"WANDB_API_KEY": "k" * 40}, {}, "online"),
        ({"WANDB_API_KEY": ""}, {}, "offline"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, {}, "offline"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "disabled"}, {}, "offline"),
        ({"WANDB_MODE": "online"}, {}, "online"),
        ({}, {".netrc": "machine api.wandb.ai login user password secret"}, "online"),
        ({}, {".netrc": "machine github.com login user password secret"}, "offline"),
        ({}, {".netrc": "not a netrc file"}, "offline"),
        ({"WANDB_BASE_URL": "https://w.lab"}, {".netrc": "machine w.lab login user password secret"}, "online"),
        ({"WANDB_BASE_URL": "https://w.lab"}, {".netrc": "machine api.wandb.ai login u password p"}, "offline"),
        ({"NETRC": "other"}, {".netrc": "machine api.wandb.ai login u password p"}, "offline"),
        ({}, {".config/wandb/settings": "[default]\napi_key = secret\n"}, "online"),
        ({"WANDB_API_KEY": "k" * 40}, {"wandb/settings": "[default]\nmode = offline\n"}, "offline"),
        ({"WANDB_CONFIG_DIR": "elsewhere"}, {"elsewhere/settings": "[default]\napi_key = secret\n"}, "online"),
        ({}, {".config/wandb/settings": "broken"}, "offline"),
    ],
)
def test_wandb_is_online_only_when_logged_in(
    variables: dict[str, str], files: dict[str, str], expected: str, logged_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (logged_out / name).parent.mkdir(parents=True, exist_ok=True)
        (logged_out / name).write_text(text)
        (logged_out / name).chmod(0o600)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert wandb_mode() == expected


def test_disabling_wandb_is_respected(
    result: Result, tmp_path: Path, logged_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log_result(result, [write_result(result, tmp_path)], wandb_logger("mtr_lab", str(tmp_path)))
    assert not (tmp_path / "wandb").exists()


def test_a_run_that_cannot_be_logged_is_closed(
    result: Result, logged_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next job of a sweep, in the same process, would continue this run."""
    monkeypatch.setattr("mtr_lab.report.loggers._log_to_wandb", lambda *_: 1 / 0)
    ids = []
    for _ in range(2):
        logger = wandb_logger("lab", str(tmp_path))
        ids.append(logger.experiment.id)
        with pytest.raises(ZeroDivisionError):
            log_result(result, [], logger)
    assert ids[0] != ids[1]
