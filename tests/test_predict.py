"""``mtr-lab predict`` and ``predict_images``."""

import csv
import json
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mtr_lab
from mtr_lab.errors import UserError
from mtr_lab.predict import main

SAMPLE = Path(str(resources.files("mtr_lab") / "assets" / "imagenette_sample"))
TENCH = sorted((SAMPLE / "n01440764").glob("*.JPEG"))[:2]
TINY = ["backbone.pretrained=false", "backbone.depth=4", "backbone.embed_dim=16"]


def test_the_bundled_model_knows_a_tench(run_command: Callable) -> None:
    run = run_command(main, TENCH[0])
    assert run.code == 0, run.err
    titles, line = run.out.splitlines()
    assert titles.split() == ["picture", "policy", "FLOPs", "classes"]
    assert line.split("  ")[0] == str(TENCH[0])
    assert line.split()[1] == "unreduced"
    assert "tench" in line


def test_unreduced_beside_reduced_as_csv_and_json(run_command: Callable, tmp_path: Path) -> None:
    asked = [tmp_path / "some", "--compare", "--top", 2, "mtr.ratio=0.3", *TINY]
    (tmp_path / "some" / "deeper").mkdir(parents=True)
    for number, file in enumerate(TENCH):
        (tmp_path / "some" / "deeper" / f"{number}.jpg").write_bytes(file.read_bytes())
    run = run_command(main, *asked, "--format", "csv")
    assert run.code == 0, run.err
    rows = list(csv.DictReader(run.out.splitlines()))
    pictures = len(TENCH)
    assert len(rows) == pictures * 2 * 2
    assert [row["policy"] for row in rows[:4]] == ["none", "none", "mtr", "mtr"]
    assert float(rows[2]["reduction"]) >= 0.3
    run = run_command(main, *asked, "--format", "json", "-o", tmp_path / "out" / "x.json")
    assert run.out == f"wrote {tmp_path / 'out' / 'x.json'}\n"
    written = json.loads((tmp_path / "out" / "x.json").read_text())  # other weights: they are random
    assert [one["policy"] for one in written] == ["none", "mtr"] * pictures
    assert all(len(one["classes"]) == 2 for one in written)


def test_a_name_that_is_not_utf_8_is_written_as_it_is(run_command: Callable, tmp_path: Path) -> None:
    picture = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xffg.jpg"))
    picture.write_bytes(TENCH[0].read_bytes())
    run = run_command(main, picture, "--format", "csv", "-o", tmp_path / "x.csv", *TINY)
    assert run.code == 0, run.err
    assert b"d\xffg.jpg,none" in (tmp_path / "x.csv").read_bytes()


def test_pictures_of_any_kind() -> None:
    model = mtr_lab.create_model("vim_nano", pretrained=True)
    with Image.open(TENCH[0]) as image:
        rgb = image.convert("RGB")
    pixels = np.asarray(rgb)
    given = [TENCH[0], str(TENCH[0]), rgb, pixels, pixels / 255, pixels.mean(2).astype(np.uint8), rgb.convert("CMYK")]
    predictions = mtr_lab.predict_images(model, given, top=3)
    assert [prediction.label for prediction in predictions[:5]] == ["tench"] * 5
    assert len({prediction.guesses[0].probability for prediction in predictions[:2]}) == 1
    assert all(len(prediction.guesses) == 3 for prediction in predictions)
    (alone,) = mtr_lab.predict_images(model, TENCH[0])
    guess, expected = alone.guesses[0], predictions[0].guesses[0]
    assert (guess.label, guess.probability) == (expected.label, pytest.approx(expected.probability))
    assert model.training, "the mode of the model is restored"


def test_a_patched_model_predicts_as_it_is_patched() -> None:
    model = mtr_lab.create_model("vim_nano", pretrained=True)
    reduction = mtr_lab.patch(model, "mtr", ratio=0.4)
    (prediction,) = mtr_lab.predict_images(model, [TENCH[1]])
    assert (prediction.policy, prediction.reduction) == ("mtr", reduction.schedule.reduction)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (np.zeros((4, 4, 2), np.uint8), "shape"),
        (np.full((4, 4, 3), 3.0), "values from 0 to 1"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (Path("nowhere.jpg"), "cannot read the image nowhere.jpg"),
    ],
    ids=["channels", "range", "type", "file"],
)
def test_pictures_that_are_none(picture: object, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        mtr_lab.predict_images(mtr_lab.create_model("vim_nano", depth=1, embed_dim=16), [picture])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give pictures"),
        (["nowhere.jpg"], "nowhere.jpg does not exist"),
        (
            ["vim_nano.pt2", "dog.jpg"],
            "vim_nano.pt2 is a file of mtr-lab export, not a picture: write --model vim_nano",
        ),
        (["dog.jpg", "vim_nano.onnx", "--model", "x.onnx"], "not a picture: write --model vim_nano.onnx"),
        (["empty"], "no pictures are in the folder empty"),
        (["broken.jpg"], "cannot read the image broken.jpg"),
        (["dog.jpg", "--top", "0"], "--top 0"),
        (["dog.jpg", "--model", "broken.onnx"], "broken.onnx is not a readable ONNX file"),
        (["dog.jpg", "--model", "broken.pt2"], "broken.pt2 is not a readable .pt2 file"),
        (["dog.jpg", "--model", "x.onnx", "mtr.ratio=0.3"], "leave mtr.ratio=0.3 out"),
        (["dog.jpg", "mtr.ratio=0.99"], "out of reach"),
        (["dog.jpg", "--colour"], "unknown option --colour"),
        (["dog.jpg", "backbone=vim_xs"], "unknown backbone 'vim_xs'"),
        (["dog.jpg", "-o", "/dev/null/x"], "cannot write /dev/null/x"),
        (["dog.jpg", "-o", "empty"], "cannot write empty: it is a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_gets_one_clear_message_and_code_2(
    run_command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("broken.jpg", "broken.onnx", "broken.pt2"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
    Image.new("RGB", (20, 30), "red").save("dog.jpg")
    with_model = [] if "--model" in arguments else TINY
    run = run_command(main, *arguments, *with_model)
    assert run.code == 2, run.err
    assert "Traceback" not in run.err
    assert expected in run.err
