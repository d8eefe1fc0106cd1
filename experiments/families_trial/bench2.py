"""Tune the kernels of grids: python bench2.py OUT.txt FOLDER PART [warm]; the best constants go to FOLDER/best_PART.json."""
import json, sys, torch, torch.nn.functional as F, triton
from triton.testing import do_bench_cudagraph
from mtr_lab import ops
from mtr_lab.ops.gpu import add_paths, conv_grid, scan_by_step, scan_tiles
from mtr_lab.tokens import PATHS, Layout
PART, WARM, FOLDER = sys.argv[3], len(sys.argv) > 4, sys.argv[2]
out = open(sys.argv[1], "a")
def say(*a):
    print(*a, file=out, flush=True); print(*a, flush=True)
def bench(f):
    try:
        f(); torch.cuda.synchronize()
        return 1.0 if WARM else min(do_bench_cudagraph(f, rep=15, return_mode="median") for _ in range(2)) * 1e3
    except Exception as e:
        say(f"{type(e).__name__}: {str(e)[:200]}"); return float("inf")
h = lambda *s: torch.randn(*s, device="cuda").half()
f32 = lambda *s: torch.randn(*s, device="cuda")
torch.manual_seed(0)
B = 128
def order(L, names=("forward", "columns", "backward", "columns_backward")):
    side = round(L**0.5)
    return torch.stack([PATHS[n].order(Layout(side, side), torch.device("cuda")) for n in names])
def choose(configs, set_config, cases):
    """cases: list of (weight, name, function)."""
    totals = {}
    for config in configs:
        set_config(config)
        times = [(w, name, bench(f)) for w, name, f in cases]
        totals[config] = sum(w * t for w, _, t in times)
        say(PART, config, f"total {totals[config]:9.1f} us |", *(f"{name} {t:.1f}" for _, name, t in times))
    return min(totals, key=totals.get)
with torch.no_grad():
    if PART == "tiles":
        cases = []
        for w, L, E, R in ((2, 3136, 96, 6), (2, 784, 192, 12), (8, 196, 384, 24), (2, 49, 768, 48)):
            u, low, W = h(B, L, E), h(B, L, 4 * (R + 2)).unflatten(2, (4, R + 2)).permute(2, 0, 1, 3), h(4, E, R) * R**-0.5
            a, d, bias, o, n = -f32(4, E, 1).exp(), f32(4, E), f32(4, E) - 2, order(L)[:, None].expand(-1, B, -1), h(E)
            cases.append((w, f"{L}x{E}", lambda u=u, low=low, W=W, a=a, d=d, bias=bias, o=o, n=n: scan_tiles.scan(
                u, low, W, a, d, bias, o, None, None, n, n, eps=1e-5, repeats=False, stats=())))
        def set_config(c):
            scan_tiles.TOKENS, scan_tiles.REGISTERS = c[0], {"maxnreg": c[1]} if c[1] else {}
        best = choose([(16, 128), (16, 168), (32, 168), (8, 96), (16, 96), (32, 255)], set_config, cases)
        answer = {"scan_tiles": {"TOKENS, CHANNELS": f"{best[0]}, 32", "REGISTERS": f"registers({best[1]})"}}
    if PART == "paths":
        cases = []
        for w, L, E, gate in ((2, 3136, 96, 0), (2, 784, 192, 0), (8, 196, 384, 0), (2, 49, 768, 0), (24, 196, 384, 1)):
            each, z, n = h(4, B, L, E), h(B, L, 2 * E)[..., E:], h(E)
            cases.append((w, f"{L}x{E}{'z' * gate}", lambda each=each, z=z, n=n, gate=gate: add_paths.add_paths(each, z) if gate else add_paths.add_paths(each, None, n, n, 1e-5)))
        def set_config(c): add_paths.VALUES = c
        best = choose([2048, 4096, 1024], set_config, cases)
        answer = {"add_paths": {"VALUES": str(best)}}
    if PART == "steps":
        E, L, N = 384, 196, 16
        o = order(196, ("snake", "snake_backward", "columns_snake", "columns_snake_backward"))
        u, delta, xz, a, b, c = h(B, L, E), h(B, L, E) - 3, h(B, L, 2 * E), -f32(N, E).exp(), h(B, L, 4, N), h(B, L, 44)[..., 28:]
        d, bias = f32(E), f32(E) - 1
        def set_config(c): scan_by_step.REGISTERS, scan_by_step.UNROLL = {"maxnreg": c[0]}, c[1]
        best = choose([(168, 2), (168, 1), (168, 4), (128, 1), (255, 2), (200, 2)], set_config,
                      [(24, "steps", lambda: scan_by_step.scan(u, delta, a, b, c, d, bias, o, xz[..., E:], ()))])
        answer = {"scan_by_step": {"UNROLL": str(best[1]), "REGISTERS": f"registers({best[0]})"}}
    if PART == "conv":
        cases = []
        for w, L, E, k, step in ((2, 3136, 96, 3, 1), (2, 784, 192, 3, 1), (8, 196, 384, 3, 1), (2, 49, 768, 3, 1), (24, 196, 384, 7, 2)):
            side = round(L**0.5)
            maps, weight, bb = h(B, L, step * E)[..., :E].transpose(1, 2).unflatten(2, (side, side)), h(E, 1, k, k), h(E)
            cases.append((w, f"{L}x{E}x{k}", lambda maps=maps, weight=weight, bb=bb: conv_grid.convolve(maps, weight, bb, silu=True)))
        def set_config(c): conv_grid.TOKENS, conv_grid.CHANNELS, conv_grid.WARPS = c
        best = choose([(32, 64, 4), (16, 64, 4), (64, 64, 4), (16, 64, 2), (64, 32, 4), (32, 64, 2)], set_config, cases)
        answer = {"conv_grid": {"TOKENS, CHANNELS, WARPS": ", ".join(map(str, best))}}
if not WARM:
    say("best", PART, answer)
    open(f"{FOLDER}/best_{PART}.json", "w").write(json.dumps(answer))
