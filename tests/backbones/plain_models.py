"""Whole models token by token, from their papers: no scan, no path and no policy of the library.

Each function takes a model for its parameters and its submodules (linear layers, convolutions, norms), and images.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, order: Sequence[int]) -> Tensor:
    """A selective scan in the order of ``order``: u, delta (B, L, E); A (E, N); B, C (B, L, N); D (E,)."""
    state, y = u.new_zeros(*u.shape[::2], A.shape[1]), torch.empty_like(u)
    for t in order:
        step = delta[:, t, :, None]
        state = (step * A).exp() * state + step * u[:, t, :, None] * B[:, t, None]
        y[:, t] = (state * C[:, t, None]).sum(-1) + D * u[:, t]
    return y


def on_grid(tokens: Tensor, rows: int, columns: int) -> Tensor:
    return tokens.mT.unflatten(2, (rows, columns))


def registers(model: Any, images: Tensor) -> Tensor:
    """Mamba-Reg: registers behind equal runs of patches, two directions, of which half each."""
    patches = model.patch_embed.proj(images).flatten(2).mT + model.pos_embed
    count, special = patches.shape[1], (model.cls_token + model.pos_embed_cls).expand(len(images), -1, -1)
    run, parts, places = count // (special.shape[1] + 1), [], []
    for k in range(special.shape[1]):
        parts += [patches[:, k * run : (k + 1) * run], special[:, k : k + 1]]
        places.append((k + 1) * run + k)
    stream = torch.cat([*parts, patches[:, special.shape[1] * run :]], 1)
    for block in model.layers:
        mixer, length = block.mixer, stream.shape[1]
        x, z = mixer.in_proj(rms_norm(stream, block.norm)).chunk(2, -1)
        total = torch.zeros_like(x)
        for suffix, order in (("", range(length)), ("_b", range(length - 1, -1, -1))):
            conv, x_proj, dt_proj = (getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
            taps = conv.weight[:, 0]
            padded = F.pad(x, (0, 0, 3, 0) if not suffix else (0, 0, 0, 3))
            taps = taps if not suffix else taps.flip(1)
            u = F.silu(sum(padded[:, k : k + length] * taps[:, k] for k in range(4)) + conv.bias)
            low_rank, b, c = x_proj(u).split([mixer.dt_rank, mixer.d_state, mixer.d_state], -1)
            A_log, D = (mixer.A_log, mixer.D) if not suffix else (mixer.A_b_log, mixer.D_b)
            total += scan(u, F.softplus(dt_proj(low_rank)), -A_log.exp(), b, c, D, order)
        stream = stream + mixer.out_proj(total * F.silu(z) / 2)
    read = model.neck(rms_norm(stream, model.norm_f)[:, places]).flatten(1)
    return model.head(rms_norm(read, model.norm_neck))


def rms_norm(stream: Tensor, norm: Any) -> Tensor:
    return stream * (stream.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight


def layer_norm(stream: Tensor, norm: Any) -> Tensor:
    return F.layer_norm(stream, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def snakes(model: Any, images: Tensor) -> Tensor:
    """PlainMamba: the input follows four snakes, Δ, B and C are read row by row."""
    stream = model.patch_embed(images)
    rows, columns = stream.shape[2:]
    stream = stream.flatten(2).mT + model.pos_embed
    down = [row * columns + (i if row % 2 == 0 else columns - 1 - i) for row in range(rows) for i in range(columns)]
    across = [
        (i if column % 2 == 0 else rows - 1 - i) * columns + column for column in range(columns) for i in range(rows)
    ]
    for block in model.layers:
        mixer = block.mamba
        x, z = mixer.in_proj(layer_norm(stream, block.norm)).chunk(2, -1)
        u = F.silu(mixer.conv2d(on_grid(x, rows, columns))).flatten(2).mT
        low_rank, b, c = mixer.x_proj(u).split([mixer.dt_rank, mixer.d_state, mixer.d_state], -1)
        delta = F.softplus(mixer.dt_proj(low_rank) + mixer.dt_proj.bias)
        total = torch.zeros_like(u)
        for path in (down, down[::-1], across, across[::-1]):
            moves = [0, *(move(path[t] - path[t - 1], columns) for t in range(1, len(path)))]
            y = scan(u[:, path], delta, -mixer.A_log.exp(), b + mixer.direction_Bs[moves], c, mixer.D, range(len(path)))
            total[:, path] += y
        stream = stream + mixer.out_proj(total * F.silu(z))
        if block.dw is not None:
            stream = block.dw(on_grid(stream, rows, columns)).flatten(2).mT
    return model.head.fc(layer_norm(stream, model.ln1).mean(1))


def move(step: int, columns: int) -> int:
    """Right, left, up, down are 1 to 4. In a grid of one column every step is down or up."""
    if columns == 1:
        return 4 if step == 1 else 3
    return {1: 1, -1: 2, -columns: 3, columns: 4}[step]


def pyramid(model: Any, images: Tensor) -> Tensor:
    """VMamba: rows, columns, and both reversed, with parameters for each, summed before a norm."""
    maps = model.patch_embed(images)
    for layer in model.layers:
        rows, columns = maps.shape[2:]
        places, tokens = torch.arange(rows * columns).view(rows, columns), maps.flatten(2).mT
        orders = [places.flatten(), places.T.flatten(), places.flatten().flip(0), places.T.flatten().flip(0)]
        for block in layer["blocks"]:
            mixer = block.op
            x = on_grid(mixer.in_proj(layer_norm(tokens, block.norm)), rows, columns)
            u, total = F.silu(mixer.conv2d(x)).flatten(2).mT, 0
            A, D = -mixer.A_logs.exp().view(4, mixer.d_inner, -1), mixer.Ds.view(4, mixer.d_inner)
            for k, order in enumerate(orders):
                low_rank, b, c = (u @ mixer.x_proj_weight[k].T).split([mixer.dt_rank, *[mixer.d_state] * 2], -1)
                delta = F.softplus(low_rank @ mixer.dt_projs_weight[k].T + mixer.dt_projs_bias[k])
                total = total + scan(u, delta, A[k], b, c, D[k], order.tolist())
            tokens = tokens + mixer.out_proj(layer_norm(total, mixer.out_norm))
            hidden = F.gelu(block.mlp.fc1(layer_norm(tokens, block.norm2)))
            tokens = tokens + block.mlp.fc2(hidden)
        maps = layer["downsample"](on_grid(tokens, rows, columns))
    return model.classifier.head(layer_norm(tokens, model.classifier.norm).mean(1))


def windows(model: Any, images: Tensor) -> Tensor:
    """MambaVision: windows of zero-padded maps, a centred convolution of both halves, of which one is scanned."""
    maps = model.patch_embed(images)
    for number, level in enumerate(model.levels):
        if number < 2:
            maps = one_after_the_other(level.blocks, maps)
        else:
            side, (rows, columns) = model.window_size[number], maps.shape[2:]
            padded = F.pad(maps, (0, -columns % side, 0, -rows % side))
            whole = torch.zeros_like(padded)
            for top in range(0, padded.shape[2], side):
                for left in range(0, padded.shape[3], side):
                    place = (..., slice(top, top + side), slice(left, left + side))
                    tokens = padded[place].flatten(2).mT
                    for block in level.blocks:
                        scale_1, scale_2 = (1 if g is None else g for g in (block.gamma_1, block.gamma_2))
                        tokens = tokens + scale_1 * window_mixer(block.mixer, layer_norm(tokens, block.norm1))
                        tokens = tokens + scale_2 * block.mlp(layer_norm(tokens, block.norm2))
                    whole[place] = on_grid(tokens, side, side)
            maps = whole[..., :rows, :columns]
        maps = maps if level.downsample is None else level.downsample(maps)
    return model.head(F.batch_norm(
        maps, model.norm.running_mean, model.norm.running_var, model.norm.weight, model.norm.bias, eps=model.norm.eps
    ).mean((2, 3)))  # fmt: skip


def one_after_the_other(blocks: Any, maps: Tensor) -> Tensor:
    for block in blocks:
        maps = block(maps)
    return maps


def window_mixer(mixer: Any, hidden: Tensor) -> Tensor:
    if hasattr(mixer, "qkv"):
        q, k, v = mixer.qkv(hidden).chunk(3, -1)
        heads = [
            ((a @ b.mT) / a.shape[-1] ** 0.5).softmax(-1) @ c
            for a, b, c in zip(*(t.chunk(mixer.num_heads, -1) for t in (q, k, v)), strict=True)
        ]
        return mixer.proj(torch.cat(heads, -1))
    length = hidden.shape[1]
    x, z = (F.pad(half, (0, 0, 1, 1)) for half in mixer.in_proj(hidden).chunk(2, -1))
    x, z = (
        F.silu(sum(half[:, k : k + length] * conv.weight[:, 0, k] for k in range(3)))
        for half, conv in ((x, mixer.conv1d_x), (z, mixer.conv1d_z))
    )
    low_rank, b, c = mixer.x_proj(x).split([mixer.dt_rank, mixer.d_state, mixer.d_state], -1)
    delta = F.softplus(mixer.dt_proj(low_rank) + mixer.dt_proj.bias)
    y = scan(x, delta, -mixer.A_log.exp(), b, c, mixer.D, range(length))
    return mixer.out_proj(torch.cat([y, z], -1))
