"""``python -m mtr_lab task=segmentation``, end to end on a few bundled images."""

from pathlib import Path

import numpy as np
from PIL import Image
from small_dense import CAMVID, QUICK, SEGMENTATION

from mtr_lab.__main__ import main as evaluate_main
from mtr_lab.results.metrics import score
from mtr_lab.results.predictions_file import load_predictions
from mtr_lab.results.schema import read_result
from mtr_lab.results.segmentations import Segmentations

EVALUATION = [*SEGMENTATION, *QUICK]


def test_a_run_on_the_bundled_images(run_program) -> None:
    run = run_program(evaluate_main, *EVALUATION, "pictures=1", "timing.batch_size=2", "timing.seconds=0.1")
    assert run.code == 0, run.err
    result = read_result(run.folder)
    assert (result["task"], result["dataset"]) == ("segmentation", "camvid_sample")
    unreduced, reduced = result["points"]
    assert reduced["reduction"] >= 0.2
    assert reduced["flops_head"] == unreduced["flops_head"] > 0
    for point in result["points"]:
        assert point["images"] == 8
        assert 0 <= point["miou"] <= 1
        assert point["img_per_s"] > 0
    assert unreduced["miou_difference"] == 0
    predictions = load_predictions(run.folder)
    assert isinstance(predictions, Segmentations)
    assert predictions.points.tolist() == ["none@0", "mtr@0.2"]
    # Every pixel that has a class is in the matrices of both points.
    first = np.array(Image.open(CAMVID / "val/labels" / f"{predictions.ids[0]}.png"))
    counts = np.bincount(first.flatten(), minlength=12)[:11]
    assert predictions.labels[0].tolist() == counts.tolist()
    assert (predictions.confusion.sum(-1) == predictions.labels).all()
    assert score(predictions, 1)["miou"] == reduced["miou"]
    picture, vectors = sorted((run.folder / "pictures").iterdir())
    assert (picture.name, vectors.name) == (f"000_{predictions.ids[0]}.png", f"000_{predictions.ids[0]}.svg")
    assert Image.open(picture).width > 4 * 600
    assert all(f">{word}<" in vectors.read_text() for word in ("truth", "unreduced", "pedestrian", "was right"))


def test_sliding_windows_and_a_sweep(run_program, tmp_path: Path) -> None:
    square = [*EVALUATION[:-1], "backbone.img_size=[64,64]", "dataset.inference=slide", "trainer.limit_test_batches=1"]
    sweep = run_program(
        evaluate_main, "hydra.mode=MULTIRUN", *square, "mtr.ratio=0.1,0.2", f"hydra.sweep.dir={tmp_path / 'sweep'}"
    )
    assert sweep.code == 0, sweep.err
    results = [read_result(file) for file in sorted((tmp_path / "sweep").glob("*/result.json"))]
    assert sorted(result["unreduced"]["reused"] for result in results) == [False, True]
    run = run_program(evaluate_main, *square, "mtr.ratio=0.2", "pictures=2")
    alone, ids = read_result(run.folder), load_predictions(run.folder).ids
    pictures = sorted((run.folder / "pictures").glob("*.png"))
    assert [picture.stem for picture in pictures] == [f"000_{ids[0]}", f"001_{ids[1]}"]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()
    assert [point["miou"] for point in alone["points"]] == [point["miou"] for point in results[1]["points"]]
