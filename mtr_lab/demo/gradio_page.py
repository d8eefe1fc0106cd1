"""The page that Gradio serves: a picture, a policy, a ratio and a block give the tokens that survive."""

import threading
import time
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config

import mtr_lab
from mtr_lab.backbones import blocks_of
from mtr_lab.data.classes import readable_name
from mtr_lab.data.pictures import prepare, sample_pictures
from mtr_lab.errors import UserError
from mtr_lab.listing import list_policies
from mtr_lab.packages import require
from mtr_lab.pictures import observe
from mtr_lab.pictures.panels import token_panel

RUNS = 3
"""Forward passes that are timed; the fastest counts."""
RATIOS = (0.05, 0.6)
"""The lowest and the highest ratio that can be asked for."""


class Demo:
    """A model whose policy changes from request to request.

    Args:
        name: of the model, with its published weights.

    Raises:
        UserError: an unknown model, one of videos, or one without published weights.
    """

    def __init__(self, name: str) -> None:
        with torch.device("meta"):
            outline = mtr_lab.create_model(name)
        if len(outline.input_shape) != 3:
            raise UserError(f"--model {name} takes videos, and the page shows pictures: choose a model of images.")
        self.policies = [policy for policy in list_policies() if can_reduce(outline, policy)]
        self.model = mtr_lab.create_model(name, pretrained=True).eval()
        self.config = resolve_model_data_config(self.model)
        labels = self.model.pretrained_cfg["label_names"] or map(str, range(self.model.num_classes))
        self.labels = [readable_name(label) for label in labels]
        self.depth = len(blocks_of(self.model))
        self._lock = threading.Lock()

    def show(
        self, picture: Any, policy: str, ratio: float, block: int
    ) -> tuple[np.ndarray, dict[str, float], dict[str, float], str]:
        """The tokens after a block, the probabilities unreduced and reduced, and their cost in words.

        Raises:
            UserError: no picture, or a ratio out of the policy's reach.
        """
        if picture is None:
            raise UserError("Give a picture first.")
        images = prepare(picture, self.config)[None]
        with self._lock, torch.inference_mode():
            mtr_lab.unpatch(self.model)
            before, slow = self._classify(images)
            reduction = mtr_lab.patch(self.model, policy, ratio=ratio)
            after, fast = self._classify(images)
            (observation,) = observe(self.model, reduction, images)
            schedule = reduction.schedule
        view = observation.blocks[min(block, self.depth - 1)]
        cost, whole = schedule.flops + schedule.flops_overhead, schedule.flops_unreduced
        words = (
            f"{view.tokens} of {view.unreduced} tokens after block {block}. {whole / 1e9:.2f} → {cost / 1e9:.2f} "
            f"GFLOPs ({100 * schedule.reduction:.1f} % fewer), {1e3 * slow:.0f} → {1e3 * fast:.0f} ms on this machine."
        )
        return np.asarray(token_panel(observation.image, view, 3)), before, after, words

    def _classify(self, images: torch.Tensor) -> tuple[dict[str, float], float]:
        """The probabilities by class, and the seconds of the fastest forward pass."""
        seconds = []
        for _ in range(RUNS):
            start = time.perf_counter()
            logits = self.model(images)
            seconds.append(time.perf_counter() - start)
        values, classes = logits[0].softmax(-1).topk(min(5, len(self.labels)))
        return {self.labels[n]: float(v) for v, n in zip(values, classes.tolist(), strict=True)}, min(seconds)


def can_reduce(model: Any, policy: str) -> bool:
    """Whether a policy can reduce a model, without images to measure on."""
    try:
        mtr_lab.patch(model, policy, ratio=RATIOS[0])
    except UserError:
        return False
    return True


def build(name: str = "vim_nano") -> Any:
    """The page, a ``gradio.Blocks``.

    Raises:
        UserError: Gradio is missing, or the model has no published weights.
    """
    require("gradio", "demo", "mtr-lab demo")
    import gradio

    demo = Demo(name)

    def show(*given: Any) -> Any:
        try:
            return demo.show(*given)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    samples = [str(path) for path in sample_pictures(5)]
    with gradio.Blocks(title="Token reduction for Vision Mamba", analytics_enabled=False) as page:
        gradio.Markdown(
            f"# Token reduction for Vision Mamba\nTokens that {name} keeps of your picture, and its predictions. "
            "Merged patches have the mean colour of their token."
        )
        with gradio.Row():
            with gradio.Column():
                picture = gradio.Image(type="pil", label="picture", value=Image.open(samples[0]), height=300)
                gradio.Examples(samples, picture)
                policy = gradio.Dropdown(demo.policies, value="mtr", label="policy")
                ratio = gradio.Slider(*RATIOS, 0.4, step=0.05, label="ratio: share of the FLOPs to remove")
                block = gradio.Slider(0, demo.depth - 1, demo.depth - 1, step=1, label="after block")
                button = gradio.Button("Show", variant="primary")
            with gradio.Column():
                tokens = gradio.Image(label="tokens", height=300)
                cost = gradio.Markdown()
                with gradio.Row():
                    before = gradio.Label(label="unreduced", num_top_classes=5)
                    after = gradio.Label(label="reduced", num_top_classes=5)
        inputs, outputs = [picture, policy, ratio, block], [tokens, before, after, cost]
        button.click(show, inputs, outputs)
        for control in (policy, ratio, block):
            control.change(show, inputs, outputs)
        page.load(show, inputs, outputs)
    return page
