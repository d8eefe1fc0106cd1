"""Damage files of every kind and give them to the code that reads them.

A reader answers with a value or a ``UserError``: no other exception, no hang, and where a checksum is known no other
value. ``python tests/fuzz.py 50000`` prints a table of many damaged files; ``test_fuzz`` takes fewer.
"""

import collections
import contextlib
import copy
import io
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from example_runs import write_run
from PIL import Image
from safetensors.torch import save_file

from mtr_lab import create_model
from mtr_lab.backbones.weights import Checkpoint, load_weights
from mtr_lab.cli.program import compose
from mtr_lab.data.images import decode
from mtr_lab.data.segmentation.label_maps import LabelMapSource
from mtr_lab.errors import UserError, user_errors
from mtr_lab.report.dashboard.page import to_json
from mtr_lab.report.dashboard.reader import Reader
from mtr_lab.results.predictions_file import load_predictions

LIMIT = 20.0
"""CPU seconds that a reader may take for one file."""
ODD: tuple[Any, ...] = (None, [], {}, "", "\ud800", -1, 0, 1e308, 10**400, float("nan"), True, [[]], [None], {"a": []})
TINY = {"img_size": 32, "patch_size": 8, "stride": 8, "depth": 1, "embed_dim": 8, "d_state": 2, "num_classes": 3}


def damage(content: bytes, rng: random.Random) -> bytes:
    """One to four changes: bits, bytes, cuts, repetitions, insertions."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not data:
            break
        at, length = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 64, 1024))
        kind = rng.randrange(7)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + length] = rng.randbytes(len(data[at : at + length]))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length]
        elif kind == 5:
            data[at:at] = rng.choice((b"\0", b"\xff", b"[", b"{", b'"', b"9" * 30)) * length
        else:
            data[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f"))
    return bytes(data)


def damage_json(content: bytes, rng: random.Random) -> bytes:
    """Bytes are changed, or values: removed, replaced by odd ones, nested deeply."""
    if rng.random() < 0.3:
        return damage(content, rng)
    value: Any = json.loads(content)
    for _ in range(rng.choice((1, 2))):
        node: Any = value
        while True:
            if not isinstance(node, dict | list) or not node:
                break
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.2:
                if rng.random() < 0.2:
                    del node[key]
                else:
                    node[key] = copy.deepcopy(rng.choice(ODD))
                break
            node = node[key]
    text = json.dumps(value)
    if rng.random() < 0.02:
        text = text.replace("null", "[" * 100_000 + "]" * 100_000, 1)
    return text.encode()


class Target:
    """Files of one kind.

    Args:
        make: folder -> an intact file in it.
        read: file -> what its reader returns.
        damage: content, random numbers -> damaged content.
        known: its content has checksums: what is read is what was written.
    """

    def __init__(
        self,
        make: Callable[[Path], Path],
        read: Callable[[Path], Any],
        damage: Callable[[bytes, random.Random], bytes] = damage,
        known: bool = False,
    ) -> None:
        self.make, self.read, self.damage, self.known = make, read, damage, known


def make_result(folder: Path) -> Path:
    write_run(folder / "good", "mtr", images=20)
    write_run(folder / "run", "write", images=20)
    for file in folder.glob("*/predictions.npz"):  # paired differences take long, and have their own file
        file.unlink()
    return folder / "run" / "result.json"


def read_report(file: Path) -> str:
    """The report of a good run and a damaged one, which must show at least the good one."""
    data = Reader([file.parent.parent]).data()
    text = to_json(data)
    text.encode()
    assert any(run["name"].endswith("good") for run in data["runs"]), "the good run is missing"
    if data["notes"]:
        raise UserError(data["notes"][0])
    return text


def make_predictions(folder: Path) -> Path:
    write_run(folder, "mtr", images=20)
    return folder / "predictions.npz"


def read_predictions(file: Path) -> list[Any]:
    return [getattr(load_predictions(file), name).tolist() for name in ("ids", "labels", "top5", "log_probs")]


def picture(name: str, **options: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, **options)
        return folder / name

    return make


def read_image(file: Path) -> Any:
    try:
        return decode(file.read_bytes())[1]
    except MemoryError:
        raise
    except Exception as error:  # which the data modules turn into an entry that says so
        raise UserError(str(error)) from error


def make_map(folder: Path) -> Path:
    for place in ("images", "labels"):
        (folder / "val" / place).mkdir(parents=True)
    Image.new("RGB", (32, 24)).save(folder / "val" / "images" / "a.jpg")
    Image.fromarray(np.random.default_rng(0).integers(0, 3, (24, 32), dtype=np.uint8)).save(
        folder / "val" / "labels" / "a.png"
    )
    return folder / "val" / "labels" / "a.png"


def read_map(file: Path) -> Any:
    return LabelMapSource(file.parents[2], "val", "camvid", [f"class {i}" for i in range(11)]).labels(0).tolist()


def make_checkpoint(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.manual_seed(0)
        state = create_model("vim_ti", **TINY).state_dict()
        (torch.save if name.endswith(".pth") else save_file)(state, folder / name)
        return folder / name

    return make


_MODEL: list[Any] = []


def read_checkpoint(file: Path) -> Any:
    if not _MODEL:
        _MODEL.append(create_model("vim_ti", **TINY))
    (model,) = _MODEL
    load_weights(model, Checkpoint(str(file)))
    values = [value for value in model.state_dict().values() if value.is_floating_point()]
    assert all(bool(value.isfinite().all()) for value in values), "weights that are not finite"
    return [value.flatten().tolist() for value in values]


TARGETS = {
    "result.json": Target(make_result, read_report, damage_json),
    "predictions.npz": Target(make_predictions, read_predictions, known=True),
    "JPEG": Target(picture("a.jpg"), read_image),
    "PNG": Target(picture("a.png"), read_image),
    "TIFF": Target(picture("a.tif", compression="tiff_lzw"), read_image),
    "label map": Target(make_map, read_map),
    "safetensors": Target(make_checkpoint("w.safetensors"), read_checkpoint),
    "PyTorch": Target(make_checkpoint("w.pth"), read_checkpoint, known=True),
}


def fuzz(name: str, count: int, folder: Path, seed: int = 0) -> collections.Counter[str]:
    """Damage a file ``count`` times; how often it was refused, read, and read as before.

    Raises:
        AssertionError: something else happened; the damaged file is kept beside the folder.
    """
    target, rng = TARGETS[name], random.Random(f"{name} {seed}")
    file = target.make(folder)
    content, outcomes = file.read_bytes(), collections.Counter[str]()
    intact = target.read(file)
    for number in range(count):
        file.write_bytes(target.damage(content, rng))
        start = time.process_time()
        try:
            value = target.read(file)
            outcome = "as before" if value == intact else "read"
        except UserError:
            outcome = "refused"
        except BaseException:
            outcome = traceback.format_exc()
        seconds = time.process_time() - start
        if outcome == "read" and target.known:
            outcome = "another value despite its checksum"
        if outcome not in ("refused", "read", "as before") or seconds > LIMIT:
            kept = shutil.copy(file, folder.parent / f"{name.replace(' ', '-')}-{seed}-{number}")
            raise AssertionError(f"{name} {number}, kept as {kept}, {seconds:.1f} s: {outcome}")
        outcomes[outcome] += 1
    return outcomes


WORDS = ("null", "[nan]", "nan", "inf", "-1", "0", "1e400", "9" * 30, "[]", "{}", "'", '"', "${x}", "???", "a b", "1,2")
WORDS += (
    "\\",
    "[[[[",
    "é\ud800",
    "\0",
    "true",
    "str(1)",
    "range(1,3)",
    "choice(1,2)",
    "${oc.env:A}",
    "${oc.decode:'['}",
)
KEYS = (
    "mtr",
    "mtr.ratio",
    "mtr.schedule",
    "mtr.speedup",
    "mtr.max_drop",
    "task",
    "dataset",
    "dataset.root",
    "reduction",
)
KEYS += ("backbone", "backbone.embed_dim", "backbone.checkpoint", "backbone.img_size", "dataset.batch_size", "pictures")
KEYS += ("trainer.devices", "trainer.precision", "timing.seconds", "experiment", "logger", "dataset._target_", "seed")


def override(rng: random.Random) -> str:
    """A line that somebody may have mistyped, badly."""
    value = "".join(rng.choices(WORDS, k=rng.choice((1, 1, 2))))
    text = f"{rng.choice(('', '', '', '+', '++', '~'))}{rng.choice(KEYS)}={value}"
    if rng.random() < 0.3:
        text = damage(text.encode(errors="surrogatepass"), rng).decode(errors="surrogateescape")[:200]
    return text


def fuzz_overrides(count: int, seed: int = 0) -> collections.Counter[str]:
    """Compose configurations with odd overrides; how many were refused, and composed."""
    rng, outcomes = random.Random(seed), collections.Counter[str]()
    for _ in range(count):
        line, program = override(rng), rng.choice(("config", "train", "bench"))
        try:
            compose(program, [line])
            outcomes["composed"] += 1
        except user_errors():
            outcomes["refused"] += 1
        except BaseException:
            raise AssertionError(f"{program} {line!r}: {traceback.format_exc()}") from None
    return outcomes


def main() -> None:
    """Print a table: as many damaged files of each kind as the argument says, and a 25th of that many overrides."""
    warnings.simplefilter("ignore")
    count = int(sys.argv[1])
    for name in sys.argv[2:] or [*TARGETS, "overrides"]:
        start, folder = time.process_time(), Path(tempfile.mkdtemp())
        (folder / "a").mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            outcomes = fuzz_overrides(count // 25) if name == "overrides" else fuzz(name, count, folder / "a")
        shutil.rmtree(folder)  # it is left where a damaged file is to be kept
        cells = "  ".join(f"{outcome} {number}" for outcome, number in sorted(outcomes.items()))
        print(f"{name:<16} {sum(outcomes.values()):>6}  {time.process_time() - start:5.0f} s  {cells}", flush=True)


if __name__ == "__main__":
    main()
