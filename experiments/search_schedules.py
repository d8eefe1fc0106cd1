"""Every policy with its own best schedule: ``python experiments/search_schedules.py DIR OUT [POLICY…]``.

DIR holds Imagenette. Each policy gets the same budget at each ratio: the schedules of ``CANDIDATES`` and the measured
one (``auto``, on training images). They are ranked by KL to the unreduced model on the 94 training images the bundled
model was not trained on: all of them on centre crops, then the best ``FINALISTS`` on four crops and flips. The least KL
wins, and only the winner sees the validation images. OUT/POLICY receives ``search.json`` and ``predictions.npz``; where
they are there already, they are kept. OUT/schedules.json compares all that are there in pairs.

What the schedule alone gains for ``write`` is compared in pairs too, if OUT/common holds its run with the schedule of
compare_policies.py: ``mtr-lab eval reduction=write mtr.ratio=[0.3,0.4] dataset=imagenette dataset.root=DIR
dataset.batch_size=100 timing.batch_size=0 hydra.run.dir=OUT/common``.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from mtr_lab import create_model
from mtr_lab.data import ImageDataModule
from mtr_lab.errors import UserError
from mtr_lab.evaluation.job import CALIBRATION_IMAGES
from mtr_lab.reduction import Reduction, Schedule, policy_config
from mtr_lab.results.classifications import Classifications, top_classes
from mtr_lab.results.comparison import compare
from mtr_lab.results.environment import describe_environment
from mtr_lab.results.metrics import score
from mtr_lab.results.metrics.kl import kl_divergence
from mtr_lab.results.predictions import point_name
from mtr_lab.results.predictions_file import load_predictions, save_predictions

POLICIES = ("write", "random", "hsa", "rmeeto", "utr", "mtr", "pumer", "tome", "famba", "evit")
RATIOS = (0.3, 0.4)
CANDIDATES = list(itertools.product((0, 1), (2, 4), ("constant", "linear", "front")))
"""First block, interval, shape; (1, 2, "constant") is what all policies share in compare_policies.py."""
FINALISTS = 2
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(root: str, out: Path, policies: list[str]) -> None:
    model = create_model("vim_nano", pretrained=True).eval().to(DEVICE)
    data_config = resolve_model_data_config(model)
    given = {"name": "imagenette", "root": root, "holdout": 0.01, "batch_size": 100}
    data = ImageDataModule(data_config=data_config, model_classes=model.pretrained_cfg["label_names"], **given)
    whole = ImageDataModule(data_config={**data_config, "input_size": (3, 128, 128), "crop_pct": 1.0}, **given)
    (held_out,) = whole.val_dataloader()
    for policy in policies or POLICIES:
        folder = out / policy
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "search.json").exists():
            calibration = data.calibration_images(CALIBRATION_IMAGES).to(DEVICE)
            found = search(model, policy, calibration, four_views(whole.normalise(held_out["image"].to(DEVICE))))
            record = {"environment": describe_environment(), "policy": policy, "ratios": found}
            (folder / "search.json").write_text(json.dumps(record, indent=1) + "\n")
        if not (folder / "predictions.npz").exists():
            found = json.loads((folder / "search.json").read_text())["ratios"]
            others = [path for path in sorted(out.glob("*/predictions.npz")) if path.parent.name in POLICIES]
            unreduced = load_predictions(others[0]).log_probs[:1] if others else None
            save_predictions(validate(model, policy, found, data, unreduced), folder)
    write_comparison(out)


def four_views(images: Tensor) -> list[Tensor]:
    """Crops (B, 3, 112, 112) of images (B, 3, 128, 128): centre, centre mirrored, two corners, one of them mirrored."""
    centre = images[:, :, 8:-8, 8:-8]
    return [centre, centre.flip(-1), images[:, :, :112, :112], images[:, :, 16:, 16:].flip(-1)]


def search(model: nn.Module, policy: str, calibration: Tensor, views: list[Tensor]) -> list[dict[str, Any]]:
    """At each ratio the KL of every schedule on the held-out images, and the winner."""
    automatic = Reduction(model, policy_config(policy, schedule="auto"), images=calibration)
    schedules = {ratio: {"auto": automatic.solve(ratio)} for ratio in RATIOS}
    for first, interval, shape in CANDIDATES:
        reduction = Reduction(model, policy_config(policy, first_block=first, interval=interval, schedule=shape))
        for ratio in RATIOS:
            try:
                schedules[ratio][f"{shape} {first}/{interval}"] = reduction.solve(ratio)
            except UserError:
                continue  # these blocks cannot remove enough tokens
    unreduced = [log_probs(model, reduction, reduction.solve(0.0), view) for view in views]

    def kl(schedule: Schedule, which: slice) -> list[float]:
        """Nats an image, view by view."""
        pairs = zip(unreduced[which], views[which], strict=True)
        return [kl_divergence(full, log_probs(model, reduction, schedule, view)).mean() for full, view in pairs]

    found = []
    for ratio, named in schedules.items():
        centre = {name: kl(schedule, slice(1)) for name, schedule in named.items()}
        finalists = sorted(centre, key=lambda name: centre[name])[:FINALISTS]
        finals = {name: float(np.mean(centre[name] + kl(named[name], slice(1, None)))) for name in finalists}
        best = min(finals, key=lambda name: finals[name])
        found.append(
            {
                "ratio": ratio,
                "schedule": best,
                "remove": named[best].remove,
                "reduction": named[best].reduction,
                "kl_four_views": finals,
                "kl_centre": {name: float(value) for name, (value,) in centre.items()},
                "auto": named["auto"].remove,
            }
        )
        print(policy, ratio, best, finals, flush=True)
    return found


def validate(
    model: nn.Module, policy: str, found: list[dict[str, Any]], data: ImageDataModule, unreduced: np.ndarray | None
) -> Classifications:
    """The unreduced model and the winners on the validation images; ``unreduced`` (1, n, K) if it is known already."""
    reduction = Reduction(model, policy_config(policy, schedule=found[0]["remove"]))
    schedules = [reduction.solve(0.0)] if unreduced is None else []
    for entry in found:
        reduction.config["schedule"] = entry["remove"]
        schedules.append(reduction.solve(None))
    batches = list(data.test_dataloader())
    values = np.concatenate(
        [
            np.stack([log_probs(model, reduction, s, data.normalise(batch["image"].to(DEVICE))) for s in schedules])
            for batch in batches
        ],
        axis=1,
    )
    if unreduced is not None:
        values = np.concatenate([unreduced, values])
    return Classifications(
        ids=np.array([id for batch in batches for id in batch["id"]]),
        hashes=np.array([hash for batch in batches for hash in batch["hash"]]),
        labels=torch.cat([batch["label"] for batch in batches]).numpy(),
        points=np.array([point_name("none", 0.0), *(point_name(policy, entry["ratio"]) for entry in found)]),
        top5=top_classes(torch.from_numpy(values)).numpy(),
        log_probs=values,
    )


@torch.no_grad()
def log_probs(model: nn.Module, reduction: Reduction, schedule: Schedule, images: Tensor) -> np.ndarray:
    """(B, K)."""
    reduction.use(schedule)
    return model(images).log_softmax(-1).cpu().numpy()


def write_comparison(out: Path) -> None:
    """OUT/schedules.json, and its table in Markdown."""
    found = [policy for policy in POLICIES if (out / policy / "predictions.npz").exists()]
    records = {policy: json.loads((out / policy / "search.json").read_text()) for policy in found}
    runs = {policy: load_predictions(out / policy) for policy in found}
    points = []
    for policy, record in records.items():
        for i, entry in enumerate(record["ratios"], start=1):
            point = {"policy": policy, **entry, **score(runs[policy], i)}
            if policy != "write":
                point["difference_to_write"] = compare(runs["write"], i, runs[policy], i)
            elif (out / "common").exists():
                point["difference_to_common_schedule"] = compare(load_predictions(out / "common"), i, runs[policy], i)
            points.append(point)
    points.sort(key=lambda point: (point["ratio"], point["kl"]))
    commits = sorted({record["environment"]["commit"] for record in records.values()})
    result = {"commits": commits, "environment": records["write"]["environment"], "points": points}
    (out / "schedules.json").write_text(json.dumps(result, indent=1) + "\n")

    print("| removed | policy | its best schedule | top-1 | agreement | KL | KL against `write` |")
    print("|---|---|---|---|---|---|---|")
    for point in points:
        cells = [f"{100 * point['reduction']:.1f} %", f"`{point['policy']}`", point["schedule"]]
        cells += [f"{100 * point[key]:.1f}" for key in ("top1", "agreement")]
        cells += [f"{point['kl']:.3f} ({point['kl_ci'][0]:.3f} – {point['kl_ci'][1]:.3f})"]
        kl = point.get("difference_to_write", {}).get("kl")
        cells.append(f"{kl['difference']:+.3f} ({kl['ci'][0]:+.3f} – {kl['ci'][1]:+.3f})" if kl else "")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
