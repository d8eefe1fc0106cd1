# ruff: noqa
"""Kernels of large batches, side by side: ``OUT_NAME=FOLDER python experiments/large_batches_gpu.py STAGE``.

Stages: micro (rates of exponentials), check (against float64), kernels, models, profile. Each prints JSON lines, and
appends them to FOLDER/rows.jsonl. ``today`` are the separate launches, ``fused`` convolution and x_proj in one launch,
``inside`` in addition the scan that computes its timescales.
"""

import json, os, re, subprocess, sys, tempfile, time
from collections import Counter
from functools import partial
from pathlib import Path

import torch, triton
import triton.language as tl
from triton.testing import do_bench_cudagraph

OUT = Path(os.environ["OUT_NAME"])
D = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F16 = torch.float16
stage = sys.argv[1]
T0 = time.time()


def log(**row):
    row = {"stage": stage, "t": round(time.time() - T0, 1), **row}
    print(json.dumps(row), flush=True)
    with open(OUT / "rows.jsonl", "a") as f:
        f.write(json.dumps(row) + "\n")


def attempt(f, **tags):
    try:
        return f()
    except Exception as e:
        log(**tags, error=f"{type(e).__name__}: {str(e)[:300]}")


@triton.jit
def ex2_rate(out, n, MODE: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    x0 = -1.0 - i.to(tl.float32) * 1e-3
    x1 = x0 * 0.5
    x2 = x0 * 0.7
    x3 = x0 * 0.9
    if MODE > 0:
        x0 = x0.to(tl.float16)
        x1 = x1.to(tl.float16)
        x2 = x2.to(tl.float16)
        x3 = x3.to(tl.float16)
    for _ in range(n):
        for _ in tl.static_range(4):
            if MODE == 0:
                x0 = tl.inline_asm_elementwise(
                    "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x0], dtype=tl.float32, is_pure=True, pack=1
                )
                x1 = tl.inline_asm_elementwise(
                    "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x1], dtype=tl.float32, is_pure=True, pack=1
                )
                x2 = tl.inline_asm_elementwise(
                    "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x2], dtype=tl.float32, is_pure=True, pack=1
                )
                x3 = tl.inline_asm_elementwise(
                    "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x3], dtype=tl.float32, is_pure=True, pack=1
                )
            elif MODE == 1:
                x0 = tl.inline_asm_elementwise(
                    "ex2.approx.f16x2 $0, $1;", "=r,r", [x0], dtype=tl.float16, is_pure=True, pack=2
                )
                x1 = tl.inline_asm_elementwise(
                    "ex2.approx.f16x2 $0, $1;", "=r,r", [x1], dtype=tl.float16, is_pure=True, pack=2
                )
                x2 = tl.inline_asm_elementwise(
                    "ex2.approx.f16x2 $0, $1;", "=r,r", [x2], dtype=tl.float16, is_pure=True, pack=2
                )
                x3 = tl.inline_asm_elementwise(
                    "ex2.approx.f16x2 $0, $1;", "=r,r", [x3], dtype=tl.float16, is_pure=True, pack=2
                )
            else:
                x0 = tl.inline_asm_elementwise(
                    "tanh.approx.f16x2 $0, $1;", "=r,r", [x0], dtype=tl.float16, is_pure=True, pack=2
                )
                x1 = tl.inline_asm_elementwise(
                    "tanh.approx.f16x2 $0, $1;", "=r,r", [x1], dtype=tl.float16, is_pure=True, pack=2
                )
                x2 = tl.inline_asm_elementwise(
                    "tanh.approx.f16x2 $0, $1;", "=r,r", [x2], dtype=tl.float16, is_pure=True, pack=2
                )
                x3 = tl.inline_asm_elementwise(
                    "tanh.approx.f16x2 $0, $1;", "=r,r", [x3], dtype=tl.float16, is_pure=True, pack=2
                )
    tl.store(
        out + tl.program_id(0) * B + i, x0.to(tl.float32) + x1.to(tl.float32) + x2.to(tl.float32) + x3.to(tl.float32)
    )


def micro():
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    B, n, programs = 256, 500, sms * 16
    out = torch.empty(programs * B, device=D)
    for mode, name in enumerate(("ex2.f32", "ex2.f16x2", "tanh.f16x2")):

        def go():
            ms = do_bench_cudagraph(
                lambda: ex2_rate[(programs,)](out, n, MODE=mode, B=B, num_warps=4), rep=30, return_mode="median"
            )
            values = programs * B * n * 16
            log(name=name, ms=ms, values_per_ns=values / ms / 1e6, per_sm_clk_at_1755=values / ms / 1e6 / sms / 1.755)

        attempt(go, name=name)


from mtr_lab import ops
from mtr_lab.ops.gpu import occupancy

STAGES_ = int(os.environ.get("K1_STAGES", 3))
occupancy.STAGES = tl.constexpr(STAGES_)
from mtr_lab.ops.gpu import conv_project, decision, neighbours, norm, project, scan, scan_chunks
from mtr_lab.ops.gpu.occupancy import registers


computes_deltas = scan.computes_deltas


def form_of(fuse, inside):
    project.FUSED = 0 if fuse else 10**12
    scan.computes_deltas = computes_deltas if inside else lambda x: False


def normal(*s, dtype=torch.float32):
    return torch.randn(*s, device=D).to(dtype)


def block(images, length, inner, rank, dtype=F16, states=16):
    xz = normal(images, length, 2 * inner, dtype=dtype)
    x, z = xz.chunk(2, -1)
    w = ops.MambaWeights(
        normal(2, inner, 1, 4),
        normal(2, inner),
        normal(2, rank + 2 * states, inner) * inner**-0.5,
        normal(2, inner, rank) * rank**-0.5,
        normal(2, inner) - 4,
        torch.arange(1.0, states + 1, device=D).log().expand(2, inner, states),
        normal(2, inner),
    )
    return xz, x, z, w, ops.pack(w, dtype)


def places(images, length, original):
    index = torch.stack([torch.randperm(original, device=D)[:length].sort()[0] for _ in range(images)])
    source = torch.randint(-1, length, (images, original), device=D)
    return index, source


def rel(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def check():
    for dtype, images, length, inner, rank, reduced in [
        (torch.float32, 3, 197, 768, 24, False),
        (F16, 3, 197, 768, 24, False),
        (F16, 3, 197, 768, 24, True),
        (torch.bfloat16, 2, 131, 1536, 48, True),
        (F16, 5, 65, 384, 12, False),
        (F16, 2, 50, 200, 7, True),
        (F16, 2, 9, 64, 7, True),
    ][5 if D.type == "cpu" else 0 :]:

        def go():
            xz, x, z, w, p = block(images, length, inner, rank, dtype)
            index, source = places(images, length, length + 30) if reduced else (None, None)
            wd = ops.MambaWeights(*(t.double() for t in w))
            # the packed weights are rounded: compare with these
            pd = ops.MambaWeights(
                wd.conv_weight, wd.conv_bias, w.x_proj.to(dtype).double(), w.dt_proj.to(dtype).double(), *wd[4:]
            )
            for factor in (
                {},
                {"delta_scale": 1 + torch.rand(images, length, device=D)},
                {"repeats": torch.randint(1, 4, (images, length), device=D).float()},
            ):
                with torch.no_grad(), ops.use_backend("reference"):
                    y, *_ = ops.mamba_inner(
                        xz.double(),
                        pd,
                        reverse=(False, True),
                        index=index,
                        source=source,
                        **{k: v.double() for k, v in factor.items()},
                    )
                row = {}
                for name, fuse, inside in (("today", False, False), ("fused", True, False), ("inside", True, True)):
                    form_of(fuse, inside)
                    scan.half_width = lambda *_: None
                    scan_chunks.MIN_ROOM = 10**9
                    with torch.inference_mode(), ops.use_backend("triton"):
                        out, *_ = ops.mamba_inner(xz, w, reverse=(False, True), index=index, source=source, **factor)
                    row[name] = rel(out, y)
                log(dtype=str(dtype), shape=(images, length, inner, rank), reduced=reduced, factor=list(factor), **row)

        attempt(go, dtype=str(dtype), shape=(images, length, inner, rank))


def usage(kernel):
    """Registers, spills and instruction mix of the loops."""
    P = Path(triton.__file__).parent / "backends/nvidia/bin"
    try:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(kernel.asm["cubin"])
            f.flush()
            s = subprocess.run([P / "cuobjdump", "-sass", f.name], capture_output=True, text=True).stdout
        code = []
        for l in s.splitlines():
            a = re.match(r"\s+/\*([0-9a-f]+)\*/\s+(@!?U?P[\dT]\s+)?([A-Z0-9_.]+)(.*)", l)
            if a:
                code.append((int(a[1], 16), a[3], a[4]))
        loops = []
        for at, op, rest in code:
            t = re.search(r"0x([0-9a-f]+)", rest)
            if op.startswith("BRA") and t and int(t[1], 16) < at:
                body = [o for b, o, _ in code if int(t[1], 16) <= b <= at]
                loops.append({"n": len(body), **dict(Counter(o.split(".")[0] for o in body).most_common(9))})
        return {"regs": kernel.n_regs, "spills": kernel.n_spills, "loops": loops}
    except Exception as e:
        return {"usage_error": str(e)[:100]}


def last(jit):
    caches = next(iter(jit.device_caches.values()))[0]
    return list(caches.values())[-1]


def bench(f, rep=30):
    f()
    torch.cuda.synchronize()
    return round(1e3 * do_bench_cudagraph(f, rep=rep, return_mode="median"), 1)


SHAPES = {
    "vim_s": (256, 197, 768, 24),
    "vim_s 120": (256, 120, 768, 24),
    "vim_ti": (256, 197, 384, 12),
    "vim_b": (256, 197, 1536, 48),
    "1024": (8, 4097, 768, 24),
}


def kernels():
    torch.manual_seed(0)
    both = (0, 1)
    for name in ("vim_s", "vim_b", "vim_ti", "1024", "vim_s 120") if STAGES_ == 3 else ("vim_s",):
        images, length, inner, rank = SHAPES[name]
        xz, x, z, w, p = block(*SHAPES[name])
        p = ops.pack(w, F16)
        index, source = places(images, length, 197 if length < 197 else length)
        scan.half_width = lambda *_: None
        form_of(False, False)
        u, delta, projected, _ = project.project(x, p, None, both, ())
        bc = projected[..., -32:]
        factor = 1 + torch.rand(images, length, device=D)
        # the parts of today
        run = triton.cdiv(length, triton.cdiv(length, 32))
        log(shape=name, today="project", us=bench(lambda: project.project(x, p, None, both, ())))
        log(shape=name, today="project without deltas", us=bench(lambda: project.convolve(x, p, both)))
        log(shape=name, today="x_proj", us=bench(lambda: project._multiply(u.flatten(1, 2), p.projection)))
        log(
            shape=name,
            today="project unmerged",
            us=bench(lambda: project.project(x, p, None, both, (), index=index, source=source)),
        )
        log(
            shape=name,
            today="scan",
            us=bench(
                lambda: scan.scan(
                    u, delta, p.a, bc, p.d, z, p.timescale_bias, None, None, None, both, (), softplus=False
                )
            ),
            **usage(last(scan._scan)),
        )
        best = None
        configs = [
            (64, 32, 4, 1, 128),
            (64, 32, 4, 2, 128),
            (64, 32, 4, 3, 128),
            (64, 64, 8, 1, 128),
            (64, 32, 4, 1, 96),
            (128, 32, 8, 1, 128),
            (32, 64, 4, 1, 128),
            (64, 64, 4, 1, 168),
            (64, 16, 4, 1, 96),
            (32, 32, 4, 1, 96),
            (32, 32, 2, 1, 128),
        ]
        if name not in ("vim_s", "vim_b"):
            configs = configs[:4] + configs[5:7]
        configs = configs if STAGES_ == 3 else []
        for T, C, W, S, R in configs:
            (
                conv_project.TOKENS,
                conv_project.CHANNELS,
                conv_project.WARPS,
                conv_project.LOOP_STAGES,
                conv_project.REGISTERS,
            ) = T, C, W, S, registers(R)

            def go():
                us = bench(lambda: conv_project.convolve_project(x, p, both, None, None))
                more = usage(last(conv_project._convolve_project)) if name in ("vim_s", "vim_b") else {}
                unmerged = bench(lambda: conv_project.convolve_project(x, p, both, index, source))
                log(shape=name, fused=(T, C, W, S, R), us=us, unmerged=unmerged, **more)
                return us

            us = attempt(go, shape=name, fused=(T, C, W, S, R))
            if us and (best is None or us < best[0]):
                best = us, (T, C, W, S, R)
        if best:
            log(shape=name, best_fused=best)
        for U, R, CH in [(4, 168, 64), (4, 200, 64), (4, 128, 64), (8, 168, 64), (4, 128, 32)][
            : 5 if name in ("vim_s", "vim_b") else 1
        ]:
            scan.UNROLL, scan.REGISTERS, scan.CHANNELS = U, registers(R), CH

            def go():
                us = bench(
                    lambda: scan.scan(
                        u,
                        None,
                        p.a,
                        bc,
                        p.d,
                        z,
                        p.timescale_bias,
                        None,
                        None,
                        None,
                        both,
                        (),
                        softplus=True,
                        timescale=p.timescale,
                    )
                )
                more = usage(last(scan._scan)) if name == "vim_s" else {}
                scaled = (
                    bench(
                        lambda: scan.scan(
                            u,
                            None,
                            p.a,
                            bc,
                            p.d,
                            z,
                            p.timescale_bias,
                            None,
                            None,
                            factor,
                            both,
                            (),
                            softplus=True,
                            timescale=p.timescale,
                        )
                    )
                    if U == 4 and R == 168
                    else None
                )
                log(shape=name, scan_inside=(U, R, STAGES_, CH), us=us, scaled=scaled, **more)

            attempt(go, shape=name, scan_inside=(U, R, STAGES_, CH))
        scan.UNROLL, scan.REGISTERS, scan.CHANNELS = 4, registers(168), 64
        if name == "vim_s":
            h, r, wt = (
                normal(images, length, inner // 2, dtype=F16),
                normal(images, length, inner // 2),
                normal(inner // 2),
            )
            i, o = normal(2 * inner, inner // 2, dtype=F16), normal(inner // 2, inner, dtype=F16)
            log(part="norm", us=bench(lambda: norm.norm_add(h, r, wt, None, 1e-5, *(None,) * 7)))
            log(part="in_proj", us=bench(lambda: torch.nn.functional.linear(h, i)))
            log(part="out_proj", us=bench(lambda: torch.nn.functional.linear(z, o)))
            half = i[:inner]
            log(part="in_proj, half", us=bench(lambda: torch.nn.functional.linear(h, half)))


def best_fused():
    import collections

    rows = [json.loads(l) for l in open(OUT / "rows.jsonl")]
    for r in rows:
        if r.get("shape") == "vim_s" and r.get("best_fused"):
            T, C, W, S, R = r["best_fused"][1]
            (
                conv_project.TOKENS,
                conv_project.CHANNELS,
                conv_project.WARPS,
                conv_project.LOOP_STAGES,
                conv_project.REGISTERS,
            ) = T, C, W, S, registers(R)
    log(config=(conv_project.TOKENS, conv_project.CHANNELS, conv_project.WARPS, conv_project.LOOP_STAGES))


FORMS = {"today": (False, False), "fused": (True, False), "inside": (True, True)}


def made(name, policy, ratio, graph=True, batch=256, size=None):
    import mtr_lab

    torch.manual_seed(0)
    model = mtr_lab.create_model(name, **({} if size is None else {"img_size": size})).eval()
    if policy:
        mtr_lab.patch(model, policy, ratio=ratio)
    model.to(D, F16)
    x = torch.randn(batch, 3, size or 224, size or 224, device=D, dtype=F16)
    with torch.inference_mode():
        for _ in range(2):
            model(x)
        call = model
        if graph:
            from mtr_lab.backbones import compile

            call = compile(model)
            call(x)
    return model, call, x


def stream_ms(call, x, calls=12):
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.inference_mode():
        for _ in range(2):
            call(x)
        a.record()
        for _ in range(calls):
            call(x)
        b.record()
    torch.cuda.synchronize()
    return a.elapsed_time(b) / calls


def models():
    best_fused()
    for name, batch, size in (("vim_s", 256, None), ("vim_b", 256, None), ("vim_ti", 256, None), ("vim_s", 8, 1024)):
        cases = {}
        for policy in (None, "mtr", "fovea"):
            for form, (fuse, inside) in FORMS.items():
                form_of(fuse, inside)
                r = attempt(
                    lambda: made(name, policy, 0.4, batch=batch, size=size), model=name, policy=policy, form=form
                )
                if r:
                    cases[policy or "none", form] = r[1:]
        times = {k: [] for k in cases}
        for _ in range(5):
            for k, (call, x) in cases.items():
                times[k].append(stream_ms(call, x))
        for k, t in times.items():
            ms = sorted(t)[len(t) // 2]
            log(model=name, size=size, policy=k[0], form=k[1], ms=round(ms, 3), img_per_s=round(batch / ms * 1e3))
        del cases
        torch.cuda.empty_cache()


def profile():
    best_fused()
    from torch.profiler import ProfilerActivity, profile as prof

    for name, policy, form in (
        ("vim_s", "fovea", "today"),
        ("vim_s", None, "today"),
        ("vim_s", "fovea", "inside"),
        ("vim_s", None, "inside"),
        ("vim_s", "mtr", "inside"),
    ):
        form_of(*FORMS[form])
        model, call, x = made(name, policy, 0.4, graph=False)
        with torch.inference_mode():
            for _ in range(2):
                model(x)
            torch.cuda.synchronize()
            with prof(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as p:
                for _ in range(3):
                    model(x)
                torch.cuda.synchronize()
        rows = sorted(
            (
                (e.key, e.self_device_time_total / 3, e.count / 3)
                for e in p.key_averages()
                if e.self_device_time_total > 0 and str(e.device_type).endswith("CUDA")
            ),
            key=lambda r: -r[1],
        )
        log(
            model=name,
            policy=policy,
            form=form,
            total_us=round(sum(r[1] for r in rows)),
            rows=[(k[:70], round(t, 1), n) for k, t, n in rows[:34]],
        )
        events = [
            (e.name[:40], round(e.device_time, 1))
            for e in p.events()
            if str(e.device_type).endswith("CUDA") and e.device_time > 0
        ]
        (OUT / f"events_{name}_{policy}_{form}.json").write_text(json.dumps(events[: len(events) // 3 + 5]))


if __name__ == "__main__":
    print(
        stage,
        torch.cuda.is_available() and torch.cuda.get_device_name(),
        torch.__version__,
        triton.__version__,
        flush=True,
    )
    {"micro": micro, "check": check, "kernels": kernels, "models": models, "profile": profile}[stage]()
