"""``python -m mtr_lab -m``: jobs that are computed, finished before, shared between processes, or failed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import hydra
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from small_run import SMALL

from mtr_lab import create_model
from mtr_lab.__main__ import main
from mtr_lab.cli.folders import job_folder
from mtr_lab.configuration import CONF
from mtr_lab.results import keys
from mtr_lab.results.predictions_file import load_predictions
from mtr_lab.results.schema import read_result
from mtr_lab.tasks.classification.evaluation import ClassifierEvaluation

ROOT = Path(__file__).parent.parent


@pytest.fixture
def sweep(run_program, tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """Run the default program as a sweep in ``tmp_path / "sweep"``."""

    def run(*overrides: str, small: list[str] = SMALL) -> SimpleNamespace:
        run = run_program(main, "hydra.mode=MULTIRUN", f"hydra.sweep.dir={tmp_path / 'sweep'}", *small, *overrides)
        run.folder = tmp_path / "sweep"
        return run

    return run


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the batches that are run, by the name of the operating point."""
    counts: Counter[str] = Counter()
    forward_at = ClassifierEvaluation.forward_at

    def counted(self, point, images):
        counts[point.name] += 1
        return forward_at(self, point, images)

    monkeypatch.setattr(ClassifierEvaluation, "forward_at", counted)
    return counts


def job(folder: Path, part: str) -> Path:
    """The folder of the one job whose name contains ``part``."""
    (path,) = [path for path in folder.iterdir() if part in path.name]
    return path


def test_seeds_are_swept_where_a_policy_draws_at_random(sweep, passes: Counter[str]) -> None:
    """The table at the end has one row per ratio; without random draws every seed is the same evaluation."""
    run = sweep("reduction=mtr,random", "mtr.seed=0,1", "mtr.ratio=0.2")
    assert run.code == 0, run.err
    assert "4 points: 3 computed, 1 finished before" in run.out
    assert passes == {"none@0": 2, "mtr@0.2": 2, "random@0.2": 4}
    _, end = run.out.split("4 points: ")
    assert [line.split()[0] for line in end.splitlines() if "20." in line] == ["random", "2"]
    assert "2 seeds" in end
    files = sorted(run.folder.glob("*/result.json"))
    mtr, *random = sorted(map(read_result, files), key=lambda result: result["config"]["mtr"]["score"])
    assert "seed" not in mtr["config"]["mtr"]
    assert [result["config"]["mtr"]["seed"] for result in random] == [0, 1]
    assert random[0]["key"]["config"] != random[1]["key"]["config"]
    first, second = (load_predictions(folder) for folder in run.folder.glob("*=random*"))
    assert np.array_equal(first.log_probs[0], second.log_probs[0])
    assert not np.array_equal(first.log_probs[1], second.log_probs[1])


def test_a_sweep_goes_on_where_it_stopped(sweep, passes: Counter[str]) -> None:
    first = sweep("reduction=mtr,random", "mtr.ratio=0.2")
    assert first.code == 0, first.err
    assert "2 points: 2 computed" in first.out
    files = {path: path.stat().st_mtime_ns for path in first.folder.glob("*/result.json")}
    assert len(files) == 2

    again = sweep("reduction=mtr,random,hsa", "mtr.ratio=0.2", "dataset.num_workers=1")
    assert again.code == 0, again.err
    assert "3 points: 1 computed, 2 finished before" in again.out
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert passes == {"none@0": 2, "mtr@0.2": 2, "random@0.2": 2, "hsa@0.2": 2}
    assert not [path for path in again.folder.iterdir() if path.name.startswith(".sweep")]

    sweep("reduction=mtr,random", "mtr.ratio=0.2", "resume=false")
    assert passes == {"none@0": 2, "mtr@0.2": 4, "random@0.2": 4, "hsa@0.2": 2}


def test_a_finished_result_is_logged_once_by_a_new_logger(sweep) -> None:
    folder = sweep("mtr.ratio=0.2").folder
    assert "1 finished" in sweep("mtr.ratio=0.2", "logger=csv").out
    (metrics,) = folder.glob("*/metrics.csv")
    metrics.unlink()
    assert "1 finished" in sweep("mtr.ratio=0.2", "logger=csv").out
    assert not metrics.exists()


def test_a_sweep_is_a_group_in_wandb(sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = []
    monkeypatch.setattr("mtr_lab.report.loggers.WandbLogger", lambda **options: groups.append(options["group"]))
    monkeypatch.setattr("mtr_lab.evaluation.run.log_result", lambda *args, **options: None)
    folder = sweep("logger=wandb", "mtr.ratio=0.2,0.3").folder
    assert groups == [str(folder)] * 2


def test_the_shared_unreduced_model_changes_no_digit(sweep, run_program) -> None:
    folder = sweep("reduction=mtr,hsa", "mtr.ratio=0.2").folder
    results = {path.parent: read_result(path) for path in folder.glob("*/result.json")}
    assert sorted(result["unreduced"]["reused"] for result in results.values()) == [False, True]
    assert len({result["unreduced"]["key"] for result in results.values()}) == 1
    alone = run_program(main, *SMALL, "reduction=hsa", "mtr.ratio=0.2").folder
    shared, single = load_predictions(job(folder, "hsa")), load_predictions(alone)
    assert shared.points.tolist() == single.points.tolist() == ["none@0", "hsa@0.2"]
    assert np.array_equal(shared.log_probs, single.log_probs)
    assert read_result(job(folder, "hsa"))["points"] == read_result(alone)["points"]


@pytest.mark.parametrize(
    ("change", "unreduced"),
    [
        (["mtr.interval=1"], 2),
        (["timing.seconds=3"], 2),
        (["seed=1"], 4),  # of random weights
        (["dataset.batch_size=2"], 4),
        (["ops.backend=reference"], 4),
        (["backbone.d_state=8"], 4),
        (["mtr.ratio=0"], 2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_the_unreduced_model_is_run_anew_only_if_it_changes(
    sweep, passes: Counter[str], change: list[str], unreduced: int
) -> None:
    sweep("mtr.ratio=0.2")
    run = sweep("mtr.ratio=0.2", *change)
    assert "1 computed" in run.out
    assert passes["none@0"] == unreduced
    assert load_predictions(max(run.folder.glob("*/result.json"), key=os.path.getmtime).parent).points[0] == "none@0"


def test_other_images_other_code_or_other_settings_are_not_finished(
    run_program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Path(str(CONF.parent / "mtr_lab" / "assets" / "imagenette_sample"))
    root = tmp_path / "images"
    for image in [next(folder.iterdir()) for folder in sorted(sample.iterdir()) if folder.is_dir()]:
        (root / image.parent.name).mkdir(parents=True)
        (root / image.parent.name / "a.JPEG").write_bytes(image.read_bytes())

    def run(*overrides: str) -> str:
        data = ("dataset=imagefolder", f"dataset.root={root}", "dataset.num_workers=0")
        done = run_program(main, *SMALL, *data, "mtr.ratio=0.2", *overrides)
        assert done.code == 0, done.err
        return done.out

    assert "wrote" in run()
    assert "finished before" in run()
    assert "wrote" not in run()
    image = next(root.rglob("*.JPEG"))
    os.utime(image, ns=(1, 1))
    assert "is of other data; computing it again" in run()
    assert "is of other config; computing it again" in run("mtr.interval=1")
    monkeypatch.setattr(keys, "code_hash", lambda: "another commit")
    out = run("mtr.interval=1")
    assert "is of other code; computing it again" in out
    assert "wrote" in out
    moved = root.rename(tmp_path / "elsewhere")
    root = moved
    assert "finished before" in run("mtr.interval=1")


def test_the_code_is_what_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text("1")
    monkeypatch.setattr(keys, "_PACKAGE", tmp_path)
    found = []
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.py", ""), ("c.txt", "")):
        (tmp_path / name).write_text(text)
        found.append(keys.code_hash.__wrapped__())
    assert len(set(found)) == 3
    assert found[2] == found[3]


def test_failed_jobs_are_listed_and_the_others_computed(
    sweep, passes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sweep("mtr.ratio=0.99,0.2")
    assert run.code == 2
    assert "2 points: 1 computed, 1 failed" in run.out
    assert "mtr.ratio=0.99 is out of reach" in run.out
    assert "Traceback" not in run.err
    error = json.loads((job(run.folder, "0.99") / "error.json").read_text())
    assert error["users_mistake"] is True
    assert "out of reach" in error["error"]
    assert not (job(run.folder, "mtr.ratio=0.2") / "error.json").exists()

    def broken(*args):
        raise ZeroDivisionError("by zero")

    with monkeypatch.context() as patch:
        patch.setattr("mtr_lab.evaluation.run.write_run", broken)
        run = sweep("mtr.ratio=0.2,0.3,0.99")
    assert run.code == 1
    assert "3 points: 1 finished before (resume=false computes them again), 2 failed" in run.out
    record = json.loads((job(run.folder, "mtr.ratio=0.3") / "error.json").read_text())
    assert record["type"] == "ZeroDivisionError"
    assert "in broken" in record["traceback"]

    run = sweep("mtr.ratio=0.3")
    assert run.code == 0
    assert not (job(run.folder, "mtr.ratio=0.3") / "error.json").exists()


def test_anchors_are_printed_beside_what_is_published(sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = CONF.parent / "mtr_lab" / "assets" / "imagenette_sample"
    for image in sample.glob("n*/*0.JPEG"):
        (tmp_path / "imagenet" / image.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, tmp_path / "imagenet" / image.parent.name)
    geometry = {"img_size": 32, "depth": 2, "embed_dim": 16}

    def download(repository: str, file: str, revision: str) -> Path:
        family = "vim_ti" if "Vim" in repository and "Video" not in repository else "videomamba_ti"
        torch.save({"model": create_model(family, **geometry).state_dict()}, tmp_path / file)
        return tmp_path / file

    monkeypatch.setattr("mtr_lab.backbones.hub.download", download)
    small = [*(f"backbone.{key}={value}" for key, value in geometry.items()), "trainer.enable_progress_bar=false"]
    data = [f"dataset.root={tmp_path / 'imagenet'}", "dataset.num_workers=0"]
    params = "hydra.sweeper.params={backbone: 'vim_ti,vim_b,videomamba_m'}"
    run = sweep("experiment=anchors", params, *data, small=small)
    assert run.code == 0, run.err
    for text in (
        "vim_ti: published top-1 76.1 %",
        "vim_b: published top-1 81.9 %",
        "videomamba_m: published top-1 82.8 %",
    ):
        assert re.search(rf"{text}, measured \d+\.\d\d % on \d+ images", run.out)
    missing = sweep("experiment=anchors", params, "dataset.root=/nowhere", small=small)
    assert missing.code == 2
    assert "dataset 'imagenet', dataset.root: /nowhere is not a directory" in missing.out


def damage_result(folder: Path) -> None:
    (folder / "result.json").write_text((folder / "result.json").read_text()[:-200])


def damage_predictions(folder: Path) -> None:
    content = bytearray((folder / "predictions.npz").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (folder / "predictions.npz").write_bytes(content)


def swap_predictions(folder: Path) -> None:
    (folder / "predictions.npz").write_bytes(next(folder.parent.glob("unreduced/*/predictions.npz")).read_bytes())


@pytest.mark.parametrize("damage", [damage_result, damage_predictions, swap_predictions])
def test_an_incomplete_result_is_computed_again(sweep, damage: Callable[[Path], None]) -> None:
    folder = sweep("mtr.ratio=0.2").folder
    (found,) = [path.parent for path in folder.glob("*/result.json")]
    before = load_predictions(found)
    damage(found)
    run = sweep("mtr.ratio=0.2")
    assert run.code == 0
    assert "computing it again" in run.out
    assert "1 computed" in run.out
    assert np.array_equal(load_predictions(found).log_probs, before.log_probs)
    assert "1 finished" in sweep("mtr.ratio=0.2").out


def test_damaged_unreduced_predictions_are_computed_again(sweep, passes: Counter[str]) -> None:
    folder = sweep("mtr.ratio=0.2").folder
    damage_predictions(next(folder.glob("unreduced/*")))
    run = sweep("mtr.ratio=0.3")
    assert "the unreduced model's predictions cannot be trusted" in run.out
    assert run.code == 0
    assert passes["none@0"] == 4
    assert len(load_predictions(next(folder.glob("unreduced/*"))).points) == 1


def test_a_crash_while_writing_leaves_no_result(sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sweep("mtr.ratio=0.2").folder
    with monkeypatch.context() as patch:
        patch.setattr("mtr_lab.results.store.write_result", lambda *args: 1 / 0)
        sweep("mtr.ratio=0.2", "resume=false")
    assert not list(folder.glob("*/result.json"))
    assert "1 computed" in sweep("mtr.ratio=0.2").out


HOLD = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(300)
"""


def hold(lock: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE)
    assert process.stdout.readline()
    return process


def test_a_folder_in_use_is_left_alone_until_its_owner_dies(sweep, run_program) -> None:
    folder = sweep("mtr.ratio=0.2").folder
    (found,) = [path.parent for path in folder.glob("*/result.json")]
    (found / "result.json").unlink()
    owner = hold(found / ".lock")
    run = sweep("mtr.ratio=0.2")
    assert run.code == 0
    assert "1 points: 1 being computed by another process" in run.out
    assert not (found / "result.json").exists()
    assert not (found / "error.json").exists()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert "1 computed" in sweep("mtr.ratio=0.2").out


def test_a_single_run_does_not_write_to_a_folder_in_use(run_program) -> None:
    folder = run_program(main, *SMALL, "mtr.ratio=0.2").folder
    owner = hold(folder / ".lock")
    run = run_program(main, *SMALL, "mtr.ratio=0.3")
    owner.kill()
    owner.wait()
    assert run.code == 2
    assert "another process is computing this" in run.err
    assert read_result(folder)["points"][1]["ratio"] == 0.2


def test_a_job_that_waits_for_the_unreduced_model_runs_it_if_the_other_fails(
    sweep, passes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sweep("mtr.ratio=0.2").folder
    (shared,) = folder.glob("unreduced/*")
    (shared / "predictions.npz").unlink()
    owner = hold(shared / ".lock")
    gather = ClassifierEvaluation.gather

    def gathered(evaluation: ClassifierEvaluation) -> None:
        gather(evaluation)
        threading.Timer(0.5, owner.kill).start()  # the other one only waits by now

    monkeypatch.setattr(ClassifierEvaluation, "gather", gathered)
    run = sweep("mtr.ratio=0.3")
    assert run.code == 0
    assert passes == {"none@0": 4, "mtr@0.2": 2, "mtr@0.3": 2}
    assert owner.wait() == -signal.SIGKILL
    assert load_predictions(job(folder, "mtr.ratio=0.3")).points.tolist() == ["none@0", "mtr@0.3"]


@pytest.mark.slow
def test_two_sweeps_share_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mtr_lab", "-m", f"hydra.sweep.dir={tmp_path / 'sweep'}", *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(
            [*command, "mtr.ratio=0.1,0.2,0.3,0.4"], env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path
        )
        for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(output.count("result.json") for output in outputs) == 4  # every result is written once, by one of them
    results = [read_result(path) for path in (tmp_path / "sweep").glob("*/result.json")]
    assert sorted(result["points"][1]["ratio"] for result in results) == [0.1, 0.2, 0.3, 0.4]
    assert [result["unreduced"]["reused"] for result in results].count(False) == 1
    for path in (tmp_path / "sweep").glob("*/result.json"):
        assert len(load_predictions(path.parent).points) == 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["processes", "submitit_local"])
def test_launchers_that_use_other_processes(sweep, launcher: str) -> None:
    pytest.importorskip({"processes": "joblib", "submitit_local": "submitit"}[launcher])
    run = sweep(f"hydra/launcher={launcher}", "dataset.num_workers=1", "mtr.ratio=0.2,0.99")
    assert run.code == 2
    assert "2 points: 1 computed, 1 failed" in run.out
    assert "out of reach" in run.out
    assert "1 finished before" in sweep("mtr.ratio=0.2").out


@pytest.mark.slow
def test_a_ray_cluster_computes_all_points_though_a_node_dies(sweep, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address)

    def kill() -> None:
        while len(list((tmp_path / "sweep").glob("*/.hydra"))) < 2:  # a job on each node
            time.sleep(0.1)
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        run = sweep("hydra/launcher=ray", "mtr.ratio=0.2,0.3,0.4,0.99")
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert not killer.is_alive()
    assert "4 points: 3 computed, 1 failed" in run.out
    assert run.code == 2
    assert len(list(run.folder.glob("*/result.json"))) == 3


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_a_launcher_that_is_not_installed_names_its_extra(sweep) -> None:
    run = sweep("hydra/launcher=ray", "mtr.ratio=0.2")
    assert run.code == 2
    assert run.err.endswith("mtr_lab: hydra/launcher=ray needs an extra: pip install 'mtr-lab[ray]'.\n")


def test_an_unknown_launcher(sweep) -> None:
    run = sweep("hydra/launcher=proceses", "mtr.ratio=0.2")
    assert run.code == 2
    assert "unknown hydra/launcher 'proceses'. Did you mean 'processes'" in run.err


def test_optuna_minimises_and_resumes(sweep) -> None:
    pytest.importorskip("optuna")
    search = ("experiment=schedule_search", "hydra.sweeper.n_trials=4", "mtr.target_fraction=0.5")
    run = sweep(*search, "hydra.sweeper.params={mtr.interval:'choice(1,2)',mtr.first_block:'choice(1,9)'}")
    values = {
        (result["config"]["mtr"]["first_block"], result["config"]["mtr"]["interval"]): result["points"][1]["kl"]
        for result in map(read_result, run.folder.glob("*/result.json"))
    }
    assert values
    assert all(first == 1 for first, _ in values)  # block 9 of 6 fails, and the study continues
    best = next(line for line in (run.folder / "optimization_results.yaml").read_text().splitlines() if "value" in line)
    assert float(best.split()[1]) == min(values.values())
    again = sweep(*search, "hydra.sweeper.params={mtr.interval:'choice(1,2)',mtr.first_block:'choice(1,9)'}")
    assert "finished before" in again.out
    assert "computed," not in again.out


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["objective=accuracy"], "unknown objective 'accuracy'"),
        (["objective=img_per_s"], "unknown objective 'img_per_s'"),
        (["objective=kl", "mtr.ratio=0"], "objective=kl is that of the reduced model"),
    ],
)
def test_an_objective_the_result_will_not_have(run_program, overrides: list[str], expected: str) -> None:
    run = run_program(main, *SMALL, *overrides)
    assert run.code == 2
    assert expected in run.err


def test_a_sweep_folder_that_cannot_be_written(run_program) -> None:
    run = run_program(main, *SMALL, "hydra.mode=MULTIRUN", "hydra.sweep.dir=/dev/null/x", "mtr.ratio=0.2,0.3")
    assert run.code == 2
    assert "hydra.sweep.dir" in run.err
    assert "Traceback" not in run.err


def test_slurm_composes() -> None:
    pytest.importorskip("submitit")
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        launcher = hydra.compose("config", ["hydra/launcher=slurm"], return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert launcher.gpus_per_node == 1


def test_different_overrides_have_different_folders() -> None:
    assert job_folder("mtr.ratio=0.2,reduction=mtr") == "mtr.ratio=0.2,reduction=mtr"
    names = ["", "dataset.root=/a/b", "dataset.root=_a_b", "x" * 300, "x" * 301, "mtr.schedule=[1,2]", "a=ü b"]
    folders = [job_folder(name) for name in names]
    assert len(set(folders)) == len(names)
    assert all("/" not in folder and 0 < len(folder.encode()) <= 255 for folder in folders)
