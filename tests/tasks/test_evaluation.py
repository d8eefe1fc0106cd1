"""An evaluation keeps the results of a batch when it runs the next one."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from mtr_lab import create_model
from mtr_lab.reduction import Reduction, policy_config
from mtr_lab.tasks.classification.evaluation import ClassifiedBatch, ClassifierEvaluation
from mtr_lab.tasks.evaluation import OperatingPoint


def batch(first: int, images: int) -> dict[str, Any]:
    names = np.array([f"{first + i}.png" for i in range(images)], np.str_)
    pixels = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(first))
    return {"image": pixels, "label": torch.arange(images), "id": names, "hash": names, "skipped": []}


def test_results_are_read_after_the_next_batch_has_started() -> None:
    model = create_model("vim_nano", img_size=32, depth=6).eval()
    reduction = Reduction(model, policy_config("mtr"))
    points = [OperatingPoint("none", 0.0, reduction.solve(0.0)), OperatingPoint("mtr", 0.2, reduction.solve(0.2))]
    task = ClassifierEvaluation(model, reduction, points)
    batches = [batch(0, 4), batch(4, 4), batch(8, 1)]
    with torch.inference_mode():
        kept = [len(task.results) for index, each in enumerate(batches) if task.test_step(each, index) is None]
        task.on_test_epoch_end()
        expected = [task.forward_at(points[1], each["image"]).log_softmax(-1).numpy() for each in batches]
    assert (kept, len(task.results)) == ([0, 1, 2], 3)
    found = task.predictions()
    assert list(found.ids) == [f"{i}.png" for i in range(9)]
    assert list(found.labels) == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    np.testing.assert_array_equal(found.log_probs[1], np.concatenate(expected))


def test_the_predictions_of_many_batches_are_in_memory_once() -> None:
    model = create_model("vim_nano", img_size=32, depth=1)
    reduction = Reduction(model, policy_config("mtr"))
    task = ClassifierEvaluation(model, reduction, [OperatingPoint("none", 0.0, reduction.solve(0.0))] * 2)
    tracemalloc.start()
    for i in range(200):
        names, log_probs = np.array([str(i)] * 20), np.full((2, 20, 1000), -i, np.float32)
        task.receive(ClassifiedBatch(names, names, np.full(20, i), np.zeros((2, 20, 5), np.int32), log_probs, []))
    found = task.predictions()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.log_probs.shape == (2, 4000, 1000)
    np.testing.assert_array_equal(found.log_probs[:, ::20, 0], -np.tile(np.arange(200.0), (2, 1)))
    assert peak < 1.2 * found.log_probs.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_results_are_not_read_before_a_gpu_has_them(cuda_graph: bool) -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)  # of several, not the current one
    model = create_model("vim_nano", img_size=32, depth=6).eval().to(device)
    reduction = Reduction(model, policy_config("mtr"))
    points = [OperatingPoint("none", 0.0, reduction.solve(0.0)), OperatingPoint("mtr", 0.2, reduction.solve(0.2))]
    task = ClassifierEvaluation(model, reduction, points, cuda_graph)
    slow = ClassifierEvaluation(model, reduction, points)
    batches = [{**each, "image": each["image"].to(device)} for each in (batch(0, 4), batch(4, 4), batch(8, 1))]
    with torch.inference_mode():
        for index, each in enumerate(batches):
            slow.test_step(each, index)
            torch.cuda.synchronize(device)
        with torch.cuda.device(device):
            for index, each in enumerate(batches):
                torch.cuda._sleep(100_000_000)  # cycles: the stream is busy while the host continues
                task.test_step(each, index)
    for each in (task, slow):
        each.on_test_epoch_end()
    np.testing.assert_allclose(task.predictions().log_probs, slow.predictions().log_probs, rtol=1e-5, atol=1e-6)
