"""ONNX Runtime against our CPU backend and the matrix products: vim_nano, mtr; CPU (1 thread) or wall ms; argument THREADS."""
import json, os, sys, tempfile, time
from pathlib import Path
import onnxruntime, torch, mtr_lab
sys.path.insert(0, "experiments")
from families_cpu import Products
from mtr_lab import ops
threads = int(sys.argv[1]); torch.set_num_threads(threads)
clock = time.process_time if threads == 1 else time.perf_counter
out = {}
try: base = mtr_lab.create_model("vim_nano", pretrained=True).eval(); weights = "bundled"
except Exception as e: base = None; weights = f"random ({type(e).__name__})"
for ratio in (0.0, 0.3, 0.4):
    model = mtr_lab.create_model("vim_nano", pretrained=base is not None).eval()
    if ratio: mtr_lab.patch(model, "mtr", ratio=ratio)
    with tempfile.TemporaryDirectory() as folder:
        file = mtr_lab.export_model(model, Path(folder) / "m.onnx").file
        options = onnxruntime.SessionOptions(); options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    for batch in (1, 8):
        x = torch.randn(batch, 3, 112, 112); rec = Products()
        with torch.no_grad(), ops.use_backend("reference"), rec: model(x.clone())
        runs = {"ours": lambda: model(x), "onnxruntime": lambda: session.run(None, {session.get_inputs()[0].name: x.numpy()}), "products": rec.run, "products_onednn": rec.run_onednn}
        t = {k: [] for k in runs}
        with torch.inference_mode():
            for _ in range(25 if batch == 1 else 12):
                for k, f in runs.items():
                    a = clock(); f(); t[k].append(1e3 * (clock() - a))
        best = {k: round(min(v[2:]), 2) for k, v in t.items()}
        best["ratio"] = round(best["onnxruntime"] / best["ours"], 2)
        out[f"{ratio}, {batch}"] = best; print(threads, weights, ratio, batch, best, flush=True)
