"""Which models and policies become ONNX files: ``python experiments/exports.py OUT.json [FAMILY …]``.

Small models of each family, with random weights, are reduced by each policy and exported. Every file passes the checker
of ONNX and is compared with its model, which follows the plans of the file. Then models of full size are exported, and
their files loaded. The tables of the page "Export" are printed; OUT.json has their figures. What it has already is not
measured again. Seconds are CPU seconds of one thread.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch

import mtr_lab
from mtr_lab.cli.program import compose
from mtr_lab.errors import UserError
from mtr_lab.export.run import configured_model

FAMILIES = {
    "Vim": ("vim_ti", {"img_size": 64, "depth": 6, "embed_dim": 32}),
    "VideoMamba": ("videomamba_ti", {"img_size": 64, "depth": 6, "embed_dim": 32}),
    "Mamba-Reg": ("mambareg_s", {"img_size": 64, "depth": 6, "embed_dim": 32}),
    "PlainMamba": ("plainmamba_l1", {"img_size": 64, "depth": 6, "embed_dim": 32}),
    "VMamba": ("vmamba_t", {"img_size": 64, "dims": 16, "depths": [1, 1, 2, 1]}),
    "MambaVision": ("mambavision_t", {"img_size": 128}),
}
UNREDUCED = "unreduced"
# What the policies can reach in these small models; 0.1 where nothing is said.
RATIOS = {"VMamba": 0.04, "PlainMamba": 0.02}
LARGER = {("Mamba-Reg", "adjacent"): {"img_size": 128}}  # on a smaller grid registers stand between all neighbours
SETTINGS = {"directions": {"paths": "last"}}  # the default, "least", measures on images

FILES = "files"
FULL_SIZE = {
    "vim_nano": [],
    "vim_s": ["backbone=vim_s", "backbone.pretrained=false"],
    "segmenter of vim_nano": ["task=segmentation"],
}
"""Overrides of ``mtr-lab export``."""


def outcome(name: str, geometry: dict[str, object], policy: str | None, ratio: float) -> dict[str, object]:
    """The nodes of the file and its largest error, or the reason why there is no file."""
    torch.manual_seed(0)
    model = mtr_lab.create_model(name, **geometry).eval()
    try:
        if policy is not None:
            mtr_lab.patch(model, policy, ratio=ratio, **SETTINGS.get(policy, {}))
        with tempfile.TemporaryDirectory() as folder:
            exported = mtr_lab.export_model(model, Path(folder) / "model.onnx", name=name)
    except UserError as error:
        return {"reason": str(error)}
    return {"nodes": exported.nodes, "error": exported.parity.error, "agreement": exported.parity.agreement}


def full_size(overrides: list[str]) -> dict[str, Any]:
    """A model of full size under ``mtr``, ratio 0.3: nodes, bytes, error, and seconds to export and to load."""
    config = compose("export", overrides)
    torch.manual_seed(0)
    model = configured_model(config)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        exported = mtr_lab.export_model(
            model, Path(folder) / "model.onnx", task=config.task.name, name=config.backbone.name
        )
        export_s, size = time.process_time() - start, exported.file.stat().st_size
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        start = time.process_time()
        onnxruntime.InferenceSession(exported.file, options, providers=["CPUExecutionProvider"])
        load_s = time.process_time() - start
    result = {"nodes": exported.nodes, "bytes": size, "error": exported.parity.error, "ratio": config.mtr.ratio}
    return {**result, "export_s": round(export_s, 2), "load_s": round(load_s, 2)}


def cell(result: dict[str, object] | None) -> str:
    """A cell of the table: the error, a dash for a reason, nothing for what was not measured."""
    if result is None:
        return ""
    return f"{result['error']:.0e}" if "error" in result else "–"


def main() -> None:
    """Export, print the table and the reasons, and write the figures."""
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    results: dict[str, dict[str, dict[str, object]]] = json.loads(out.read_text()) if out.exists() else {}
    files = results.setdefault(FILES, {})
    for name, overrides in FULL_SIZE.items():
        if name not in files:
            files[name] = full_size(overrides)
            print(name, files[name], file=sys.stderr, flush=True)
            out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for family in sys.argv[2:] or FAMILIES:
        name, geometry = FAMILIES[family]
        rows = results.setdefault(family, {})
        for policy in [None, *mtr_lab.list_policies()]:
            if (policy or UNREDUCED) in rows:
                continue
            ratio = 0.05 if (family, policy) in LARGER else RATIOS.get(family, 0.1)
            result = outcome(name, {**geometry, **LARGER.get((family, policy), {})}, policy, ratio)
            rows[policy or UNREDUCED] = result if policy is None else {"ratio": ratio, **result}
            print(family, policy, result, file=sys.stderr, flush=True)
            out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("| model | nodes | MB | export | loading |\n|---|---|---|---|---|")
    for name, file in files.items():
        seconds = f"{file['export_s']:.0f} s | {file['load_s']:.1f} s"
        print(f"| {name} | {file['nodes']} | {file['bytes'] / 1e6:.0f} | {seconds} |")
    families = [family for family in FAMILIES if family in results]
    print(f"| policy | {' | '.join(families)} |\n|{'---|' * (len(families) + 1)}")
    for policy in [UNREDUCED, *mtr_lab.list_policies()]:
        print(f"| `{policy}` | {' | '.join(cell(results[family].get(policy)) for family in families)} |")


if __name__ == "__main__":
    main()
