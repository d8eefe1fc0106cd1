"""Times of the new kernels for several tiles, against what runs today. python bench.py OUT.txt FOLDER PART [warm]"""
import sys, time, torch, torch.nn.functional as F
sys.path.insert(0, sys.argv[2])
from triton.testing import do_bench_cudagraph
import check  # correctness of the kernels, and the references
from mtr_lab import ops
from mtr_lab.ops.gpu import conv_grid, scan_tiles, scan_by_step
from mtr_lab.tokens import PATHS, Layout
PART, WARM = sys.argv[3], len(sys.argv) > 4
out = open(sys.argv[1], "a")
def say(*a):
    print(*a, file=out, flush=True); print(*a, flush=True)
say(torch.cuda.get_device_name(), torch.__version__)
def bench(f, n=10):
    try:
        f(); torch.cuda.synchronize()
        if WARM: return 0.0
        return min(do_bench_cudagraph(f, rep=n, return_mode="median") for _ in range(2)) * 1e3
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:150]}"
def show(name, f):
    t = bench(f)
    say(f"{name:60s} {t:9.1f} us" if isinstance(t, float) else f"{name} {t}")
h = lambda *s: torch.randn(*s, device="cuda").half()
f32 = lambda *s: torch.randn(*s, device="cuda")
torch.manual_seed(0)
def checks():
    for what in (lambda: check.conv(3, 96, 28, 28, 3), lambda: check.conv(3, 96, 14, 15, 7, torch.float16),
                 lambda: check.tiles(2, 197, 96, 1, 6, 4), lambda: check.tiles(2, 197, 100, 2, 6, 4, torch.float16),
                 lambda: check.steps(2, 197, 96, 16, 4), lambda: check.steps(2, 197, 100, 8, 4, torch.float16)):
        try: what()
        except Exception as e: say("check failed", type(e).__name__, str(e)[:300])
if PART == "check": checks()
orders = {}
def order(L):
    side = round(L**0.5)
    if L not in orders:
        orders[L] = torch.stack([PATHS[n].order(Layout(side, side), torch.device("cuda")) for n in ("forward", "columns", "backward", "columns_backward")])
    return orders[L]
B = 128
def steps_part():
    say("# scan by step: PlainMamba-L1, 128 x 196 x 384, 16 states, 4 snakes")
    E, L, N = 384, 196, 16
    names = ("snake", "snake_backward", "columns_snake", "columns_snake_backward")
    o = torch.stack([PATHS[n].order(Layout(14, 14), torch.device("cuda")) for n in names])
    u, delta, xz, a, b, c = h(B, L, E), h(B, L, E) - 3, h(B, L, 2 * E), -f32(N, E).exp(), h(B, L, 4, N), h(B, L, 44)[..., 28:]
    d, bias = f32(E), f32(E) - 1
    for reg in (168, 128, 255):
        for U in (2, 4, 1):
            scan_by_step.REGISTERS, scan_by_step.UNROLL = {"maxnreg": reg}, U
            show(f"steps registers {reg} unroll {U}", lambda: scan_by_step.scan(u, delta, a, b, c, d, bias, o, xz[..., E:], ()))
    each = h(4, B, L, E); y = h(B, L, E)
    for T, CH, W in ((16, 64, 4), (8, 128, 4), (16, 128, 8), (4, 128, 2), (8, 64, 2)):
        import triton
        show(f"_add_paths {T} {CH} {W}", lambda: scan_by_step._add_paths[triton.cdiv(B * L, T), triton.cdiv(E, CH)](each, xz[..., E:], y, B * L, E, 2 * E, G=4, T=T, E=CH, num_warps=W))
    steps = torch.empty_like(o).scatter_(1, o, torch.arange(L, device="cuda").expand(4, -1))
    m, wA = h(4, L, N), -f32(E, N).exp()
    show("today: scan_by_step, copied", lambda: ops.scan_by_step(u, delta, wA, b[:, :, 0].contiguous(), c, d, order=o, steps=steps, moves=m, delta_bias=bias, z=xz[..., E:]))
def conv_part():
    say("# depthwise convolutions")
    for (L, E, k, step) in ((196, 384, 7, 2), (3136, 96, 3, 1), (784, 192, 3, 1), (196, 384, 3, 1), (49, 768, 3, 1)):
        side = round(L**0.5)
        x = h(B, L, step * E)[..., :E]
        maps = x.transpose(1, 2).unflatten(2, (side, side)); w, bb = h(E, 1, k, k), h(E)
        for cfg in ((32, 64, 4), (16, 64, 4), (64, 64, 4), (32, 64, 2), (16, 64, 1), (64, 32, 4)):
            conv_grid.TOKENS, conv_grid.CHANNELS, conv_grid.WARPS = cfg
            show(f"conv {L} {E} {k} {cfg}", lambda: conv_grid.convolve(maps, w, bb, silu=True))
        conv = lambda: F.silu(F.conv2d(maps, w, bb, padding=k // 2, groups=E).flatten(2).transpose(1, 2)).contiguous()
        show(f"today: conv2d + silu {L} {E} {k}", conv)
def tiles_part():
    say("# scan in tiles: VMamba-T")
    for (L, E, R) in [((3136, 96, 6), (784, 192, 12), (196, 384, 24), (49, 768, 48))[int(PART[5:])]]:
        u, low, W = h(B, L, E), h(4, B, L, R + 2), h(4, E, R) * R**-0.5
        a, d, bias = -f32(4, E, 1).exp(), f32(4, E), f32(4, E) - 2
        o = order(L)[:, None].expand(-1, B, -1)
        for cfg in ((64, 32, 4), (32, 32, 2), (32, 64, 4), (64, 32, 8), (32, 32, 4), (16, 32, 1), (128, 32, 8)):
            scan_tiles.TOKENS, scan_tiles.CHANNELS, scan_tiles.WARPS = cfg
            show(f"tiles {L} {E} {cfg}", lambda: scan_tiles.scan(u, low, W, a, d, bias, o, None, None, repeats=False, stats=()))
        delta = torch.bmm(low[..., :R].flatten(1, 2), W.transpose(1, 2)).unflatten(1, (B, L))
        bb, cc = low[..., R : R + 1], low[..., R + 1 :]
        show(f"today: bmm {L} {E}", lambda: torch.bmm(low[..., :R].flatten(1, 2), W.transpose(1, 2)))
        show(f"today: scan {L} {E}", lambda: ops.selective_scan(u.expand(4, *u.shape), delta, a, bb, cc, d, delta_bias=bias, order=o))
        del delta
with torch.no_grad():
    if PART == "steps": steps_part()
    if PART == "conv": conv_part()
    if PART.startswith("tiles"): tiles_part()
