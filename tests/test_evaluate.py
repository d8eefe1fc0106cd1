"""``python -m mtr_lab``: the files it writes, and its messages for mistakes."""

import itertools
import re
import shutil
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from small_run import SMALL

from mtr_lab import create_model
from mtr_lab.__main__ import main
from mtr_lab.compose import make_meta_model
from mtr_lab.configuration import CONF
from mtr_lab.errors import UserError
from mtr_lab.evaluation.job import Job
from mtr_lab.evaluation.points import operating_points, policy_settings
from mtr_lab.measure.speed import Speed
from mtr_lab.reduction import Reduction
from mtr_lab.reduction.cost_table import BlockTimes, CostTable
from mtr_lab.results.predictions_file import load_predictions
from mtr_lab.results.schema import read_result
from mtr_lab.tasks.evaluation import Evaluation

SAMPLE = Path(str(resources.files("mtr_lab") / "assets" / "imagenette_sample"))


def test_a_run_writes_every_point_of_the_contract(run_program) -> None:
    run = run_program(main, *SMALL, "mtr.ratio=[0.2,0.3]")
    assert run.code == 0, run.err
    result = read_result(run.folder)
    assert [(p["policy"], p["ratio"]) for p in result["points"]] == [("none", 0.0), ("mtr", 0.2), ("mtr", 0.3)]
    unreduced, *reduced = result["points"]
    assert unreduced["agreement"] == 1
    assert unreduced["kl"] == 0
    for point in reduced:
        assert point["ratio"] <= point["reduction"] < point["ratio"] + 0.02
        assert point["reduction"] == pytest.approx(1 - point["flops_true"] / unreduced["flops_true"])
        assert point["flops_overhead"] > 0
        assert point["images"] == 8
        assert point["top1_ci"][0] <= point["top1"] <= point["top1_ci"][1]
    predictions = load_predictions(run.folder)
    assert predictions.log_probs.shape == (3, 8, 10)
    assert np.allclose(np.exp(predictions.log_probs).sum(-1), 1, atol=1e-5)
    assert str(run.folder / "result.json") in run.out
    assert (run.folder / ".hydra" / "config.yaml").exists()


def test_two_runs_are_the_same_to_the_last_digit(run_program) -> None:
    first = load_predictions(run_program(main, *SMALL).folder)
    second = load_predictions(run_program(main, *SMALL, "resume=false").folder)
    assert np.array_equal(first.log_probs, second.log_probs)


def test_timing_is_reported_for_every_point(run_program) -> None:
    run = run_program(main, *SMALL, "timing.batch_size=3", "timing.seconds=0.1", "mtr.ratio=0.2")
    for point in read_result(run.folder)["points"]:
        assert point["img_per_s"] > 0
        assert point["latency_ms"]["p50"] <= point["latency_ms"]["p95"]
        assert point["peak_mib"] > 0


def test_pictures_of_the_first_images_at_the_highest_ratio(run_program) -> None:
    run = run_program(main, *SMALL, "dataset.batch_size=2", "mtr.ratio=[0.3,0.1]", "pictures=3")
    assert run.code == 0, run.err
    names = [path.stem for path in sorted(SAMPLE.glob("n01440764/*"))[:3]]
    expected = [f"{i:03}_{name}.{kind}" for i, name in enumerate(names) for kind in ("gif", "png", "svg")]
    assert sorted(path.name for path in (run.folder / "pictures").iterdir()) == expected


def image_folder(root: Path, wnids: list[str], images: int) -> Path:
    """Class folders with a few bundled images."""
    for wnid in wnids:
        (root / wnid).mkdir(parents=True)
        for image in sorted((SAMPLE / wnid).iterdir())[:images]:
            shutil.copy(image, root / wnid)
    return root


def test_imagenet_models_are_scored_by_class_name(run_program, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", ["n01440764", "n03888257"], 4)
    data = ("dataset=imagefolder", f"dataset.root={root}", "dataset.num_workers=0")
    run = run_program(main, *SMALL, "backbone=vim_ti", "backbone.img_size=64", *data, "mtr.ratio=0")
    assert run.code == 0, run.err
    assert read_result(run.folder)["dataset"] == "imagefolder"
    predictions = load_predictions(run.folder)
    assert predictions.labels.tolist() == [0] * 4 + [701] * 4  # tench and parachute among the 1000
    assert predictions.log_probs.shape[-1] == 1000


def test_explicit_counts_instead_of_a_ratio(run_program) -> None:
    run = run_program(main, *SMALL, "mtr.schedule=[10,20,0,0,0,0]", "mtr.ratio=null")
    assert run.code == 0, run.err
    point = read_result(run.folder)["points"][1]
    assert point["ratio"] is None
    assert point["tokens"] == [197, 187, 167, 167, 167, 167]


def test_a_measured_schedule_depends_on_the_training_images_alone(run_program, tmp_path: Path) -> None:
    wnids = sorted(p.name for p in SAMPLE.iterdir() if p.is_dir())
    image_folder(tmp_path / "images" / "train", wnids, 2)
    tokens = []
    for count in (1, 3):
        shutil.rmtree(tmp_path / "images" / "val", ignore_errors=True)
        root = image_folder(tmp_path / "images" / "val", wnids, count).parent
        data = ("dataset=imagefolder", f"dataset.root={root}", "dataset.num_workers=0")
        run = run_program(main, *SMALL, *data, "mtr.schedule=auto", "mtr.ratio=[0.1,0.3]")
        assert run.code == 0, run.err
        _, *reduced = read_result(run.folder)["points"]
        assert [point["ratio"] for point in reduced] == [0.1, 0.3]
        assert all(0 <= point["reduction"] - point["ratio"] < 0.01 for point in reduced)
        tokens.append([point["tokens"] for point in reduced])
    assert tokens[0] == tokens[1]
    assert tokens[0][0] != tokens[0][1]


def test_other_training_images_are_another_measured_schedule(run_program, tmp_path: Path) -> None:
    wnids = sorted(p.name for p in SAMPLE.iterdir() if p.is_dir())
    root = image_folder(tmp_path / "images" / "val", wnids, 1).parent
    image_folder(root / "train", wnids, 2)
    again = (*SMALL, "dataset=imagefolder", f"dataset.root={root}", "dataset.num_workers=0", "mtr.schedule=auto")
    where = f"hydra.run.dir={tmp_path / 'run'}"
    assert "finished before" not in run_program(main, *again, where, "mtr.ratio=0.2").out
    assert "finished before" in run_program(main, *again, where, "mtr.ratio=0.2").out
    next((root / "train" / wnids[0]).iterdir()).unlink()
    assert "its result is of other data" in run_program(main, *again, where, "mtr.ratio=0.2").out


TABLE = CostTable(
    kinds=(0,) * 6, blocks=(BlockTimes((1, 197), (0.1, 19.7), (0.5, 0.5)),), unreduced=2 + 6 * 19.7, rest=2.0
)
"""Of a device that takes 0.1 ms for a token in a block, 0.5 ms for a step and 2 ms for the rest of a model."""


@pytest.fixture
def timed_by_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds are those of ``TABLE``, which no budget has to measure, and a tenth slower than promised."""

    def time_job(job: Job, evaluation: Evaluation, points: list, advance: object) -> dict[str, Speed]:
        slowed = {point.name: TABLE.ms(point.schedule) * (1.1 if point.schedule.acts else 1) for point in points}
        return {name: Speed(1000 / ms, {"p50": ms, "p95": ms}, 1.0, (ms,)) for name, ms in slowed.items()}

    monkeypatch.setattr("mtr_lab.evaluation.budgets.cost_table", lambda *_: TABLE)
    monkeypatch.setattr("mtr_lab.evaluation.run.time_job", time_job)


@pytest.mark.parametrize("policy", ["mtr", "hsa"])
def test_a_speedup_is_asked_promised_and_measured(policy: str, run_program, timed_by_table) -> None:
    run = run_program(main, *SMALL, "timing.batch_size=2", f"reduction={policy}", "mtr.speedup=[1.2,1.5]")
    assert run.code == 0, run.err
    assert "at mtr.speedup=[1.2, 1.5]; writing to" in run.out
    unreduced, *reduced = read_result(run.folder)["points"]
    assert "budget" not in unreduced
    for point, asked in zip(reduced, (1.2, 1.5), strict=True):
        assert point["ratio"] is None
        budget = point["budget"]
        assert (budget["key"], budget["asked"]) == ("speedup", asked)
        assert asked <= budget["promised"] < asked + 0.03
        assert budget["measured"] == pytest.approx(budget["promised"] / 1.1)
        assert budget["measured"] == pytest.approx(point["img_per_s"] / unreduced["img_per_s"])
    assert load_predictions(run.folder).points.tolist()[1:] == [f"{policy}@speedup={asked}" for asked in (1.2, 1.5)]
    printed = " ".join(run.out.split())  # lines are wrapped
    for shown in (
        "prom.",
        "measured in the timing pass",
        "≥1.2×",
        "≥1.5×",
        f" {reduced[1]['budget']['promised']:.2f} ",
    ):
        assert shown in printed
    assert (
        "finished before"
        in run_program(main, *SMALL, "timing.batch_size=2", f"reduction={policy}", "mtr.speedup=[1.2,1.5]").out
    )


def test_a_speedup_out_of_reach_names_the_maximum(run_program, timed_by_table) -> None:
    run = run_program(main, *SMALL, "timing.batch_size=2", "mtr.speedup=50")
    assert run.code == 2
    assert "mtr.speedup=50 is out of reach: at most " in run.err
    assert not (run.folder / "result.json").exists()


def test_a_speedup_is_measured_on_this_machine(run_program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("mtr_lab.reduction.cost_table.SECONDS", 0.0)
    run = run_program(main, *SMALL, "timing.batch_size=2", "timing.seconds=0.1", "mtr.speedup=1.01")
    assert run.code in (0, 2), run.err  # a busy machine may not reach even this
    (file,) = (tmp_path / "cache" / "mtr_lab" / "cost_tables").iterdir()
    assert '"unreduced"' in file.read_text()


@pytest.fixture
def calibrated(tmp_path: Path) -> tuple[str, ...]:
    """Overrides for ten evaluation images and eighty training images."""
    wnids = sorted(p.name for p in SAMPLE.iterdir() if p.is_dir())
    root = image_folder(tmp_path / "images" / "val", wnids, 1).parent
    image_folder(root / "train", wnids, 8)
    return "dataset=imagefolder", f"dataset.root={root}", "dataset.num_workers=0"


@pytest.mark.parametrize("schedule", ["constant", "auto"])
def test_a_drop_is_bounded_on_training_images(schedule: str, run_program, calibrated) -> None:
    run = run_program(main, *SMALL, *calibrated, "mtr.max_drop=0.6", f"mtr.schedule={schedule}")
    assert run.code == 0, run.err
    _, point = read_result(run.folder)["points"]
    budget = point["budget"]
    assert (budget["key"], budget["asked"], point["ratio"]) == ("max_drop", 0.6, None)
    assert 0 < budget["promised"] <= 0.6
    assert budget["measured"] == 1 - point["agreement"]
    assert "≤60 %" in run.out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mtr.max_drop=0.01"], "on 80 calibration images, even if none of them changes: give at least 299"),
        (["mtr.max_drop=0.05", "mtr.schedule=auto"], "on 40 calibration images"),
        (["mtr.max_drop=0.05", "mtr.schedule=[1,0,0,0,0,0]"], "leave mtr.max_drop out"),
        (
            ["mtr.max_drop=0.05", "dataset.train_split=val"],
            "mtr.max_drop measures on training images.*Or give mtr.ratio",
        ),
        (["mtr.speedup=1.5"], "mtr.speedup is measured at timing.batch_size, which is 0"),
        (["mtr.speedup=1.5", "mtr.max_drop=0.05"], "give one of mtr.ratio, mtr.speedup, mtr.max_drop"),
    ],
)
def test_a_budget_that_cannot_be_measured_is_refused_before_weights_are_loaded(
    overrides: list[str], message: str, run_program, calibrated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtr_lab.evaluation.job.make_task_model", None)
    run = run_program(main, *SMALL, *calibrated, *overrides)
    assert run.code == 2
    assert re.search(message, run.err), run.err


def test_a_drop_is_one_of_classes(run_program) -> None:
    run = run_program(main, "task=segmentation", "timing.batch_size=0", "mtr.max_drop=0.1")
    assert (run.code, "task=segmentation gives images no class" in run.err) == (2, True)


def test_models_are_timed_without_the_images_and_results_of_before(
    run_program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wnids = sorted(p.name for p in SAMPLE.iterdir() if p.is_dir())
    root = image_folder(tmp_path / "images" / "train", wnids, 1).parent
    image_folder(root / "val", wnids, 1)
    timed = []

    def time_job(job: Job, evaluation: Evaluation, points: object, advance: object) -> dict[str, object]:
        with pytest.raises(UserError, match="got none"):
            evaluation.reduction.solve(0.1)
        timed.append((evaluation.results, len(job.points)))
        return {}

    monkeypatch.setattr("mtr_lab.evaluation.run.time_job", time_job)
    data = ("dataset=imagefolder", f"dataset.root={root}", "dataset.num_workers=0", "timing.batch_size=1")
    run = run_program(main, *SMALL, *data, "mtr.schedule=auto", "mtr.ratio=0.2")
    assert run.code == 0, run.err
    assert timed == [([], 2)]


def test_a_result_is_complete_or_not_there(run_program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = (*SMALL, "mtr.ratio=0.2", "logger=csv", f"hydra.run.dir={tmp_path / 'run'}")
    with monkeypatch.context() as broken:
        broken.setattr("mtr_lab.tasks.classification.task.save_depth", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_program(main, *again, "pictures=1")
        assert not (tmp_path / "run" / "result.json").exists()
    with monkeypatch.context() as broken:
        broken.setattr("mtr_lab.evaluation.run.log_result", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_program(main, *again, "pictures=1")
    assert read_result(tmp_path / "run")["logged"] == []
    finished = run_program(main, *again, "pictures=1")
    assert "finished before" in finished.out
    assert read_result(tmp_path / "run")["logged"] == ["csv"]
    assert list((tmp_path / "run" / "pictures").iterdir())
    assert run_program(main, *again).code == 0  # without pictures: removes those of the other evaluation
    assert not (tmp_path / "run" / "pictures").exists()


def test_a_logger_is_recorded_before_the_next_one_starts(run_program, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = []

    def log(result: object, files: list[Path], *_: object, **__: object) -> None:
        recorded.append(read_result(files[0])["logged"])

    monkeypatch.setattr("mtr_lab.evaluation.run.log_result", log)
    assert run_program(main, *SMALL, "mtr.ratio=0.2", "logger=[csv,tensorboard]").code == 0
    assert recorded == [[], ["csv"]]


def test_an_objective_that_is_not_measured_with_cuda_graphs(run_program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtr_lab.evaluation.job.check_device", lambda config: None)
    run = run_program(main, *SMALL, "timing.batch_size=1", "trainer.cuda_graph=true", "objective=peak_mib")
    assert run.code == 2
    assert "'peak_mib'" in run.err


def presets() -> list[Any]:
    """The presets that list all their jobs; slow are those of many jobs and large models."""
    texts = {path.stem: path.read_text() for path in (CONF / "experiment").glob("*.yaml")}
    listed = sorted(name for name, text in texts.items() if "sweeper" in text and "optuna" not in text)
    slow = {"anchors", "paper_table1", "tiny_policies", *(name for name in listed if "mamba" in name)}
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in listed]


@pytest.mark.parametrize("preset", presets())
def test_every_job_of_a_preset_can_be_solved(preset: str) -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        swept = hydra.compose("config", [f"experiment={preset}"], return_hydra_config=True).hydra.sweeper.params
        sweep = OverridesParser.create().parse_overrides([f"{key}={values}" for key, values in swept.items()])
        (jobs,) = BasicSweeper.split_arguments(sweep, max_batch_size=None)
        assert len(jobs) > 1
        common = [f"experiment={preset}", "backbone.pretrained=false"]  # some models have no weights to be found
        compose = cache(lambda *choices: hydra.compose("config", [*common, *choices]))
        build = cache(lambda name: make_meta_model(config.backbone))
        seen = []
        for job in jobs:
            values = [override for override in job if override.startswith("mtr.")]
            choices = compose(*(override for override in job if override not in values))
            config = OmegaConf.merge(choices, OmegaConf.from_dotlist(values))
            expected = dict.fromkeys(("nano_policies", "nano_pictures", "nano_fovea", "random_seeds"), "imagenette")
            expected |= dict.fromkeys(("policy_ablation", "dense_policies"), "imagenette_sample")
            expected |= dict.fromkeys(("tiny_policies", "tiny_pictures"), "tiny_imagenet")
            assert config.dataset.name == expected.get(preset, "imagenet")
            reduction = Reduction(build(config.backbone.name), policy_settings(config.mtr))
            points = operating_points(reduction, config.mtr)
            ratios = [None] if config.mtr.ratio is None else config.mtr.ratio  # the counts are given
            assert [point.ratio for point in points] == [0, *ratios]
            seen.append((config.backbone, config.mtr))
        assert all(one != other for one, other in itertools.combinations(seen, 2))


def test_skipped_images_are_counted_and_named(run_program, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", sorted(p.name for p in SAMPLE.iterdir() if p.is_dir()), 2)
    broken = sorted(root.rglob("*.JPEG"))[1]
    broken.write_bytes(broken.read_bytes()[:200])
    data = ("dataset=imagefolder", f"dataset.root={root}", "trainer.limit_test_batches=1.0", "dataset.num_workers=0")

    refused = run_program(main, *SMALL, *data)
    assert refused.code == 2
    assert broken.name in refused.err
    assert "dataset.on_error=skip" in refused.err
    assert "Traceback" not in refused.err

    run = run_program(main, *SMALL, *data, "dataset.on_error=skip", "mtr.ratio=0")
    (point,) = read_result(run.folder)["points"]
    assert point["images"] == 19
    assert [Path(file).name for file in point["skipped"]] == [broken.name]
    assert broken.name in run.out


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["reduction=mtrr"], ["unknown reduction 'mtrr'", "'mtr'"]),
        (["mtr.ratoi=0.3"], ["unknown key 'mtr.ratoi'", "'mtr.ratio'"]),
        (["mtr.ratio=[0.2"], ["cannot parse the override 'mtr.ratio=[0.2'"]),
        (["~mtr.score"], ["the key mtr.score is missing"]),
        (["dataset=null"], ["Config group override must be a string"]),
        (["dataset.root=${nothing}"], ["Interpolation key 'nothing' not found"]),
        (["mtr.policy=hsa"], ["mtr.policy=hsa only labels the result: choose the policy with reduction=, now mtr"]),
        (["backbone=videomamba_ti", "backbone.num_frames=8"], ["task=classification takes images", "set task=video"]),
        (["ops.backend=cuda"], ["unknown ops.backend 'cuda'", "mamba_ssm"]),
        (["trainer.cuda_graph=3"], ["trainer.cuda_graph=3: expected true or false"]),
        (["seed=-1"], ["seed=-1: expected an integer from 0"]),
        (["backbone.num_classes=0"], ["backbone.num_classes=0: expected an integer of at least 1"]),
        (["timing.batch_size=-1"], ["timing.batch_size=-1: expected an integer from 0 to 1048576"]),
        (["timing.seconds=many"], ["timing.seconds=many: expected a number"]),
        (["pictures=some"], ["pictures=some: expected an integer"]),
        (["resume=maybe"], ["resume=maybe: expected true or false"]),
        (["task.name=segmenting"], ["unknown task.name 'segmenting'"]),
        (["dataset=imagefolder", "dataset.root=/nowhere"], ["/nowhere", "<class>", "dataset=imagenette_sample"]),
        (["mtr.ratio=0.97"], ["out of reach", "at most 0."]),
        (["mtr.schedule=auto"], ["mtr.schedule=auto measures on training images", "dataset.root", "DIR/train/<class>"]),
        (["mtr.schedule=auto", "mtr.ratio=0.97"], ["out of reach", "at most 0."]),
        (["mtr.schedule=auto", "mtr.ratio=null"], ["mtr.ratio must be a share"]),
        (["pictures=2", "mtr.ratio=0"], ["nothing to draw"]),
        (["trainer.precision=3"], ["trainer: Precision 3 is invalid"]),
        (["backbone.checkpoint=nowhere.pth"], ["nowhere.pth does not exist"]),
        (["trainer.limit_test_batches=0.0001"], ["limit_test_batches=0.0001 of 125 batches", "at least 1/125"]),
        (["hydra.run.dir=/dev/null/x"], ["cannot write the run folder", "/dev/null/x"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_mistake_gets_one_clear_message_and_code_2(run_program, overrides: list[str], expected: list[str]) -> None:
    run = run_program(main, *SMALL, *overrides)
    assert run.code == 2, run.err
    assert "Traceback" not in run.err
    for text in expected:
        assert text in run.err
    assert not (run.folder / "result.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_an_absent_device_is_refused(run_program) -> None:
    run = run_program(main, *SMALL, "trainer.accelerator=gpu")
    assert run.code == 2
    assert "no CUDA device is present" in run.err
    assert "trainer.accelerator=cpu" in run.err


def test_cuda_graphs_of_all_points_are_kept_and_their_memory_is_not_reported(
    run_program, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = set()

    def compiled(model, max_graphs):
        def call(images):
            keys.add((images.shape, model.reduction.key))
            assert len(keys) <= max_graphs
            return model(images)

        return call

    monkeypatch.setattr("mtr_lab.tasks.classification.evaluation.compile", compiled)
    monkeypatch.setattr("mtr_lab.evaluation.job.check_device", lambda trainer: None)
    monkeypatch.setattr("mtr_lab.compose.check_device", lambda trainer: None)
    overrides = ["dataset.batch_size=300", "trainer.limit_test_batches=1.0", "mtr.ratio=[0.2,0.3]"]
    timing = ["timing.batch_size=3", "timing.seconds=0"]
    run = run_program(main, *SMALL, *overrides, *timing, "trainer.cuda_graph=true")
    assert run.code == 0, run.err
    assert len(keys) == 4 * 3  # batches of 300, 200, 3 and 1
    for point in read_result(run.folder)["points"]:
        assert point["img_per_s"] > 0
        assert "peak_mib" not in point


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_cuda_graph_changes_nothing_but_speed(run_program, precision: str) -> None:
    timing = ["timing.batch_size=3", "timing.seconds=0.1"]
    folders = []
    for graph in ("false", "true"):
        run = run_program(main, *SMALL, *timing, f"trainer.cuda_graph={graph}", f"trainer.precision={precision}")
        assert run.code == 0, run.err
        folders.append(run.folder.rename(run.folder.with_name(graph)))
    eager, graph = (load_predictions(folder).log_probs for folder in folders)
    assert np.allclose(eager, graph, atol=1e-4 if precision == "32-true" else 2e-2)
    assert all("peak_mib" not in point for point in read_result(folders[1])["points"])


def test_mistakes_are_found_before_weights_are_loaded(run_program, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("mtr_lab.backbones.weights.load_weights", load)
    small = [override for override in SMALL if "pretrained" not in override]
    for mistake in ("mtr.ratio=0.97", "mtr.score=nothing"):
        assert run_program(main, *small, mistake).code == 2
    assert run_program(main, *small, "dataset=imagefolder", "dataset.root=/nowhere").code == 2


def test_outputs_that_are_not_finite_are_refused(run_program, tmp_path: Path) -> None:
    model = create_model("vim_nano", depth=6, embed_dim=16)
    torch.nn.init.constant_(model.head.weight, torch.finfo(torch.float32).max)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    run = run_program(main, *SMALL, f"backbone.checkpoint={tmp_path / 'w.pth'}", "mtr.ratio=0")
    assert run.code == 2
    assert "outputs at none@0 are infinite or not a number for 8 of 8 images" in run.err
    assert not (run.folder / "result.json").exists()


def test_csv_and_tensorboard_and_offline_wandb(run_program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    for logger, files in (("csv", "*.csv"), ("tensorboard", "events*"), ("wandb", "*.wandb")):
        run = run_program(main, *SMALL, f"logger={logger}", "mtr.ratio=0")
        assert run.code == 0, run.err
        assert list(run.folder.rglob(files)), f"{logger} wrote nothing"
    assert read_result(run.folder)["logged"] == ["csv", "tensorboard", "wandb"]  # the later ones log a finished result
