"""``python -m mtr_lab.bench``: its file and table, and its messages for mistakes."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from mtr_lab import create_model, ops
from mtr_lab.bench import main
from mtr_lab.benchmark import cases, variants
from mtr_lab.benchmark import run as program
from mtr_lab.benchmark.cases import read_cases
from mtr_lab.benchmark.run import compare
from mtr_lab.configuration import CONF
from mtr_lab.measure import roofline
from mtr_lab.measure.flops import model_flops
from mtr_lab.measure.roofline import Peaks
from mtr_lab.reduction.cost_table import BlockTimes, CostTable

SMALL = ["bench.resolution=32", "bench.batch=2", "bench.seconds=0"]


@pytest.fixture(autouse=True)
def peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "measure_peaks", lambda device, dtype: Peaks(1e12, 1e11, None))


def rows_of(run) -> list[dict]:
    assert run.code == 0, run.err
    return json.loads((run.folder / "bench.json").read_text())["rows"]


def test_the_default_run_holds_the_contract(run_program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "measure_peaks", roofline.measure_peaks)
    run = run_program(main, "bench.seconds=0")
    unreduced, reduced = rows_of(run)
    axes = ("backbone", "batch", "resolution", "dtype", "backend", "policy", "ratio", "cuda_graph")
    assert [unreduced[key] for key in axes] == ["vim_nano", 8, 112, "float32", "auto", "none", 0.0, False]
    assert [reduced[key] for key in axes] == ["vim_nano", 8, 112, "float32", "auto", "mtr", 0.3, False]
    for row in (unreduced, reduced):
        assert row["error"] is None
        assert row["rounds"] == 5
        assert row["ms_quartiles"][0] <= row["ms"] <= row["ms_quartiles"][1]
        assert row["img_per_s"] == pytest.approx(8000 / row["ms"])
        assert row["idle_ms"] == row["ms"]  # on the CPU
        assert row["peak_mib"] > 8  # of 2.2 M weights
        assert 0 < row["roofline"] < 1
        assert row["roofline"] == pytest.approx(max(row["bound_ms"]["matrix"], row["bound_ms"]["memory"]) / row["ms"])
        assert row["bound_ms"]["exponential"] is None
    assert unreduced["flops"] == model_flops(create_model("vim_nano"))
    assert unreduced["tokens"] == [197] * 16
    assert 0.3 <= reduced["reduction"] == pytest.approx(1 - reduced["flops"] / unreduced["flops"])
    assert reduced["speedup"] == pytest.approx(unreduced["ms"] / reduced["ms"])
    assert unreduced["overhead"] == 0
    result = json.loads((run.folder / "bench.json").read_text())
    assert result["schema"] == 2
    assert result["environment"]["torch"] == torch.__version__
    assert result["peaks"]["float32"]["flops"] > 1e9
    assert str(run.folder / "bench.json") in run.out


def settings(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("bench", list(overrides)).bench


def test_every_combination_once_and_the_unreduced_model_at_no_ratio() -> None:
    lists = ["bench.batch=[1,2]", "bench.dtype=[float32,bfloat16]", "bench.policy=[none,mtr,write]"]
    chosen = settings(
        "bench.resolution=[32,40]", *lists, "bench.ratio=[0.2,0.3]", "bench.backend=[auto,reference,auto]"
    )
    cases, notes = read_cases(chosen, torch.device("cpu"))
    assert len(cases) == len(set(cases)) == 2 * 2 * 2 * 2 * 5
    points = [(case.policy, case.ratio) for case in cases[:5]]
    assert points == [("none", 0), ("mtr", 0.2), ("mtr", 0.3), ("write", 0.2), ("write", 0.3)]
    assert notes == []


def test_cases_of_one_batch_are_timed_in_turn(run_program, monkeypatch: pytest.MonkeyPatch) -> None:
    visits = []
    time = program.Variant.time

    def recorded(self, device):
        visits.append((self.case.batch, self.case.policy))
        time(self, device)

    monkeypatch.setattr(program.Variant, "time", recorded)
    run_program(main, "bench.resolution=32", "bench.batch=[1,2]", "bench.seconds=0")
    assert visits[:4] == [(1, "none"), (1, "mtr"), (1, "mtr"), (1, "none")]
    assert {batch for batch, _ in visits[:10]} == {1}
    assert {batch for batch, _ in visits[10:]} == {2}


def test_what_runs_is_what_the_row_says(run_program, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[tuple, set] = {}

    def forward(self, images):
        state = self.forward_state(images)
        key = (ops.selected_backend(), tuple(images.shape), images.dtype, state.hidden.shape[1])
        seen.setdefault(key, set()).add(tuple(images.flatten()[:3].tolist()))
        assert not torch.is_grad_enabled()
        assert not self.head.weight.is_inference()
        return self.head(state.hidden[:, 0])

    monkeypatch.setattr("mtr_lab.backbones.vision_mamba.VisionMamba.forward", forward)
    overrides = ["bench.backend=[reference,cpu]", "bench.ratio=0.3"]
    rows = rows_of(run_program(main, *SMALL, *overrides))
    left = rows[1]["tokens"][-1]
    shape = (2, 3, 32, 32)
    assert set(seen) == {(b, shape, torch.float32, n) for b in ("reference", "cpu") for n in (17, left)}
    assert left < 17
    (values,) = {frozenset(images) for images in seen.values()}
    assert len(values) == 1  # one batch for all,
    assert 0.0 not in next(iter(values))  # of noise


def test_speedup_and_overhead_by_hand() -> None:
    same = {"backbone": "m", "batch": 1, "resolution": 32, "dtype": "float32", "backend": "cpu", "cuda_graph": False}
    full = {**same, "policy": "none", "ms": 10.0, "tokens": [20, 20]}
    reduced = {**same, "policy": "mtr", "ms": 8.0, "tokens": [20, 10]}  # 7.5 ms if the reduction cost nothing
    failed = {**same, "policy": "mtr", "ms": None, "tokens": [20, 10]}
    alone = {**reduced, "backend": "reference"}
    competitor = {**full, "backbone": "d", "ms": 5.0, "tokens": None}
    compare([reduced, full, failed, alone, competitor])
    assert (full["speedup"], full["overhead"]) == (1, 0)
    assert reduced["speedup"] == 1.25
    assert reduced["overhead"] == pytest.approx(0.5 / 8)
    assert [row[key] for row in (failed, alone) for key in ("speedup", "overhead")] == [None] * 4
    assert (competitor["speedup"], competitor["overhead"]) == (1, 0)


def test_a_speedup_is_asked_promised_and_measured(run_program, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """On a device whose blocks take a time in proportion to their tokens, which has no fixed costs."""
    table = CostTable((0,) * 16, (BlockTimes((1, 37), (1.0, 37.0), (0.0, 0.0)),), unreduced=16 * 37.0, rest=0.0)
    monkeypatch.setattr("mtr_lab.benchmark.cases.cost_table", lambda *_: table)
    run = run_program(main, "bench.resolution=48", "bench.batch=2", "bench.seconds=0", "bench.speedup=[1.2,90]")
    none, fast, failed = rows_of(run)
    assert (none["asked_speedup"], none["promised_speedup"]) == (None, None)
    assert (fast["ratio"], fast["asked_speedup"]) == (None, 1.2)
    assert 1.2 <= fast["promised_speedup"] < 1.25
    assert sum(none["tokens"]) / sum(fast["tokens"]) == pytest.approx(fast["promised_speedup"])
    assert fast["speedup"] > 0
    assert "mtr.speedup=90 is out of reach: at most" in failed["error"].replace("90.0", "90")
    assert "≥1.20×, 1.2" in run.out


def test_a_smaller_picture_is_stated(run_program) -> None:
    run = run_program(main, "bench.resolution=48", *SMALL[1:], "bench.policy=[none,resolution]", "bench.ratio=0.3")
    unreduced, smaller = rows_of(run)
    assert (unreduced["resolution"], unreduced["picture"]) == (48, [48, 48])
    assert (smaller["resolution"], smaller["picture"]) == (48, [32, 32])
    assert "48² → 32²" in run.out


def test_a_model_of_timm_competes(run_program) -> None:
    competitor = "bench.competitors=[deit_tiny_patch16_224]"
    *ours, theirs = rows_of(run_program(main, *SMALL, competitor, "bench.policy=none"))
    assert [row["backbone"] for row in ours] == ["vim_nano"]
    assert theirs["backbone"] == "deit_tiny_patch16_224"
    assert theirs["resolution"] == 32
    assert theirs["backend"] == "torch"
    assert theirs["tokens"] is None
    assert theirs["img_per_s"] > 0
    tokens, width = 2 * 2 + 1, 192
    block = 12 * width**2 * tokens + 2 * tokens**2 * width
    assert theirs["flops"] == 2 * (12 * block + 4 * 768 * width + width * 1000)


def test_a_failing_combination_does_not_stop_the_others(run_program, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = program.Variant.prepare

    def prepare(self, images):
        if self.case.policy == "mtr":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much.\nof nothing")
        whole(self, images)

    monkeypatch.setattr(program.Variant, "prepare", prepare)
    run = run_program(main, *SMALL, "bench.policy=[mtr,none,write]")
    failed, unreduced, reduced = rows_of(run)
    assert failed["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate much."
    assert [failed[key] for key in ("ms", "idle_ms", "img_per_s", "peak_mib", "speedup")] == [None] * 5
    assert unreduced["ms"] > 0
    assert reduced["speedup"] > 0
    assert "CUDA out of memory" in " ".join(run.out.split())


def test_a_failure_while_timing_is_one_too_and_if_all_fail_so_does_the_program(
    run_program, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def idle_and_stream_ms(run, device):
        nonlocal calls
        calls += 1
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(variants, "idle_and_stream_ms", idle_and_stream_ms)
    with pytest.raises(RuntimeError, match="every combination failed"):
        run_program(main, *SMALL)
    assert calls == 2  # not tried again


def test_a_backend_that_is_not_installed_is_left_out_with_a_note(run_program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops.registry._installed, "mamba_ssm", False)
    run = run_program(main, *SMALL, "bench.backend=[cpu,mamba_ssm]", "bench.policy=none")
    assert [row["backend"] for row in rows_of(run)] == ["cpu"]
    (note,) = json.loads((run.folder / "bench.json").read_text())["notes"]
    assert "mamba_ssm needs the packages" in note
    assert "mamba_ssm needs the packages" in " ".join(run.out.split())
    refused = run_program(main, *SMALL, "bench.backend=mamba_ssm")
    assert refused.code == 2
    assert "no backend of bench.backend can be used" in refused.err


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["bench=h10"], ["unknown bench 'h10'", "'h100'"]),
        (["bench.dtype=float8"], ["unknown bench.dtype 'float8'", "'float16'"]),
        (["bench.dtype=null"], ["unknown bench.dtype 'None'"]),
        (["bench.backend=cuda"], ["unknown bench.backend 'cuda'", "mamba_ssm"]),
        (["bench.policy=mtrr"], ["unknown bench.policy 'mtrr'", "'mtr'", "none"]),
        (["bench.backbone=vim_xs"], ["unknown bench.backbone 'vim_xs'", "vim_s"]),
        (["bench.batch=0"], ["bench.batch=0: expected an integer of at least 1"]),
        (["bench.batch=[8,many]"], ["bench.batch=many: expected an integer"]),
        (["bench.batch=[]"], ["bench.batch=[]: expected at least one value"]),
        (["bench.resolution=33"], ["does not fit", "32 or 40"]),
        (["bench.ratio=1.5"], ["bench.ratio=1.5: expected a number from 0 to 1"]),
        (["bench.speedup=1"], ["bench.speedup=1: expected a number above 1"]),
        (["bench.ratio=0.97"], ["out of reach", "at most 0."]),
        (["bench.dtype=float16", "bench.backend=cpu"], ["runs float32 on the CPU, got torch.float16"]),
        (["bench.cuda_graph=1"], ["bench.cuda_graph=1: expected true or false"]),
        (["bench.competitors=[deit]"], ["unknown bench.competitors 'deit'", "timm.list_models()"]),
        (["bench.competitors=[resnet18]"], ["resnet18 at bench.resolution=32 is refused by timm", "img_size"]),
        (["bench.device=tpu"], ["unknown bench.device 'tpu'"]),
        (["bench.seconds=-1"], ["bench.seconds=-1: expected a number of at least 0"]),
        (["seed=-1"], ["seed=-1: expected an integer from 0"]),
        (["bench.rounds=3"], ["unknown key 'bench.rounds'"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_mistake_gets_one_clear_message_and_code_2(
    run_program, monkeypatch: pytest.MonkeyPatch, overrides: list[str], expected: list[str]
) -> None:
    monkeypatch.setattr(program.Variant, "prepare", lambda *args: pytest.fail("a model was built"))
    run = run_program(main, *SMALL, "bench.device=cpu", *overrides)
    assert run.code == 2, run.err
    assert "Traceback" not in run.err
    for text in expected:
        assert text in run.err
    assert not (run.folder / "bench.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_a_sweep_goes_on_after_a_mistake(run_program, tmp_path) -> None:
    run = run_program(main, *SMALL, "hydra.mode=MULTIRUN", f"hydra.sweep.dir={tmp_path}", "bench.batch=0,1")
    assert run.code == 2
    assert "bench.batch" in run.out + run.err
    assert len(list(tmp_path.glob("*/bench.json"))) == 1


def test_an_absent_device_is_refused(run_program) -> None:
    for override in ("bench.device=cuda", "bench.cuda_graph=true"):
        run = run_program(main, *SMALL, override)
        assert run.code == 2
        assert "CUDA device" in run.err


@pytest.mark.parametrize("preset", [path.stem for path in (CONF / "bench").glob("*.yaml")])
def test_presets_name_what_exists(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine where everything is installed, every case of a preset can run."""
    monkeypatch.setattr(cases, "usable_backends", lambda names, dtypes, device: (names, []))
    every, _ = read_cases(settings(f"bench={preset}"), torch.device("cuda"))
    assert len(every) == len(set(every)) > 1
    of_one_model = {(case.backbone, case.policy, case.ratio, case.resolution): case for case in every}
    assert all(case.work()["flops"] > 0 for case in of_one_model.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_graphs_are_timed_beside_eager_calls(run_program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "measure_peaks", roofline.measure_peaks)
    rows = rows_of(run_program(main, "bench.dtype=float16", "bench.cuda_graph=[false,true]", "bench.seconds=1"))
    assert [(row["policy"], row["cuda_graph"]) for row in rows] == [
        ("none", False), ("none", True), ("mtr", False), ("mtr", True)
    ]  # fmt: skip
    for row in rows:
        assert row["error"] is None
        assert row["peak_mib"] > 4.4  # weights
        assert 0 < row["bound_ms"]["exponential"] < row["ms"]
        assert row["idle_ms"] > 0
    for eager, graph in (rows[:2], rows[2:]):
        assert graph["ms"] < eager["ms"]
        # The pool of the graph is counted; it grows in blocks of 20 MiB and more.
        assert eager["peak_mib"] < graph["peak_mib"] < eager["peak_mib"] + 64
