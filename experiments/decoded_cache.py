"""What the cache of decoded images saves: 20 000 JPEGs in a folder, without it, with it for the first time, and again.

    python experiments/decoded_cache.py FOLDER

Writes the images (1.5 GB) and the cache (3 GB) below FOLDER, and results/decoded_cache.json. The model is small on
purpose, so that, as with a large one on a GPU, decoding is what one waits for. Each run is timed whole, building the
cache and starting the workers contained; files are in the system's page cache.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config

from mtr_lab import create_model
from mtr_lab.data import ImageDataModule
from mtr_lab.results.atomic import replace_file
from mtr_lab.results.environment import describe_environment

IMAGES, DISTINCT, CLASSES = 20_000, 100, 10
SIZE = (500, 375)  # as most of ImageNet
WORKERS, BATCH = 2, 100


def write_images(root: Path) -> int:
    """JPEGs of smooth noise in class folders; their mean size in bytes."""
    random = np.random.default_rng(0)
    contents = []
    for i in range(DISTINCT):
        coarse = Image.fromarray(random.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize(
            SIZE, Image.Resampling.BICUBIC
        )
        fine = random.normal(0, 12, (SIZE[1], SIZE[0], 3))
        path = root / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8)).save(path, quality=90)
        contents.append(path.read_bytes())
        path.unlink()
    for i in range(IMAGES):
        path = root / f"{i % CLASSES:02}" / f"{i:05}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(contents[i % DISTINCT])
    return sum(map(len, contents)) // DISTINCT


@torch.inference_mode()
def run(root: Path, cache: Path | None) -> dict[str, float]:
    model = create_model("vim_ti", depth=2, embed_dim=48, patch_size=32, stride=32, num_classes=CLASSES).eval()
    start = time.perf_counter()
    data = ImageDataModule(
        name="synthetic",
        data_config=resolve_model_data_config(model),
        root=str(root),
        cache=None if cache is None else str(cache),
        batch_size=BATCH,
        num_workers=WORKERS,
    )
    batches, images, computing = iter(data.test_dataloader()), 0, 0.0
    for batch in batches:
        began = time.perf_counter()
        model(data.normalise(batch["image"]))
        computing += time.perf_counter() - began
        images += len(batch["image"])
    seconds = time.perf_counter() - start
    assert images == IMAGES
    return {
        "seconds": round(seconds, 1),
        "img_per_s": round(images / seconds, 1),
        "waiting": round(1 - computing / seconds, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    mean_bytes = write_images(folder / "images")
    runs = {
        "without": run(folder / "images", None),
        "first": run(folder / "images", folder / "cache"),
        "second": run(folder / "images", folder / "cache"),
    }
    for name, found in runs.items():
        waiting = f"waiting {100 * found['waiting']:.0f} % of {found['seconds']:.0f} s"
        print(f"{name:8} {found['img_per_s']:8.0f} img/s, {waiting}")
    machine = describe_environment()
    record = {
        "environment": {key: machine[key] for key in ("cpu", "threads", "python", "torch", "commit")},
        "note": "two cores that other processes were using at the same time: noisy",
        "images": IMAGES,
        "jpeg_bytes": mean_bytes,
        "jpeg_size": SIZE,
        "workers": WORKERS,
        "batch": BATCH,
        "runs": runs,
    }
    with replace_file(Path(__file__).parent / "results" / "decoded_cache.json") as stream:
        stream.write(f"{json.dumps(record, indent=1)}\n".encode())


if __name__ == "__main__":
    main()
