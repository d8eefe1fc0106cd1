"""Which models and policies become ONNX files: ``python experiments/exports.py OUT.json [FAMILY …]``.

Small models of each family, with random weights, are reduced by each policy and exported. Every file is compared with
its model, which follows the plans of the file. The table of the page "Export" is printed; OUT.json has its figures.
What it has already is not measured again.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

import mtr_lab
from mtr_lab.errors import UserError

FAMILIES = {
    "Vim": ("vim_ti", {"img_size": 64, "depth": 6, "embed_dim": 32}),
    "VideoMamba": ("videomamba_ti", {"img_size": 64, "depth": 6, "embed_dim": 32}),
    "Mamba-Reg": ("mambareg_s", {"img_size": 64, "depth": 6, "embed_dim": 32}),
    "PlainMamba": ("plainmamba_l1", {"img_size": 64, "depth": 6, "embed_dim": 32}),
    "VMamba": ("vmamba_t", {"img_size": 64, "dims": 16, "depths": [1, 1, 2, 1]}),
    "MambaVision": ("mambavision_t", {"img_size": 128}),
}
UNREDUCED = "unreduced"
RATIOS = {"VMamba": 0.04, "PlainMamba": 0.02}  # what all policies can reach in these small models
SETTINGS = {"directions": {"paths": "last"}}  # the default, "least", measures on images


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
    for family in sys.argv[2:] or FAMILIES:
        name, geometry = FAMILIES[family]
        rows = results.setdefault(family, {})
        for policy in [None, *mtr_lab.list_policies()]:
            if (policy or UNREDUCED) in rows:
                continue
            ratio = RATIOS.get(family, 0.1)
            result = outcome(name, geometry, policy, ratio)
            rows[policy or UNREDUCED] = result if policy is None else {"ratio": ratio, **result}
            print(family, policy, result, file=sys.stderr, flush=True)
            out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    families = [family for family in FAMILIES if family in results]
    print(f"| policy | {' | '.join(families)} |\n|{'---|' * (len(families) + 1)}")
    for policy in [UNREDUCED, *mtr_lab.list_policies()]:
        print(f"| `{policy}` | {' | '.join(cell(results[family].get(policy)) for family in families)} |")


if __name__ == "__main__":
    main()
