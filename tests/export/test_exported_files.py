"""Exported files: they compute what the model computes, run without this library, and say what they are."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mtr_lab
from mtr_lab import packages
from mtr_lab.errors import MachineError, UserError
from mtr_lab.export import __main__ as program
from mtr_lab.export import deployable
from mtr_lab.export import model as export_of_models
from mtr_lab.export.model import export_model, read_exported
from mtr_lab.results import atomic
from mtr_lab.tasks.segmentation.model import Segmenter
from mtr_lab.training.run import save_weights

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
SLOW = pytest.mark.slow
GEOMETRY = {"img_size": 48, "patch_size": 8, "stride": 8, "depth": 2, "embed_dim": 20, "d_state": 5, "num_classes": 10}
SMALL = [f"backbone.{key}={value}" for key, value in GEOMETRY.items()] + ["backbone.pretrained=false"]


def small_model(policy: str | None = "mtr") -> torch.nn.Module:
    torch.manual_seed(0)
    model = mtr_lab.create_model("vim_ti", **GEOMETRY).eval()
    if policy:
        mtr_lab.patch(model, policy, schedule=[9, 0])
    return model


@pytest.fixture(scope="module", params=["onnx", "pt2"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    model = small_model()
    written = export_model(model, tmp_path_factory.mktemp("export") / f"small.{request.param}", name="vim_ti")
    return SimpleNamespace(model=model, written=written, file=written.file)


ONNX, PT2 = (pytest.mark.parametrize("exported", [format], indirect=True) for format in ("onnx", "pt2"))


def test_any_number_of_images(exported: SimpleNamespace) -> None:
    run = read_exported(exported.file)
    for images in (torch.randn(1, 3, 48, 48), torch.randn(5, 3, 48, 48)):
        with torch.no_grad(), mtr_lab.ops.use_backend("portable"):
            torch.testing.assert_close(run(images), exported.model(images), rtol=0, atol=1e-5)


def test_tokens_of_equal_score_are_ranked_by_their_place(exported: SimpleNamespace) -> None:
    run = read_exported(exported.file)
    images = torch.zeros(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(run(images), exported.model(images), rtol=0, atol=1e-5)


def test_images_of_another_size(exported: SimpleNamespace) -> None:
    with pytest.raises(UserError, match=r"\(1, 3, 40, 48\): the file takes \(B, 3, 48, 48\)"):
        read_exported(exported.file)(torch.zeros(1, 3, 40, 48))


def test_a_file_says_what_it_is(exported: SimpleNamespace) -> None:
    about = read_exported(exported.file).description
    assert (about.model, about.policy, about.task, about.input_size) == ("vim_ti", "mtr", "classification", [3, 48, 48])
    schedule = exported.model.reduction.schedule
    assert about.flops == schedule.flops + schedule.flops_overhead < about.flops_unreduced
    assert about.ratio == pytest.approx(schedule.reduction)
    assert about.data_config["mean"] == tuple(exported.model.pretrained_cfg["mean"])
    assert exported.written.parity.error < 1e-5
    assert exported.written.parity.agreement == 1


@ONNX
def test_onnx_files_have_operators_of_the_standard_and_no_loop(exported: SimpleNamespace) -> None:
    model = onnx.load(exported.file)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert not {node.op_type for node in model.graph.node} & {"Loop", "Scan", "If", "SequenceAt"}
    assert not model.functions
    assert [(imported.domain, imported.version) for imported in model.opset_import] == [("", 18)]
    assert [value.name for value in model.graph.input] == ["images"]
    assert [value.name for value in model.graph.output] == ["logits"]
    assert len(model.graph.node) < 600


@PT2
def test_programs_have_operators_of_pytorch_alone(exported: SimpleNamespace) -> None:
    loaded = torch.export.load(exported.file)
    assert not [node for node in loaded.graph.nodes if "mtr_lab" in str(node.target)]


@SLOW
@PT2
def test_programs_run_without_this_library(exported: SimpleNamespace, tmp_path: Path) -> None:
    code = (
        "import sys, torch; sys.modules['mtr_lab'] = None\n"
        f"print(torch.export.load({str(exported.file)!r}).module()(torch.zeros(3, 3, 48, 48))[0].shape)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert run.stdout.strip() == "torch.Size([3, 10])"


@pytest.mark.parametrize("format", ["onnx", pytest.param("pt2", marks=SLOW)])
def test_a_file_that_computes_something_else_gets_no_name(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_of_models, "TOLERANCES", {"onnx": -1.0, "pt2": -1.0})
    with pytest.raises(UserError, match="differs from the model"):
        export_model(small_model(None), tmp_path / f"x.{format}")
    assert not list(tmp_path.iterdir())


@SLOW
def test_half_precision_and_a_fixed_batch(tmp_path: Path) -> None:
    model = small_model()
    written = export_model(model, tmp_path / "half.onnx", precision="float16", batch=2)
    assert next(model.parameters()).dtype == torch.float32
    kinds = {tensor.data_type for tensor in onnx.load(written.file).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    run = read_exported(written.file)
    about = run.description
    assert (about.precision, about.batch) == ("float16", 2)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(run(images), model(images), rtol=0, atol=3e-2)
    predictions = mtr_lab.predict_images(written.file, [torch.rand(60, 50, 3).numpy()] * 3)
    assert len(predictions) == 3


@SLOW
@ONNX
def test_openvino_reads_the_file(exported: SimpleNamespace) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    compiled = openvino.Core().compile_model(str(exported.file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = torch.randn(3, 3, 48, 48)
    (result,) = compiled(images.numpy()).values()
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(result), exported.model(images), rtol=0, atol=1e-3)


@SLOW
def test_a_segmenter(run_program, tmp_path: Path) -> None:
    size = {"depth": 4, "img_size": 64}
    segmenter = Segmenter(mtr_lab.create_model("vim_nano", **{**GEOMETRY, **size}), 3, width=8)
    save_weights(segmenter, segmenter.backbone, tmp_path / "weights.safetensors", ["sky", "road", "car"])
    small = [*SMALL, *(f"backbone.{key}={value}" for key, value in size.items()), "task.width=8", "batch=1"]
    weights = f"backbone.checkpoint={tmp_path / 'weights.safetensors'}"
    run = run_program(program.main, *small, weights, "task=segmentation", "mtr.ratio=0.1", "mtr.first_block=0")
    assert run.code == 0, run.err
    exported_file = read_exported(run.folder / "vim_nano.onnx")
    about = exported_file.description
    assert (about.task, about.labels, about.input_size) == ("segmentation", ["sky", "road", "car"], [3, 64, 64])
    assert about.ratio > 0
    assert exported_file(torch.zeros(1, 3, 64, 64)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["format=tflite"], "unknown format 'tflite'"),
        (["opset=17"], "opset=17: expected an integer from 18 to 23."),
        (["opset=30"], "opset=30: expected an integer from 18 to 23."),
        (["precision=int4"], "unknown precision 'int4'"),
        (["batch=0"], "batch=0"),
        (["task=detection"], "task=detection: a detector ends in a loop"),
        (["mtr.schedule=auto"], "measures on training images"),
        (["reduction=random"], "draws random numbers"),
        (["mtr.ratio=0.99"], "out of reach"),
        (["backbone=vim_xs"], "unknown backbone 'vim_xs'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mistake_gets_one_clear_message_and_code_2(run_program, overrides: list[str], expected: str) -> None:
    run = run_program(program.main, *SMALL, "mtr.ratio=0.1", "mtr.first_block=0", *overrides)
    assert run.code == 2, run.err
    assert "Traceback" not in run.err
    assert expected in run.err
    assert not list(run.folder.glob("vim*"))


@pytest.mark.parametrize(
    ("format", "package"),
    [*(("onnx", package) for package in ("onnx", "onnxscript", "onnxruntime")), ("aotinductor", "a C++ compiler")],
)
def test_what_is_not_installed_is_said_first(
    format: str, package: str, run_program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == package else name)
    monkeypatch.setenv("CXX", "no_compiler")
    run = run_program(program.main, f"format={format}")
    assert run.code == 2, run.err
    assert f"format={format} needs " in run.err
    assert package in run.err
    assert not run.out


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"input_size": "abc"}, "input_size is 'abc'"),
        ({"labels": [1]}, r"labels is \[1\]"),
        ({"surprise": 1}, "missing or unknown: surprise"),
        (None, "expected an object"),
    ],
    ids=["type", "items", "field", "null"],
)
def test_descriptions_that_do_not_fit(changes: dict | None, expected: str) -> None:
    model = small_model(None)
    values = export_of_models.describe(model, "classification", "vim_ti", "float32", None).asdict()
    assert deployable.Description.read(json.dumps(values)).asdict() == values
    with pytest.raises(ValueError, match=expected):
        deployable.Description.read(json.dumps(changes and {**values, **changes}))


@ONNX
def test_files_that_fail_on_the_size_that_they_state(exported: SimpleNamespace) -> None:
    file = read_exported(exported.file)
    about = dataclasses.replace(file.description, input_size=[3, 32, 32])
    with pytest.raises(UserError, match="fails on images of the size that it states"):
        dataclasses.replace(file, description=about)(torch.zeros(1, 3, 32, 32))


def test_a_full_disk_is_no_mistake_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match=r"cannot write .*x\.onnx: No space left"):
        atomic.write_output(tmp_path / "x.onnx", b"content")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["folder.onnx", "file/x.pt2"])
def test_paths_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*(folder.onnx: it is a folder|file is not a folder)"):
        export_model(small_model(None), tmp_path / name)


@pytest.mark.parametrize("name", ["x.onnx", "x.pt2"])
def test_damaged_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_exported(tmp_path / name)
    (tmp_path / f"folder{name}").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        read_exported(tmp_path / f"folder{name}")
    with pytest.raises(UserError, match=r"dog.jpg: expected a file of mtr-lab export, which ends in .onnx or .pt2"):
        read_exported(tmp_path / "dog.jpg")
    (tmp_path / name).write_bytes(b"\x08\x07 no model")
    with pytest.raises(UserError, match="not a readable"):
        read_exported(tmp_path / name)


def test_a_foreign_onnx_file(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [1])], [value("y", 1, [1])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match="does not say how pictures are prepared"):
        read_exported(tmp_path / "foreign.onnx")
    model.metadata_props.add(key="mtr_lab", value=json.dumps({"surprise": 1}))
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match="does not fit this version"):
        read_exported(tmp_path / "foreign.onnx")
