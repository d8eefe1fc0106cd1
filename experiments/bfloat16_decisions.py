# ruff: noqa
"""Where bfloat16 decisions come from. bf.py IMAGES: agreement of classes with float32's plan and arithmetic."""

import copy, json, os, sys, time
import torch, mtr_lab
from pathlib import Path
from timm.data import create_transform, resolve_model_data_config
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from mtr_lab.reduction import Policy

OUT = Path(os.environ["OUT_NAME"])
torch.backends.cuda.matmul.allow_tf32 = False
model = mtr_lab.create_model("vim_nano", pretrained=True).eval()
tf = create_transform(**resolve_model_data_config(model))
batches = [x.cuda() for x, _ in DataLoader(ImageFolder(sys.argv[1], tf), batch_size=250, num_workers=6)]
model.cuda()
original = Policy.__call__
plans, mode = [], None


def decide(policy, *inputs):
    if mode == "replay":
        return plans.pop(0)
    plan = original(policy, *inputs)
    if mode == "record":
        plans.append(plan)
    return plan


Policy.__call__ = decide


@torch.inference_mode()
def run(m, dtype, m_mode=None, given=()):
    global plans, mode
    plans, mode = list(given), m_mode
    out = torch.cat([m(x.to(dtype)).float() for x in batches])
    recorded, mode = plans, None
    return out, recorded


def agree(a, b):
    return round((a.argmax(1) == b.argmax(1)).float().mean().item(), 4)


def differ(p, q):  # share of removed tokens that differ, share of merged ones of another target
    src = [
        1 - torch.stack([torch.isin(a, b).float().mean() for a, b in zip(x.removed, y.removed)]).mean().item()
        for x, y in zip(p, q)
    ]
    return [round(s, 4) for s in src]


versions = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "weights rounded to bfloat16, float32 arithmetic": (torch.bfloat16, torch.float32),
    "weights rounded to float16, float32 arithmetic": (torch.float16, torch.float32),
}
for pol, r in [(None, 0), ("mtr", 0.2), ("mtr", 0.3), ("mtr", 0.4), ("fovea", 0.3), ("fovea", 0.4), ("write", 0.4)]:
    if pol:
        mtr_lab.patch(model, pol, ratio=r)
    full, exact = run(model, torch.float32, "record")
    row = {"policy": pol, "ratio": r}
    for name, (weights, data) in versions.items():
        m = copy.deepcopy(model).to(weights).to(data)
        out, own = run(m, data, "record")
        row[name] = agree(out, full)
        if pol:
            row[name + ", plans of float32"] = agree(run(m, data, "replay", exact)[0], full)
            row[name + ": its plans in float32"] = agree(run(model, torch.float32, "replay", own)[0], full)
            row[name + ": removed tokens that differ, by block"] = differ(own, exact)
    print(json.dumps(row), flush=True)
    with open(OUT / "bf.jsonl", "a") as f:
        f.write(json.dumps(row) + "\n")
    if pol:
        mtr_lab.unpatch(model)
