"""The smallest runs of the dense tasks, and a few bundled images to train and evaluate on."""

import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path

SAMPLES = Path(str(resources.files("mtr_lab") / "assets"))
BCCD, CAMVID = SAMPLES / "bccd_sample", SAMPLES / "camvid_sample"

_SMALL = [
    "backbone.depth=4",
    "backbone.embed_dim=16",
    "backbone.img_size=[64,96]",
    "backbone.pretrained=false",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
]
_ANCHORS = ["task.anchors=[[8],[16],[24],[32]]", "task.ratios=[1.0]"]
DETECTION = ["task=detection", "task.width=16", "task.hidden=32", *_ANCHORS, *_SMALL]
SEGMENTATION = ["task=segmentation", "task.width=16", *_SMALL]
"""Overrides that make a run of the task finish in seconds."""
QUICK = ["trainer.limit_test_batches=2", "timing.batch_size=0", "mtr.ratio=[0.2]"]
"""Overrides that make its evaluation short."""


def bccd(root: Path) -> list[str]:
    """Overrides for a dataset of eight bundled images to train on, and four others to evaluate on."""
    shutil.copytree(BCCD, root)
    ids = (BCCD / "ImageSets/Main/val.txt").read_text().split()
    for split, chosen in (("train", ids[:8]), ("val", ids[8:12])):
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(chosen))
    return ["dataset=bccd", f"dataset.root={root}", "dataset.num_workers=0"]


def camvid(root: Path) -> list[str]:
    """The same for segmentation."""
    names = sorted(path.stem for path in (CAMVID / "val/images").iterdir())
    for split, chosen in (("train", names[:8]), ("val", names[8:12])):
        for kind, suffix in (("images", "jpg"), ("labels", "png")):
            folder = root / split / kind
            folder.mkdir(parents=True)
            for name in chosen:
                shutil.copy(CAMVID / "val" / kind / f"{name}.{suffix}", folder)
    return ["dataset=camvid", f"dataset.root={root}", "dataset.num_workers=0"]


DATA: dict[str, Callable[[Path], list[str]]] = {"detection": bccd, "segmentation": camvid}
SMALL = {"detection": DETECTION, "segmentation": SEGMENTATION}
