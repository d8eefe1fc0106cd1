"""Compare the policies of one sweep in pairs: ``python experiments/compare_policies.py SWEEP OUT.json``.

SWEEP has one run folder a policy, all on the same images at the same ratios. The script prints a table in Markdown, and
writes it to OUT.json with the paired differences to ``mtr`` and ``write`` (bootstrap over images, 10 000 resamples).
"""

import json
import sys
from pathlib import Path

from mtr_lab.results.comparison import compare
from mtr_lab.results.predictions_file import load_predictions
from mtr_lab.results.schema import read_result

KEPT = (
    "policy",
    "ratio",
    "reduction",
    "tokens",
    "images",
    "top1",
    "top1_ci",
    "agreement",
    "agreement_ci",
    "kl",
    "kl_ci",
)


def main(sweep: Path, out: Path) -> None:
    folders = [path.parent for path in sorted(sweep.glob("*/result.json"))]
    results = {result["points"][1]["policy"]: result for result in map(read_result, folders)}
    runs = dict(zip(results, map(load_predictions, folders), strict=True))
    rows = []
    for policy, result in results.items():
        for i, point in enumerate(result["points"]):
            if i == 0 and policy != "mtr":
                continue
            row = {key: point[key] for key in KEPT}
            if i:
                row["difference"] = {
                    base: compare(runs[base], i, runs[policy], i) for base in ("mtr", "write") if base != policy
                }
            rows.append(row)
    rows.sort(key=lambda row: (row["ratio"], row["kl"]))
    first = next(iter(results.values()))
    record = {key: first[key] for key in ("task", "backbone", "dataset", "weights", "environment")}
    out.write_text(json.dumps({"kind": "comparison", **record, "points": rows}, indent=1, ensure_ascii=False) + "\n")

    print("| removed | policy | top-1 | agreement | KL | KL against `mtr` | KL against `write` |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{100 * row['reduction']:.1f} %", f"`{row['policy']}`"]
        cells += [f"{100 * row[key]:.1f}" for key in ("top1", "agreement")]
        cells += [f"{row['kl']:.3f} ({row['kl_ci'][0]:.3f} – {row['kl_ci'][1]:.3f})"]
        for base in ("mtr", "write"):
            kl = row.get("difference", {}).get(base, {}).get("kl")
            cells.append(f"{kl['difference']:+.3f} ({kl['ci'][0]:+.3f} – {kl['ci'][1]:+.3f})" if kl else "")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
