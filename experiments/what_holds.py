"""What holds where: every line of every model, compared in pairs, and the tables of README.md.

    python experiments/what_holds.py collect SWEEP OUT.npz           # a classifier: metrics of every image and point
    python experiments/what_holds.py compare OUT.npz OUT.json        # of a dense task: SWEEP OUT.json
    python experiments/what_holds.py tables results/lines README.md  # between the comments with their names

A line is a policy, with its settings where they are not those of its preset; a size of the picture; or a smaller
model. A cell is a model at a ratio. In each cell, the best line of a metric is compared with every other one, in pairs
over images: by McNemar's test for top-1, by the bootstrap otherwise. A line is level with the best if p >= 0.05 after
Holm's correction for all such comparisons of the model in this metric.
"""

import json
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtr_lab.errors import UserError
from mtr_lab.measure.statistics import holm
from mtr_lab.reduction import policy_config
from mtr_lab.report.dashboard.runs import read_run, smaller_models
from mtr_lab.results.comparison import compare, compare_all, correct
from mtr_lab.results.metrics import task_metrics
from mtr_lab.results.predictions_file import load_predictions
from mtr_lab.results.schema import read_result

RATIOS = (0.2, 0.3, 0.4, 0.5)
NEAR = 0.01
"""A smaller model stands in the cell whose ratio its own reduction falls short of by at most this."""
KEYS = ("policy", "ratio", "reduction", "flops_true", "resolution", "images")
CLAIMS = {
    "Δ before chance, both merged": ("mtr score=random", "mtr"),
    "Δ merged before random pruning (ten seeds)": ("random", "mtr"),
    "merging before pruning": ("mtr merge=prune", "mtr"),
    "order restored before not": ("mtr order=importance", "mtr"),
    "Δ before the class token's similarity": ("mtr score=class_token", "mtr"),
    "Δ before B": ("mtr score=b", "mtr"),
    "Δ before C": ("mtr score=c", "mtr"),
}
"""What the paper claims: its own line is the second one."""
FALLING = {"kl"}
"""Metrics of which less is better."""
MEASURED = " schedule=auto"
"""What distinguishes a policy with a measured schedule."""


def label(settings: dict[str, Any], policy: str) -> str:
    """The name of a line: its policy, and the settings that are not those of the policy's preset."""
    try:
        preset = policy_config(policy)
    except UserError:  # a smaller model
        return policy
    changed = [
        key for key in preset if key not in ("resolution", "policy") and settings.get(key, preset[key]) != preset[key]
    ]
    return " ".join([policy, *(f"{key}={settings[key]}" for key in changed)])


def collect(sweep: Path, out: Path) -> None:
    """The metrics of every image at every point of a classifier's runs, without the predictions, which are large."""
    with multiprocessing.Pool() as pool:
        runs = pool.starmap(read_run, [(path, path.parent.name) for path in sorted(sweep.glob("*/result.json"))])
    largest = max(runs, key=lambda run: run.result["points"][0]["flops_true"] or 0).result
    lines, metrics = [], []
    for run in [*runs, *smaller_models(runs)]:
        if run.result["backbone"] != largest["backbone"]:
            continue
        assert run.sample is not None, "; ".join(run.notes)
        for point, values in zip(run.result["points"], run.sample.metrics, strict=True):
            if point["policy"] == "none" and lines:
                continue
            figures = {key: point[key] for key in (*KEYS, *_metric_keys(point)) if key in point}  # type: ignore[literal-required]
            lines.append({"line": label(run.result["config"]["mtr"], point["policy"]), **figures})
            metrics.append(values)
    record = {key: largest[key] for key in ("task", "backbone", "dataset", "weights", "environment")}  # type: ignore[literal-required]
    arrays = {name: np.stack([values[name] for values in metrics]) for name in metrics[0]}
    small = {name: array.astype(np.float32 if name == "kl" else np.uint8) for name, array in arrays.items()}
    texts = {"lines": json.dumps(lines), "record": json.dumps(record)}
    np.savez_compressed(out, **texts, **small)  # type: ignore[arg-type]


def _metric_keys(point: Any) -> list[str]:
    metrics = ("top1", "agreement", "kl", "miou", "map", "ap50")
    return [key for name in metrics for key in (name, f"{name}_ci") if key in point]


def compare_classifier(file: Path) -> dict[str, Any]:
    with np.load(file) as arrays:
        lines, record = (json.loads(str(arrays[name])) for name in ("lines", "record"))
        values = {name: arrays[name].astype(np.float64) for name in ("top1", "kl")}
    points = [{name: array[i] for name, array in values.items()} for i in range(len(lines))]
    runs = [1] * len(points)
    for ratio in RATIOS:  # the mean over the seeds of random pruning
        seeds = [i for i, line in enumerate(lines) if _is(line, "random", ratio, any_seed=True)]
        if len(seeds) > 1:
            means = {key: float(np.mean([lines[i][key] for i in seeds])) for key in ("reduction", *values)}
            lines.append({"line": "random, mean", "policy": "random", "ratio": ratio, "seeds": len(seeds), **means})
            points.append({name: sum(points[i][name] for i in seeds) for name in values})
            runs.append(len(seeds))

    def difference(pairs: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        paired: list[Any] = compare_all(points, pairs, runs=runs)
        correct(paired)
        return paired

    cells = {metric: standings(lines, metric, difference) for metric in values}
    return {
        "kind": "lines",
        **record,
        "lines": lines,
        "standings": cells,
        "claims": claims(lines, difference),
        "pictures": pictures(lines, difference),
    }


def _is(line: dict[str, Any], name: str, ratio: float | None, any_seed: bool = False) -> bool:
    own = line["line"].split(" seed=")[0] if any_seed else line["line"]
    return own == name and line.get("ratio") == ratio


def at(lines: Sequence[dict[str, Any]], name: str, ratio: float | None) -> int | None:
    return next((i for i, line in enumerate(lines) if _is(line, name, ratio)), None)


def cell(lines: Sequence[dict[str, Any]], ratio: float) -> list[int]:
    """The lines that stand in a cell: policies as they are and with a measured schedule, and the smaller model."""
    compared = []
    for i, line in enumerate(lines):
        changed = line["line"].split(" ")[1:]
        policy = line.get("ratio") == ratio and all(change.startswith("schedule=") for change in changed)
        smaller = line.get("ratio") is None and "resolution" not in line and -NEAR <= line["reduction"] - ratio < 0.05
        if (policy or smaller) and line["policy"] != "none":
            compared.append(i)
    return compared


def standings(lines: Sequence[dict[str, Any]], metric: str, difference: Any) -> dict[str, Any]:
    """Of every ratio, the best line and how much the others differ from it."""
    sign = -1 if metric in FALLING else 1
    pairs, of = [], []
    best = {}
    for ratio in RATIOS:
        compared = cell(lines, ratio)
        if compared:
            best[ratio] = max(compared, key=lambda i: sign * lines[i][metric])
            pairs += [(best[ratio], i) for i in compared if i != best[ratio]]
            of += [(ratio, i) for i in compared if i != best[ratio]]
    differences = difference(pairs)
    table: dict[str, Any] = {str(ratio): {"best": lines[i]["line"], "others": {}} for ratio, i in best.items()}
    for (ratio, i), paired in zip(of, differences, strict=True):
        table[str(ratio)]["others"][lines[i]["line"]] = paired[metric]
    return table


def claims(lines: Sequence[dict[str, Any]], difference: Any) -> dict[str, Any]:
    """What the paper claims: its line minus the other one."""
    pairs, of = [], []
    for claim, (other, own) in CLAIMS.items():
        for ratio in RATIOS:
            first, second = at(lines, "random, mean" if other == "random" else other, ratio), at(lines, own, ratio)
            if first is not None and second is not None:
                pairs.append((first, second))
                of.append((claim, ratio))
    table: dict[str, Any] = {}
    for (claim, ratio), paired in zip(of, difference(pairs), strict=True):
        table.setdefault(claim, {})[str(ratio)] = paired
    return table


def pictures(lines: Sequence[dict[str, Any]], difference: Any) -> list[dict[str, Any]]:
    """Policies at the FLOPs of each size of the picture, against that size."""
    pairs, rows = [], []
    for line in lines:
        if line["policy"] == "resolution" and line.get("ratio") not in (None, *RATIOS):
            for name in ("fovea" + MEASURED, "fovea", "write", "mtr", "random"):
                first, second = at(lines, "resolution", line["ratio"]), at(lines, name, line["ratio"])
                if first is not None and second is not None:
                    pairs.append((first, second))
                    rows.append({"line": name, "ratio": line["ratio"], "resolution": line["resolution"]})
    return [{**row, **paired} for row, paired in zip(rows, difference(pairs), strict=True)]


def compare_dense(sweep: Path) -> dict[str, Any]:
    folders = [path.parent for path in sorted(sweep.glob("*/result.json"))]
    lines, where = [], []
    for folder in folders:
        result = read_result(folder)
        for i, point in enumerate(result["points"]):
            if point["policy"] != "none" or not lines:
                figures = {key: point[key] for key in (*KEYS, *_metric_keys(point)) if key in point}  # type: ignore[literal-required]
                lines.append({"line": label(result["config"]["mtr"], point["policy"]), **figures})
                where.append((folder, i))
    metrics = [metric.key for metric in task_metrics(result["task"]) if metric.compared]
    done: dict[tuple[int, int], Any] = {}

    def difference(pairs: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in done]
        with multiprocessing.Pool() as pool:
            done.update(zip(missing, pool.starmap(_pair, [(where[i], where[j]) for i, j in missing]), strict=True))
        paired = [{metric: dict(values) for metric, values in done[pair].items()} for pair in pairs]
        for metric in metrics:
            for row, p in zip(paired, holm([row[metric]["p"] for row in paired]), strict=True):
                row[metric]["p_holm"] = p
        return paired

    record = {key: result[key] for key in ("task", "backbone", "dataset", "weights", "environment")}  # type: ignore[literal-required]
    whole = difference([(0, i) for i in range(1, len(lines))])
    for line, paired in zip(lines[1:], whole, strict=True):
        line["against_unreduced"] = paired
    return {
        "kind": "lines",
        **record,
        "lines": lines,
        "standings": {metric: standings(lines, metric, difference) for metric in metrics},
    }


def _pair(first: tuple[Path, int], second: tuple[Path, int]) -> dict[str, Any]:
    paired: Any = compare(load_predictions(first[0]), first[1], load_predictions(second[0]), second[1])
    return paired


def read(folder: Path) -> list[dict[str, Any]]:
    """The models, classifiers first."""
    models = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(models, key=lambda model: "kl" not in model["standings"])


def tables(folder: Path, page: Path) -> None:
    """Write every table into the page, between the comments ``<!-- table: NAME -->`` and ``<!-- end of table -->``."""
    models = read(folder)
    text = page.read_text()
    for name, make in TABLES.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end of table -->"
        if start in text:
            before, _, rest = text.partition(start)
            text = before + start + make(models) + "\n" + end + rest.partition(end)[2]
    page.write_text(text)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def name_of(model: dict[str, Any]) -> str:
    return f"{model['backbone']}, {model['dataset']}"


def accuracy(model: dict[str, Any]) -> str:
    """The first metric of the task."""
    return next(metric for metric in ("top1", "miou", "map") if metric in model["standings"])


def models_table(models: Sequence[dict[str, Any]]) -> str:
    rows = []
    for model in models:
        whole, metric = model["lines"][0], accuracy(model)
        lo, hi = (100 * end for end in whole[f"{metric}_ci"])
        figure = f"{100 * whole[metric]:.1f} ({lo:.1f} – {hi:.1f})"
        device = model["environment"].get("device", "")
        commit = (model["environment"]["commit"] or "")[:7]
        images = f"{whole['images']:,}".replace(",", " ")
        rows.append([f"`{model['backbone']}`", model["dataset"], images, NAMES[metric], figure])
        rows[-1] += [f"{whole['flops_true'] / 1e9:.2f}", device, commit]
    return markdown(["model", "images of", "images", "metric", "unreduced", "GFLOPs", "device", "commit"], rows)


NAMES = {"kl": "KL", "top1": "top-1", "miou": "mIoU", "map": "AP", "ap50": "AP50"}


def standings_table(models: Sequence[dict[str, Any]]) -> str:
    """In how many cells each policy is the best, level with the best, worse."""
    count: dict[str, dict[str, list[int]]] = {}
    for model in models:
        for metric, cells in model["standings"].items():
            for standing in cells.values():
                count.setdefault(standing["best"], {}).setdefault(metric, [0, 0, 0])[0] += 1
                for line, paired in standing["others"].items():
                    which = 1 if paired["p_holm"] >= 0.05 else 2
                    count.setdefault(line, {}).setdefault(metric, [0, 0, 0])[which] += 1
    metrics = [metric for metric in NAMES if any(metric in of for of in count.values())]
    order = sorted(count, key=lambda line: [-sum(of[k] for of in count[line].values()) for k in (0, 1)])
    rows = [
        [
            f"`{line}`",
            *(" / ".join(map(str, count[line][metric])) if metric in count[line] else "" for metric in metrics),
        ]
        for line in order
    ]
    return markdown(["policy or model", *(NAMES[metric] for metric in metrics)], rows)


def leaders_table(models: Sequence[dict[str, Any]]) -> str:
    """The best line of every cell, and the lines level with it."""
    rows = []
    for model in models:
        for metric, cells in model["standings"].items():
            row = [name_of(model), NAMES[metric]]
            for ratio in map(str, RATIOS):
                standing = cells.get(ratio, {"best": "", "others": {}})
                level = sum(paired["p_holm"] >= 0.05 for paired in standing["others"].values())
                row.append(f"`{standing['best']}`" + (f" (+ {level})" if level else ""))
            rows.append(row)
    return markdown(["model", "metric", *(f"{100 * ratio:.0f} %" for ratio in RATIOS)], rows)


def claims_table(models: Sequence[dict[str, Any]]) -> str:
    """For each ratio + if the claim holds in KL, - if the contrary does, = if neither is certain."""
    classifiers = [model for model in models if model.get("claims")]
    rows = []
    for claim in CLAIMS:
        cells = []
        for model in classifiers:
            paired = [model["claims"].get(claim, {}).get(str(ratio), {}).get("kl") for ratio in RATIOS]
            cells.append("&nbsp;".join("" if one is None else sign(one) for one in paired))
        rows.append([claim, *cells])
    return markdown(["claim", *(name_of(model) for model in classifiers)], rows)


def sign(paired: dict[str, Any]) -> str:
    if paired["p_holm"] >= 0.05:
        return "="
    return "+" if paired["difference"] < 0 else "−"


def pictures_table(models: Sequence[dict[str, Any]]) -> str:
    """Policies at the FLOPs of a smaller picture: top-1 in percent / KL; * differs from the picture's."""
    rows = []
    for model in models:
        lines = model["lines"]
        for ratio in sorted({row["ratio"] for row in model.get("pictures", [])}):
            picture = lines[at(lines, "resolution", ratio)]  # type: ignore[index]
            row = [name_of(model), f"{100 * picture['reduction']:.1f} %", f"{picture['resolution'][0]} px"]
            row.append(f"{100 * picture['top1']:.1f} / {picture['kl']:.3f}")
            for name in ("fovea" + MEASURED, "fovea", "write", "mtr", "random"):
                i = at(lines, name, ratio)
                paired = next((one for one in model["pictures"] if (one["line"], one["ratio"]) == (name, ratio)), None)
                row.append("" if i is None or paired is None else pair(lines[i], paired))
            rows.append(row)
    heads = [
        "model",
        "removed",
        "side",
        "smaller picture",
        "`fovea`, `auto`",
        "`fovea`",
        "`write`",
        "`mtr`",
        "`random`",
    ]
    return markdown(heads, rows)


def pair(line: dict[str, Any], paired: dict[str, Any]) -> str:
    return " / ".join(
        f"{scale * line[metric]:.{digits}f}{'*' if paired[metric]['p_holm'] < 0.05 else ''}"
        for metric, scale, digits in (("top1", 100, 1), ("kl", 1, 3))
    )


def choices_table(models: Sequence[dict[str, Any]]) -> str:
    """Reduce, resize, or take the smaller model: the metric in percent, and KL."""
    rows = []
    for model in models:
        metric, lines = accuracy(model), model["lines"]
        for ratio in RATIOS:
            names = ["fovea" + MEASURED, "fovea", "write", "mtr", "resolution"]
            paired = [at(lines, name, ratio) for name in names]
            paired.insert(
                -1, next((i for name in ("random, mean", "random") if (i := at(lines, name, ratio)) is not None), None)
            )
            small = next((i for i in cell(lines, ratio) if lines[i].get("ratio") is None), None)
            row = [name_of(model), f"{100 * ratio:.0f} %", f"{100 * lines[0][metric]:.1f}"]
            for i in (*paired, small):
                row.append("" if i is None else figures(lines[i], metric))
            rows.append(row)
    heads = [
        "model",
        "removed",
        "unreduced",
        "`fovea`, `auto`",
        "`fovea`",
        "`write`",
        "`mtr`",
        "random",
        "smaller picture",
        "smaller model",
    ]
    return markdown(heads, rows)


def figures(line: dict[str, Any], metric: str) -> str:
    second = f" / {line['kl']:.3f}" if "kl" in line else f" / {100 * line['ap50']:.1f}" if "ap50" in line else ""
    return f"{100 * line[metric]:.1f}{second}"


TABLES = {
    "models": models_table,
    "standings": standings_table,
    "leaders": leaders_table,
    "claims": claims_table,
    "pictures": pictures_table,
    "choices": choices_table,
}


def main(command: str, *paths: str) -> None:
    source, out = map(Path, paths)
    if command == "collect":
        collect(source, out)
    elif command == "compare":
        table = compare_dense(source) if source.is_dir() else compare_classifier(source)
        out.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    elif command == "tables":
        tables(source, out)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
