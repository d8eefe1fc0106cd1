"""Draw the pictures of the manual's gallery with the project's own commands: ``make gallery``."""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "docs" / "pages" / "assets"
MAIN = "from mtr_lab.cli.commands import main; main()"
FAST = ("dataset.num_workers=0", "timing.batch_size=0", "trainer.enable_progress_bar=false")
DENSE = ("pictures=1", "trainer.limit_test_batches=1", "dataset.batch_size=2", "mtr.ratio=0.4", "reduction=mtr")


def command(*arguments: object) -> None:
    """Run ``mtr-lab``."""
    subprocess.run([sys.executable, "-c", MAIN, *map(str, arguments)], check=True, cwd=ROOT)


def store(picture: Path, name: str, width: int = 1000) -> None:
    """A WebP of a picture, scaled down to ``width`` pixels if it is wider."""
    image = Image.open(picture).convert("RGB")
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)))
    image.save(ASSETS / f"gallery_{name}.webp", quality=82, method=6)


def draw(folder: Path) -> None:
    """All pictures, from bundled models and images."""
    dog = ROOT / "mtr_lab/assets/imagenette_sample/n02102040/n02102040_3141.JPEG"
    command("visualize", dog, "-o", folder / "tokens", "--policies", "fovea", "mtr", "random", "mtr.ratio=0.4")
    (sheet,) = (folder / "tokens").glob("*_mtr.png")
    (strip,) = (folder / "tokens").glob("*_policies.png")
    store(sheet, "blocks")
    store(strip, "policies")
    for task in ("detection", "segmentation"):
        command("eval", f"task={task}", *DENSE, *FAST, f"hydra.run.dir={folder / task}")
        store(max((folder / task).rglob("*.png")), task, width=2000)  # eight panels with small labels
    sweep = ("reduction=fovea,mtr,random,resolution", "mtr.ratio=[0.2,0.4]", "trainer.limit_test_batches=1")
    command("eval", "-m", *sweep, "dataset.batch_size=100", *FAST, f"hydra.sweep.dir={folder / 'sweep'}")
    command("report", folder / "sweep", "-o", folder / "chart.png", "--chart", "kl")
    store(folder / "chart.png", "chart")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder))
