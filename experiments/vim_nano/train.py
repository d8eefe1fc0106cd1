"""Train vim_nano on one GPU in minutes: ``python train.py DIR OUT``.

The settings are those of ``python -m mtr_lab.train experiment=vim_nano``. What differs is how they are carried out: the
images stay in GPU memory and are augmented there, scan and convolutions run in the kernels of ``fused.py``, and a
whole step, from the choice of the images to the weight average, is recorded once as a CUDA graph and replayed.
"""

import argparse
import copy
import csv
import hashlib
import io
import json
import math
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fused
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.optim import param_groups_weight_decay
from torch import Tensor

from mtr_lab import create_model, ops
from mtr_lab.backbones.token_state import TokenState
from mtr_lab.report.environment import environment

SIZE = 128  # pixels of the stored images; the model sees 112
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SETTINGS = {
    "batch_size": 128, "lr": 1.5e-3, "weight_decay": 0.05, "warmup_epochs": 5, "label_smoothing": 0.1, "mixup": 0.2,
    "cutmix": 1.0, "ema_decay": 0.999, "drop_path_rate": 0.05, "gradient_clip_val": 1.0, "scale": [0.25, 1.0],
    "color_jitter": 0.3, "precision": "bf16-mixed", "seed": 0,
}  # fmt: skip


def load(root: Path, holdout: float) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
    """The training images (M, SIZE, SIZE, 3) as bytes, their labels, which are held out, and the class names."""
    if root.suffix == ".zip":
        archive = zipfile.ZipFile(root)
        contents = {n.split("/", 1)[1]: archive.read(n) for n in sorted(archive.namelist()) if not n.endswith("/")}
    else:
        contents = {p.relative_to(root / "train").as_posix(): p.read_bytes() for p in sorted(root.glob("train/*/*"))}
    names = tuple(sorted({key.split("/")[0] for key in contents}))

    def decode(content: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB"))

    with ThreadPoolExecutor(16) as pool:
        images = np.stack(list(pool.map(decode, contents.values(), chunksize=64)))
    assert images.shape[1:] == (SIZE, SIZE, 3), images.shape
    # The rule of mtr_lab.data.ImageDataModule.
    digests = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in contents]
    held_out = torch.tensor([int.from_bytes(digest, "big") < holdout * 2**64 for digest in digests])
    labels = torch.tensor([names.index(key.split("/")[0]) for key in contents])
    return torch.from_numpy(images), labels, held_out, names


def augment(x: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """Bytes (B, SIZE, SIZE, 3) -> random resized crop, flip, colour jitter, normalised (B, 3, size, size)."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(x), device=x.device) * (high - low) + low

    low, high = SETTINGS["scale"]
    area, ratio = uniform(low, high), torch.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, top = uniform(0, 1) * (1 - width), uniform(0, 1) * (1 - height)
    flip = 1 - 2 * (uniform(0, 1) < 0.5).float()
    zero = torch.zeros_like(width)
    theta = torch.stack([width * flip, zero, 2 * left + width - 1, zero, height, 2 * top + height - 1], dim=1)
    grid = F.affine_grid(theta.view(-1, 2, 3), [len(x), 3, size, size], align_corners=False)
    x = F.grid_sample(
        x.permute(0, 3, 1, 2).float() / 255, grid, mode="bicubic", padding_mode="border", align_corners=False
    ).clamp(0, 1)

    def grey(x: Tensor) -> Tensor:
        return (0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None]

    jitter = SETTINGS["color_jitter"]
    brightness, contrast, saturation = (uniform(1 - jitter, 1 + jitter)[:, None, None, None] for _ in range(3))
    x = (x * brightness).clamp(0, 1)
    x = torch.lerp(grey(x).mean((1, 2, 3), keepdim=True).expand_as(x), x, contrast).clamp(0, 1)
    x = torch.lerp(grey(x).expand_as(x), x, saturation).clamp(0, 1)
    return (x - mean) / std


def draw_mixing(steps: int, size: int, rng: np.random.Generator) -> Tensor:
    """For each step, as timm's Mixup: share of the image's own label, whether cutmix, top, bottom, left, right."""
    rows = np.zeros((steps, 6), np.float32)
    for row in rows:
        if rng.random() < 0.5:
            share = rng.beta(SETTINGS["cutmix"], SETTINGS["cutmix"])
            half = int(size * math.sqrt(1 - share)) // 2
            y, x = rng.integers(size, size=2)
            top, bottom, left, right = np.clip([y - half, y + half, x - half, x + half], 0, size)
            row[:] = 1 - (bottom - top) * (right - left) / size**2, 1, top, bottom, left, right
        else:
            row[0] = rng.beta(SETTINGS["mixup"], SETTINGS["mixup"])
    return torch.from_numpy(rows)


def mix(x: Tensor, labels: Tensor, row: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mix a batch with its mirror image as ``row`` says; soft labels with smoothing."""
    share, cutmix, top, bottom, left, right = row.unbind()
    pixel = torch.arange(x.shape[-1], device=x.device)
    rows, columns = (pixel >= top) & (pixel < bottom), (pixel >= left) & (pixel < right)
    own = torch.where(cutmix > 0, 1 - (rows[:, None] & columns).float(), share)
    smooth = SETTINGS["label_smoothing"]
    target = (labels[:, None] == torch.arange(classes, device=x.device)) * (1 - smooth) + smooth / classes
    return x * own + x.flip(0) * (1 - own), target * share + target.flip(0) * (1 - share)


def learning_rates(steps: int, per_epoch: int) -> Tensor:
    """Linear warm-up, then half a cosine to zero."""
    step = torch.arange(steps)
    warmup = SETTINGS["warmup_epochs"] * per_epoch
    rising = 1e-3 + (1 - 1e-3) * step / max(warmup, 1)
    falling = (1 + torch.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2
    return SETTINGS["lr"] * torch.where(step < warmup, rising, falling)


def start(tokens: Tensor, special: list[int], *, traced: bool = False) -> TokenState:
    """``TokenState.start`` without a copy from the host, which a graph cannot record."""
    batch, length = tokens.shape[:2]
    index = torch.arange(length, device=tokens.device).expand(batch, length)
    size = torch.ones(1, 1, device=tokens.device).expand(batch, length)
    positions = torch.stack([torch.full((batch,), place, device=tokens.device) for place in special], dim=1)
    return TokenState(tokens, None, index, size, positions, index if traced else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="DIR/train/<class>/<image of 128 x 128 pixels>, or a zip of train/")
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--finish-by", type=float, default=math.inf, help="Unix time: fewer epochs if need be")
    parser.add_argument("--holdout", type=float, default=0.05)
    arguments = parser.parse_args()
    began = time.time()

    def say(*what: object) -> None:
        print(f"{time.time() - began:6.1f} s", *what, flush=True)

    torch.manual_seed(SETTINGS["seed"])
    rng = np.random.default_rng(SETTINGS["seed"])
    images, labels, held_out, names = load(arguments.root, arguments.holdout)
    say(len(images), "images", int(held_out.sum()), "held out")
    images, labels = images.to(DEVICE), labels.to(DEVICE)
    kept, kept_out = (torch.nonzero(flag)[:, 0] for flag in (~held_out, held_out))

    if CUDA:
        ops.selective_scan, ops.causal_conv1d = fused.selective_scan, fused.causal_conv1d
    TokenState.start = start
    model = create_model("vim_nano", num_classes=len(names), drop_path_rate=SETTINGS["drop_path_rate"]).to(DEVICE)
    size = model.pretrained_cfg["input_size"][1]
    mean, std = (torch.tensor(model.pretrained_cfg[k], device=DEVICE).view(3, 1, 1) for k in ("mean", "std"))
    average = copy.deepcopy(model).eval().requires_grad_(False)
    parameters, averages = list(model.parameters()), list(average.parameters())

    # What each step does, drawn in advance: the step itself reads its row and moves on.
    batch = SETTINGS["batch_size"]
    per_epoch = len(kept) // batch
    most = arguments.epochs * per_epoch
    used = per_epoch * batch
    order = torch.stack([kept[torch.randperm(len(kept))[:used]] for _ in range(arguments.epochs)])
    order = order.view(most, batch).to(DEVICE)
    mixing = draw_mixing(most, size, rng).to(DEVICE)
    rates = learning_rates(most, per_epoch).to(DEVICE)
    now = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    rate, total_loss = torch.zeros((), device=DEVICE), torch.zeros((), device=DEVICE)
    groups = param_groups_weight_decay(model, SETTINGS["weight_decay"], model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=rate, fused=CUDA, capturable=CUDA)

    def step() -> None:
        chosen = order.index_select(0, now)[0]
        x = augment(images.index_select(0, chosen), size, mean, std)
        x, target = mix(x, labels.index_select(0, chosen), mixing.index_select(0, now)[0], len(names))
        rate.copy_(rates.index_select(0, now)[0])
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, cache_enabled=False):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, SETTINGS["gradient_clip_val"], foreach=CUDA)
        optimizer.step()
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - SETTINGS["ema_decay"])
        total_loss.add_(loss.detach())
        now.add_(1)

    epochs, replay = arguments.epochs, step
    if CUDA:
        initial = [p.detach().clone() for p in parameters]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        say("warm")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay
        replay()
        torch.cuda.synchronize()
        tick = time.time()
        for _ in range(20):
            replay()
        torch.cuda.synchronize()
        seconds = (time.time() - tick) / 20
        left = arguments.finish_by - time.time()
        epochs = min(epochs, int(left / (seconds * per_epoch * 1.03 + 0.03))) if left < math.inf else epochs
        say(f"step {seconds * 1e3:.2f} ms, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, {epochs} epochs")
        # Everything back to where it was.
        with torch.no_grad():
            torch._foreach_copy_(parameters, initial)
            torch._foreach_copy_(averages, initial)
            for state in optimizer.state.values():
                torch._foreach_zero_(list(state.values()))
            now.zero_()
            total_loss.zero_()
            rates[: epochs * per_epoch].copy_(learning_rates(epochs * per_epoch, per_epoch))

    margin = (SIZE - size) // 2

    @torch.no_grad()
    def validate() -> tuple[float, float]:
        logits = []
        for chosen in kept_out.split(batch):
            x = images[chosen.to(DEVICE), margin : margin + size, margin : margin + size].permute(0, 3, 1, 2)
            with torch.autocast(DEVICE.type, torch.bfloat16):
                logits.append(average((x.float() / 255 - mean) / std).float())
        target = labels[kept_out.to(DEVICE)]
        every = torch.cat(logits)
        return float(F.cross_entropy(every, target)), float((every.argmax(1) == target).float().mean())

    def save() -> None:
        state = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in average.state_dict().items()}
        save_file(state, arguments.out / "model.safetensors", metadata={"label_names": json.dumps(names)})

    arguments.out.mkdir(parents=True, exist_ok=True)
    final: dict[str, float] = {}
    training = time.time()
    with (arguments.out / "metrics.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["epoch", "step", "train_loss", "val_loss", "val_top1"])
        for epoch in range(epochs):
            for _ in range(per_epoch):
                replay()
            final["train_loss"] = float(total_loss) / per_epoch
            total_loss.zero_()
            assert math.isfinite(final["train_loss"]), "the loss is not finite"
            row = [epoch, (epoch + 1) * per_epoch - 1, final["train_loss"], "", ""]
            if len(kept_out) and (epoch % 10 == 9 or epoch == epochs - 1):
                final["val_loss"], final["val_top1"] = validate()
                row[3:] = final["val_loss"], final["val_top1"]
                save()
                say(f"epoch {epoch}: train {row[2]:.3f}, held out {row[3]:.3f}, top-1 {row[4]:.4f}")
            table.writerow(row)
            file.flush()
    save()
    record = {
        "settings": {**SETTINGS, "epochs": epochs, "holdout": arguments.holdout},
        "environment": environment(),
        "parameters": sum(p.numel() for p in parameters),
        "epochs": epochs,
        "steps": epochs * per_epoch,
        "seconds": {"training": round(time.time() - training, 1), "all": round(time.time() - began, 1)},
        "final": final,
        "sha256": hashlib.sha256((arguments.out / "model.safetensors").read_bytes()).hexdigest(),
    }
    (arguments.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    say("done", record["final"])


if __name__ == "__main__":
    main()
