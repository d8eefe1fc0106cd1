"""The metrics of a dense task under each policy: ``python experiments/dense_tradeoff.py SWEEP OUT.json``.

SWEEP has one run folder per policy: ``mtr-lab eval experiment=dense_policies task=segmentation`` (or detection). The
script prints a table in Markdown: the task's metrics at each ratio in percent, and their paired differences to the
unreduced model with the interval of level 0.95 (bootstrap over images). OUT.json receives the same figures.
"""

import json
import sys
from pathlib import Path

from mtr_lab.results.comparison import compare
from mtr_lab.results.metrics import task_metrics
from mtr_lab.results.predictions_file import load_predictions
from mtr_lab.results.schema import read_result


def main(sweep: Path, out: Path) -> None:
    folders = [path.parent for path in sorted(sweep.glob("*/result.json"))]
    rows = []
    for folder in folders:
        result, predictions = read_result(folder), load_predictions(folder)
        metrics = [metric.key for metric in task_metrics(result["task"]) if metric.compared]
        for i, point in enumerate(result["points"]):
            if i == 0 and rows:
                continue  # the unreduced model, the same in all runs
            rows.append({**point, "difference": compare(predictions, 0, predictions, i)})
    rows.sort(key=lambda row: (row["ratio"], -row[metrics[0]]))
    record = {key: result[key] for key in ("task", "backbone", "dataset", "weights", "environment")}
    out.write_text(json.dumps({"kind": "comparison", **record, "points": rows}, indent=1, ensure_ascii=False) + "\n")

    print("| removed | policy |" + "".join(f" {metric} | against unreduced |" for metric in metrics))
    print("|---|---|" + "---|---|" * len(metrics))
    for row in rows:
        cells = [f"{100 * row['reduction']:.1f} %", f"`{row['policy']}`"]
        for metric in metrics:
            difference = row["difference"][metric]
            low, high = (100 * end for end in difference["ci"])
            change = (
                f"{100 * difference['difference']:+.1f} ({low:+.1f} – {high:+.1f})" if row["policy"] != "none" else ""
            )
            cells += [f"{100 * row[metric]:.1f}", change]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
