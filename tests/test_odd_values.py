"""Values that nobody means: one line that names the value or the key, code 2, no traceback, nothing executed."""

import gc
from pathlib import Path

import pytest
from small_run import SMALL

from mtr_lab.__main__ import main

HUGE = "9" * 22


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("task=[nan]", "task=[nan]: expected one name"),
        ("task={a:nan}", "task"),
        ("task.name=[nan]", "task.name"),
        ("mtr.ratio=[nan]", "mtr.ratio"),
        ("mtr.ratio=1e400", "mtr.ratio"),
        ("mtr.schedule=" + "[" * 500 + "]" * 500, "recursion"),
        ("mtr.seed=" + HUGE, "mtr.seed"),
        ("seed=" + HUGE, "seed"),
        ("pictures=" + HUGE, "pictures"),
        ("timing.seconds=nan", "timing.seconds"),
        ("timing.batch_size=" + HUGE, "timing.batch_size"),
        ("dataset.batch_size=1000000000000", "dataset.batch_size"),
        ("trainer.devices=" + HUGE, "trainer"),
        ("backbone.embed_dim=" + HUGE, "embed_dim"),
        ("backbone.depth=100000000", "depth"),
        ("backbone.img_size=[1000000,1000000]", "img_size"),
        ("backbone.num_classes=10000000000", "num_classes"),
        ("backbone.checkpoint=" + "a" * 5000, "File name too long"),
        ("backbone.checkpoint='~nouser/x'", "~nouser/x"),
        ("dataset.root='~nouser/x'", "~nouser/x"),
        ("dataset.include='~nouser/x'", "~nouser/x"),
        ("dataset.batch_size=1_0", "1_0 would be read as 10"),
        ("mtr.ratio=[0.1,0.2_5]", "0.2_5 would be read as 0.25"),
        (
            "dataset.root=2024_01",
            "2024_01 would be read as 202401. Type that, or for a text 'dataset.root=\"2024_01\"'",
        ),
        ("reduction=[mtr,hsa]", "type -m reduction=NAME,NAME"),
        ("backbone=[vim_nano,vim_ti]", "type -m backbone=NAME,NAME"),
        ("dataset.root=${oc.env:NO_SUCH_NAME}", "dataset.root"),
        ("+@backbone.revision=str(1)", "+@backbone.revision=str(1)"),
        ("dataset.root='\udce9'", "dataset.root"),
        ("backbone.checkpoint='\udce9'", "checkpoint"),
    ],
    ids=lambda value: ascii(value)[1:40],
)
def test_an_override(run_program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, override: str, named: str) -> None:
    monkeypatch.chdir(tmp_path)
    if named == "recursion":
        gc.collect()  # a finalizer that runs at the recursion limit prints that it failed
    dataset = ["dataset=imagefolder"] if override.startswith("dataset.root") else []
    run = run_program(main, *SMALL, *dataset, override)
    assert run.code == 2, run.err
    assert len(run.err.splitlines()) == 1, run.err
    line = run.err.strip()
    assert line.startswith("mtr_lab: ")
    assert named in line
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "multirun"}


@pytest.mark.parametrize(
    "text",
    [
        "name: !!python/object/apply:os.mkdir [ran]\n",
        "!!binary abc\n",
        "name: a\0b\n",
        "batch_size: " + "9" * 5000 + "\n",
        "a: " + "[" * 3000 + "]" * 3000 + "\n",
        "a: &a [*a]\n",
    ],
    ids=["tag", "binary", "NUL", "digits", "deep", "loop"],
)
def test_a_file_of_the_user(run_program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "conf" / "dataset" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    run = run_program(main, "--config-dir", str(tmp_path / "conf"), "dataset=mine")
    assert run.code == 2, run.err
    assert len(run.err.splitlines()) == 1, run.err
    line = run.err.strip()
    assert line.startswith(f"mtr_lab: {file}")
    assert " is not plain YAML: " in line
    assert not (tmp_path / "ran").exists()
