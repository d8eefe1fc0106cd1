"""The pages of ``mtr-lab demo``: the requests of the served one, and the static one in a browser."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mtr_lab
from mtr_lab.data.pictures import prepare, sample_pictures
from mtr_lab.demo import __main__ as program
from mtr_lab.demo import gradio_page, static_page
from mtr_lab.errors import UserError

CHROMIUM = shutil.which("chromium")


def test_a_request_of_the_served_page() -> None:
    demo = gradio_page.Demo("vim_nano")
    with Image.open(sample_pictures(1)[0]) as picture:
        tokens, before, after, words = demo.show(picture, "mtr", 0.4, 15)
    assert tokens.shape == (112 * 3, 112 * 3, 3)
    assert next(iter(before)) == next(iter(after)) == "tench"
    assert before != after
    assert "of 197 tokens after block 15" in words
    assert "% fewer" in words
    with pytest.raises(UserError, match="Give a picture"):
        demo.show(None, "mtr", 0.4, 15)
    with pytest.raises(UserError, match="out of reach"):
        demo.show(picture, "mtr", 0.99, 15)


def test_policies_that_the_model_cannot_follow_are_not_offered() -> None:
    offered = gradio_page.Demo("vim_nano").policies
    assert {"mtr", "write", "tome", "resolution"} < set(offered)
    assert not {"mlp", "quartermap", "frames", "directions"} & set(offered)


def test_a_model_of_videos_is_refused() -> None:
    with pytest.raises(UserError, match="--model videomamba_nano takes videos"):
        gradio_page.Demo("videomamba_nano")


@pytest.mark.slow
def test_the_served_page_shows_mistakes_without_a_traceback() -> None:
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    page = gradio_page.build("vim_nano")
    show = next(function.fn for function in page.fns.values() if function.fn.__name__ == "show")
    with pytest.raises(gradio.Error, match="Give a picture") as raised:
        show(None, "mtr", 0.4, 15)
    assert not raised.value.print_exception


def test_a_missing_runtime_is_named(run_command: Callable, tmp_path: Path) -> None:
    run = run_command(program.main, "--page", tmp_path / "x.html", "--runtime", tmp_path)
    assert run.code == 2, run.err
    assert "npm install onnxruntime-web" in run.err
    assert not (tmp_path / "x.html").exists()


def test_weights_are_stored_once_and_lose_nothing() -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    generator = np.random.default_rng(0)
    exact = generator.standard_normal((30, 40)).astype(np.float16).astype(np.float32)
    other = generator.standard_normal((30, 40)).astype(np.float32)
    tensors = [onnx.numpy_helper.from_array(values, name) for values, name in ((exact, "a"), (other, "b"))]
    value = onnx.helper.make_tensor_value_info
    nodes = [onnx.helper.make_node("Add", ["a", "x"], ["s"]), onnx.helper.make_node("Add", ["s", "b"], ["y"])]
    graph = onnx.helper.make_graph(nodes, "g", [value("x", 1, [30, 40])], [value("y", 1, [30, 40])], tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    weights = static_page.Weights()
    moved = [onnx.load_from_string(weights.move_out(model.SerializeToString())) for _ in range(2)]
    assert len(weights.content) <= exact.nbytes // 2 + other.nbytes + 64
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in moved[1].graph.initializer]
    stored = [
        np.frombuffer(bytes(weights.content), kind, 1200, int(place["offset"])).reshape(30, 40)
        for kind, place in zip((np.float16, np.float32), places, strict=True)
    ]
    assert np.array_equal(stored[0].astype(np.float32), exact)
    assert np.array_equal(stored[1], other)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None or shutil.which("npm") is None, reason="needs chromium and npm")
def test_the_static_page_classifies_a_picture_in_a_browser(tmp_path: Path) -> None:
    """It opens from the file system, makes no request, and computes what PyTorch computes."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(tmp_path), "onnxruntime-web@1"]
    subprocess.run(install, check=True, cwd=tmp_path)
    torch.manual_seed(0)
    model = mtr_lab.create_model("vim_nano", depth=3, embed_dim=32).eval()
    runtime = tmp_path / "node_modules" / "onnxruntime-web"
    file = static_page.write_page(tmp_path / "demo.html", runtime, model, "vim_nano", [("mtr", 0.2)])
    config = {**model.pretrained_cfg, "crop_mode": "center"}
    names = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    pictures = sample_pictures(3)
    images = torch.stack([prepare(picture, {name: config[name] for name in names}) for picture in pictures])
    mtr_lab.patch(model, "mtr", ratio=0.2)
    with torch.no_grad():
        expected = model(images)
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        page, errors, requests = browser.new_page(), [], []
        page.set_default_timeout(300_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("body[data-ready]")
        code = "async (pixels) => Array.from((await demo.run(1, Float32Array.from(pixels))).logits)"
        logits = torch.tensor([page.evaluate(code, image.flatten().tolist()) for image in images])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
        page.set_input_files("#file", str(pictures[1]))
        page.wait_for_function("document.querySelector('#state').textContent.includes('fewer FLOPs')")
        assert "tokens remain" in page.inner_text("#caption")
        assert len(page.query_selector_all("#rows tr")) == 2
        folder = Path(os.environ.get("MTR_LAB_SCREENSHOTS", tmp_path))
        page.screenshot(path=str(folder / "demo.png"), full_page=True)
        browser.close()
    assert not errors
    assert all(url.startswith(("file:", "blob:", "data:")) for url in requests)
