"""Merging tokens for the MLP alone against reducing the whole block, at equal FLOPs, in a hierarchical model.

    python experiments/mlp_merging.py

VMamba-T with random weights, on 8 of the bundled pictures at 224². In the second block of a stage, tokens merge for its
MLP alone (``mtr.merge_at=mlp``), or a quarter of them before the whole block, whose update then all merged tokens get.
Both remove the same FLOPs. The same Δ, of this block, chooses the clusters of both. Printed is the relative error of
the block's update over the whole grid: ‖reduced - unreduced‖ / ‖unreduced - input‖. No trained weights were at hand;
they may decide otherwise. Writes results/mlp_merging.json.
"""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor, resize

import mtr_lab
from mtr_lab.backbones import blocks_of, run
from mtr_lab.backbones.interface import first_state
from mtr_lab.reduction import make_policy, policy_config
from mtr_lab.results.atomic import replace_file
from mtr_lab.tokens import TokenState
from mtr_lab.tokens.positions import Positions

SAMPLE = Path(mtr_lab.__file__).parent / "assets" / "imagenette_sample"
SHARE = 0.25  # of the tokens, removed before the whole block
POLICIES = {
    "Δ, any target (mtr)": {},
    "Δ, neighbours": {"grouping": "alternate", "matching": "neighbours", "selection": "score"},
}


def pictures(count: int) -> Tensor:
    """Normalised pictures, (count, 3, 224, 224), one of each class in turn."""
    files = sorted(SAMPLE.rglob("*.JPEG"), key=lambda file: (file.name, file.parent.name))
    images = [resize(pil_to_tensor(Image.open(file).convert("RGB")), [224, 224]) for file in islice(files, count)]
    return (torch.stack(images) / 255 - 0.45) / 0.225


def random_model(scaled: bool) -> Any:
    """VMamba-T as its authors initialise it, or with linear layers that keep the variance of their input."""
    torch.manual_seed(0)
    model = mtr_lab.create_model("vmamba_t").eval()
    for module in model.modules():
        if scaled and isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def for_the_whole_block(block: Any, state: TokenState, policy: Any, remove: int) -> Tensor:
    """The stream after the block on merged tokens, whose update all positions get, (B, L, C)."""
    normed, _ = block.norm(state.raw_hidden, state.raw_residual, None)
    _, evidence = block.mix(normed, Positions(state), policy.needs)
    reduced = state.traced().reduced(policy(state, evidence, remove)).applied()
    update = TokenState(*block(*reduced)).stream - reduced.stream
    assert reduced.source is not None
    return state.stream + update.gather(1, reduced.source[..., None].expand_as(state.stream))


def equal_count(block: Any, layout: Any, remove: int) -> int:
    """The tokens to merge for the MLP that save at least what ``remove`` tokens save in the whole block."""
    left = layout.tokens - remove
    wanted = block.costs(left, left, layout).flops
    counts = range(layout.tokens)
    return next(n for n in counts if block.costs(layout.tokens, layout.tokens - n, layout).flops <= wanted)


@torch.inference_mode()
def main() -> None:
    """Measure, print, write."""
    images, rows = pictures(8), []
    print(
        f"{'weights':12s} {'clusters':22s} {'stage':>5s} {'whole block':>12s} {'MLP alone':>10s} {'times closer':>13s}"
    )
    for weights in ("authors'", "unit gain"):
        model = random_model(weights == "unit gain")
        states = [before for before, _ in run(model, first_state(model, images))]
        blocks, number = blocks_of(model), 0
        for stage, depth in enumerate(len(part.blocks) for part in model.stages):
            block, state, layout = blocks[number + 1], states[number + 1].applied(), model.layouts()[stage]
            full = TokenState(*block(*state)).stream
            scale = (full - state.stream).norm()
            remove = round(SHARE * layout.tokens)
            merged = equal_count(block, layout, remove)
            for clusters, changes in POLICIES.items():
                policy = make_policy(policy_config("mtr", **changes))
                whole = (for_the_whole_block(block, state, policy, remove) - full).norm() / scale
                schedule = [merged * (i == number + 1) for i in range(len(blocks))]
                mtr_lab.patch(model, "mtr", schedule=schedule, merge_at="mlp", **changes)
                alone = (TokenState(*block(*state)).stream - full).norm() / scale
                mtr_lab.unpatch(model)
                errors = {"whole_block": round(whole.item(), 4), "mlp_alone": round(alone.item(), 4)}
                rows.append({"weights": weights, "clusters": clusters, "stage": stage + 1, **errors})
                print(f"{weights:12s} {clusters:22s} {stage + 1:5d} {whole:12.3f} {alone:10.3f} {whole / alone:13.2f}")
            number += depth
    with replace_file(Path(__file__).parent / "results" / "mlp_merging.json") as stream:
        stream.write(json.dumps({"model": "vmamba_t", "share": SHARE, "rows": rows}, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
