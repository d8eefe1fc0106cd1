"""Twice as many blocks that compute the same: ``python grow.py last.ckpt OUT.safetensors``.

The averaged weights of a run; after each block follows a copy of it whose output projection is zero.
"""

import sys

import torch
from safetensors.torch import save_file
from torch import Tensor


def grown(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a VideoMamba -> that of one with twice as many blocks."""
    result = {name: value for name, value in state.items() if not name.startswith("layers.")}
    for name, value in state.items():
        if name.startswith("layers."):
            _, block, rest = name.split(".", 2)
            result[f"layers.{2 * int(block)}.{rest}"] = value
            added = torch.zeros_like(value) if rest == "mixer.out_proj.weight" else value.clone()
            result[f"layers.{2 * int(block) + 1}.{rest}"] = added
    return result


def main() -> None:
    """Read the averaged weights of a run, without the head's statistics, and write the grown ones."""
    saved = torch.load(sys.argv[1], map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("model."): value for name, value in saved.items() if name.startswith("model.")}
    state = {name.replace("head.linear", "head"): value for name, value in state.items() if "head.norm" not in name}
    save_file(grown(state), sys.argv[2])


if __name__ == "__main__":
    main()
