"""latency.py OUT.json LABEL: µs of CUDA graphs, queued and idle, of few images; profile of one image."""
import json, sys, statistics, time
import torch
from collections import Counter
from mtr_lab import ops
from mtr_lab.backbones import compile
from mtr_lab.benchmark.cases import Case
from mtr_lab.measure.speed import idle_and_stream_ms
out, label, models, batches, limit = sys.argv[1], sys.argv[2], sys.argv[3].split(","), [int(b) for b in sys.argv[4].split(",")], float(sys.argv[5])
t0 = time.time(); rows = []
D = torch.device("cuda")
def queued(f, n=60):
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(); a.record()
    for _ in range(n): f()
    b.record(); torch.cuda.synchronize(); return a.elapsed_time(b) / n
for name in models:
    for B in batches:
        runs = {}
        for policy in ("none", "mtr", "fovea", "resolution"):
            if time.time() - t0 > limit: break
            try:
                torch.manual_seed(0)
                case = Case(name, B, None, "float16", "triton", policy, 0. if policy == "none" else .4, True)
                with D: model, red = case.model()
                model.to(torch.float16)
                size = model.pretrained_cfg["input_size"][-1]
                x = torch.randn(B, 3, size, size, device=D).half()
                with torch.inference_mode(), ops.use_backend("triton"):
                    for _ in range(3): y = model(x)
                    g = compile(model)
                    for _ in range(3): z = g(x)
                runs[policy] = (lambda g=g, x=x: g(x)), model, x, ((z.float() - y.float()).norm() / y.float().norm()).item()
            except Exception as e: print(name, B, policy, repr(e)[:300], flush=True)
        ms = {p: [] for p in runs}; idle = {p: [] for p in runs}
        with torch.inference_mode(), ops.use_backend("triton"):
            for _ in range(7):
                for p, r in runs.items(): ms[p].append(queued(r[0])); idle[p].append(statistics.median(idle_and_stream_ms(r[0], D)[0] for _ in range(9)))
            for p, (f, model, x, diff) in runs.items():
                row = {"label": label, "backbone": name, "images": B, "policy": p, "ms": statistics.median(ms[p]), "ms_min": min(ms[p]), "ms_max": max(ms[p]), "idle_ms": statistics.median(idle[p]), "graph_differs": diff}
                row["speedup"] = statistics.median(ms["none"]) / row["ms"]
                if B == 1:
                    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
                        for _ in range(5): f()
                        torch.cuda.synchronize()
                    c, t = Counter(), Counter()
                    for e in prof.events():
                        if e.device_type == torch.autograd.DeviceType.CUDA: c[e.name[:60]] += 1; t[e.name[:60]] += e.device_time
                    row["kernels"] = sum(c.values()) / 5; row["kernels_us"] = sum(t.values()) / 5
                    row["profile"] = [[k, c[k] / 5, v / 5] for k, v in t.most_common(30)]
                rows.append(row)
                print({k: (round(v, 4) if isinstance(v, float) else v) for k, v in row.items() if k != "profile"}, flush=True)
                for k in row.get("profile", [])[:22]: print("     ", k[0], k[1], round(k[2], 1), flush=True)
        json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, open(out, "w"))
