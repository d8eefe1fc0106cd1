"""Small classes with the attributes and the parameter names of the authors' classes.

Their own code needs a GPU: every ``forward`` raises, as theirs does on a CPU.
"""

import json
import math
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

GOLDEN = Path(__file__).parent / "golden"


def needs_cuda(*_: Any) -> Any:
    raise RuntimeError("Expected u.is_cuda() to be true, but got false.")


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.register_parameter("bias", None)

    def forward(self, x, residual=None, prenorm=False, residual_in_fp32=False):
        needs_cuda()


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob


class PatchEmbed(nn.Module):
    def __init__(
        self, img_size: int | tuple[int, int], patch_size: int, stride: int, channels: int, width: int
    ) -> None:
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.patch_size = (patch_size, patch_size)
        self.grid_size = tuple((side - patch_size) // stride + 1 for side in self.img_size)
        self.num_patches = math.prod(self.grid_size)
        self.flatten = True
        self.proj = nn.Conv2d(channels, width, patch_size, stride)
        self.norm = nn.Identity()


class TubeletEmbed(nn.Module):
    def __init__(self, img_size: int, patch_size: int, kernel_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2
        self.tubelet_size = kernel_size
        sizes = (kernel_size, patch_size, patch_size)
        self.proj = nn.Conv3d(channels, width, sizes, sizes)


def is_bidirectional(attributes: dict[str, Any]) -> bool:
    return bool(attributes.get("bimamba") or attributes.get("biscan") or attributes.get("bimamba_type") == "v2")


class Mamba(nn.Module):
    def __init__(self, width: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, **attributes: Any) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = width, d_state, d_conv, expand
        self.d_inner = inner = expand * width
        self.dt_rank = math.ceil(width / 16)
        self.use_fast_path, self.activation = True, "silu"
        biases = attributes.pop("bias", False), attributes.pop("conv_bias", True)
        for name, value in attributes.items():
            setattr(self, name, value)
        self.in_proj = nn.Linear(width, 2 * inner, bias=biases[0])
        self.act = nn.SiLU()
        backward = "_b" if is_bidirectional(attributes) else ""
        for suffix in dict.fromkeys(("", backward)):
            conv = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1, bias=biases[1])
            self.add_module(f"conv1d{suffix}", conv)
            self.add_module(f"x_proj{suffix}", nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False))
            self.add_module(f"dt_proj{suffix}", nn.Linear(self.dt_rank, inner))
            self.register_parameter(f"A{suffix}_log", nn.Parameter(torch.zeros(inner, d_state)))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(inner)))
        if attributes.get("init_layer_scale") is not None:
            self.gamma = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(inner, width, bias=biases[0])

    def forward(self, hidden_states, inference_params=None):
        needs_cuda()


class Block(nn.Module):
    def __init__(self, mixer: nn.Module, norm: nn.Module, drop_path: float, number: int) -> None:
        super().__init__()
        self.residual_in_fp32 = self.fused_add_norm = True
        self.mixer, self.norm, self.layer_idx = mixer, norm, number
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, hidden_states, residual=None, inference_params=None):
        needs_cuda()


def build_common(
    model: Any, depth: int, width: int, num_classes: int, drop_path_rate: float, norm: Any, **mixer: Any
) -> None:
    model.residual_in_fp32 = model.fused_add_norm = True
    model.num_classes = num_classes
    model.d_model = model.num_features = model.embed_dim = width
    model.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
    model.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
    rates = [0.0, *torch.linspace(0, drop_path_rate, depth).tolist()]
    model.layers = nn.ModuleList(Block(Mamba(width, **mixer), norm(), rates[i], i) for i in range(depth))
    model.norm_f = norm()


def vim(
    img_size: Any = 64, patch_size: int = 8, stride: int = 8, depth: int = 2, embed_dim: int = 48, channels: int = 3,
    num_classes: int = 10, d_state: int = 16, norm_epsilon: float = 1e-5, rms_norm: bool = True,
    if_divide_out: bool | None = True, drop_rate: float = 0.0, drop_path_rate: float = 0.0,
    bimamba_type: str = "v2", ssm_cfg: dict[str, Any] | None = None, init_layer_scale: float | None = None,
    **attributes: Any,
) -> nn.Module:  # fmt: skip
    """An object of a class like Vim's; ``if_divide_out=None``: the attribute has its name of before July 2024."""

    class VisionMamba(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            published = {
                "if_bidirectional": False, "final_pool_type": "mean", "if_abs_pos_embed": True, "if_rope": False,
                "if_rope_residual": False, "flip_img_sequences_ratio": -1.0, "if_cls_token": True,
                "use_double_cls_token": False, "use_middle_cls_token": True, "num_tokens": 1,
            }  # fmt: skip
            for name, value in {**published, **attributes}.items():
                setattr(self, name, value)
            self.patch_embed = PatchEmbed(img_size, patch_size, stride, channels, embed_dim)
            tokens = self.patch_embed.num_patches
            if self.use_double_cls_token:
                self.cls_token_head = nn.Parameter(torch.zeros(1, 1, embed_dim))
                self.cls_token_tail = nn.Parameter(torch.zeros(1, 1, embed_dim))
            elif self.if_cls_token:
                self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            if self.if_abs_pos_embed:
                self.pos_embed = nn.Parameter(torch.zeros(1, tokens + self.num_tokens, embed_dim))
                self.pos_drop = nn.Dropout(drop_rate)
            name, value = ("if_devide_out", True) if if_divide_out is None else ("if_divide_out", if_divide_out)
            mixer = {name: value, "bimamba_type": bimamba_type, "init_layer_scale": init_layer_scale}
            kind = RMSNorm if rms_norm else nn.LayerNorm
            build_common(
                self, depth, embed_dim, num_classes, drop_path_rate, lambda: kind(embed_dim, eps=norm_epsilon),
                d_state=d_state, **mixer, **(ssm_cfg or {}),
            )  # fmt: skip

        def forward_features(
            self, x, inference_params=None, if_random_cls_token_position=False, if_random_token_rank=False
        ):
            needs_cuda()

        def forward(
            self, x, return_features=False, inference_params=None, if_random_cls_token_position=False,
            if_random_token_rank=False,
        ):  # fmt: skip
            needs_cuda()

    return VisionMamba()


def videomamba(
    img_size: Any = 64, patch_size: int = 8, stride: int = 8, depth: int = 2, embed_dim: int = 48, channels: int = 3,
    num_classes: int = 10, norm_epsilon: float = 1e-5, drop_rate: float = 0.0, drop_path_rate: float = 0.0,
    num_frames: int | None = None, kernel_size: int = 1, fc_drop_rate: float = 0.0, bimamba: bool = True,
    ssm_cfg: dict[str, Any] | None = None,
) -> nn.Module:  # fmt: skip
    """An object of a class like VideoMamba's, for images or, with ``num_frames``, for videos."""

    class VisionMamba(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if num_frames is None:
                self.patch_embed = PatchEmbed(img_size, patch_size, stride, channels, embed_dim)
            else:
                self.patch_embed = TubeletEmbed(img_size, patch_size, kernel_size, channels, embed_dim)
                self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, num_frames // kernel_size, embed_dim))
                self.head_drop = nn.Dropout(fc_drop_rate) if fc_drop_rate > 0 else nn.Identity()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
            self.pos_drop = nn.Dropout(drop_rate)
            build_common(
                self, depth, embed_dim, num_classes, drop_path_rate, lambda: RMSNorm(embed_dim, eps=norm_epsilon),
                bimamba=bimamba, **(ssm_cfg or {}),
            )  # fmt: skip

        def forward_features(self, x, inference_params=None):
            needs_cuda()

        def forward(self, x, inference_params=None):
            needs_cuda()

    return VisionMamba()


def mambavision(
    dim: int = 8, in_dim: int = 8, depths: Any = (1, 1, 4, 3), window_size: Any = (8, 8, 3, 3),
    num_heads: Any = (1, 1, 2, 2), mlp_ratio: float = 4, num_classes: int = 5, channels: int = 3,
    drop_path_rate: float = 0.0, drop_rate: float = 0.0, layer_scale: float | None = None, eps: float = 1e-5,
) -> nn.Module:  # fmt: skip
    """An object of a class like MambaVision's."""

    class ConvBlock(nn.Module):
        def __init__(self, width: int, drop_path: float) -> None:
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width, eps=eps)
            self.conv2, self.norm2 = nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width, eps=eps)
            self.act1, self.layer_scale = nn.GELU(approximate="tanh"), False
            self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    class MambaVisionMixer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            inner, self.dt_rank = width // 2, math.ceil(width / 16)
            self.A_log, self.D = nn.Parameter(torch.zeros(inner, 8)), nn.Parameter(torch.ones(inner))
            self.in_proj, self.out_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
            self.x_proj, self.dt_proj = nn.Linear(inner, self.dt_rank + 16, bias=False), nn.Linear(self.dt_rank, inner)
            for name in ("conv1d_x", "conv1d_z"):
                self.add_module(name, nn.Conv1d(inner, inner, 3, groups=inner, bias=False))

        def forward(self, hidden_states):
            needs_cuda()

    class Attention(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.num_heads, self.scale = heads, (width // heads) ** -0.5
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
            self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(drop_rate)

    class Layer(nn.Module):
        def __init__(self, width: int, heads: int, scans: bool, drop_path: float) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
            self.mixer = MambaVisionMixer(width) if scans else Attention(width, heads)
            self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
            self.mlp = nn.Module()
            self.mlp.fc1, self.mlp.fc2 = (
                nn.Linear(width, int(width * mlp_ratio)),
                nn.Linear(int(width * mlp_ratio), width),
            )
            self.mlp.act, self.mlp.drop1, self.mlp.norm = nn.GELU(), nn.Dropout(drop_rate), nn.Identity()
            self.gamma_1 = self.gamma_2 = 1
            if layer_scale is not None:
                self.gamma_1, self.gamma_2 = (nn.Parameter(layer_scale * torch.ones(width)) for _ in range(2))

    class MambaVision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_classes = num_classes
            stem: list[nn.Module] = []
            for width, wider in ((channels, in_dim), (in_dim, dim)):
                stem += [nn.Conv2d(width, wider, 3, 2, 1, bias=False), nn.BatchNorm2d(wider, eps=1e-4), nn.ReLU()]
            self.patch_embed = nn.Module()
            self.patch_embed.proj, self.patch_embed.conv_down = nn.Identity(), nn.Sequential(*stem)
            self.levels, rates = nn.ModuleList(), iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
            for i, depth in enumerate(depths):
                level, width = nn.Module(), dim * 2**i
                scans = [number < (depth + 1) // 2 for number in range(depth)]
                level.conv, level.transformer_block, level.window_size = i < 2, i >= 2, window_size[i]
                level.blocks = nn.ModuleList(
                    ConvBlock(width, next(rates)) if i < 2 else Layer(width, num_heads[i], scan, next(rates))
                    for scan in scans
                )
                level.downsample = None
                if i < 3:
                    level.downsample = nn.Module()
                    level.downsample.reduction = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False))
                self.levels.append(level)
            self.norm, self.avgpool = nn.BatchNorm2d(8 * dim, eps=eps), nn.AdaptiveAvgPool2d(1)
            self.head = nn.Linear(8 * dim, num_classes) if num_classes else nn.Identity()

        def forward_features(self, x):
            needs_cuda()

        def forward(self, x):
            needs_cuda()

    return MambaVision()


def mambareg(
    img_size: Any = 64, patch_size: int = 8, depth: int = 2, embed_dim: int = 48, channels: int = 3,
    num_classes: int = 10, norm_epsilon: float = 1e-5, rms_norm: bool = True, drop_rate: float = 0.0,
    drop_path_rate: float = 0.0, num_cls_tokens: int = 4, cls_reduce: int = 2, biscan: bool = True,
    ssm_cfg: dict[str, Any] | None = None,
) -> nn.Module:  # fmt: skip
    """An object of a class like Mamba-Reg's."""

    class VisionMamba(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_cls_tokens, self.cls_reduce = num_cls_tokens, cls_reduce
            self.patch_embed = PatchEmbed(img_size, patch_size, patch_size, channels, embed_dim)
            patches = self.patch_embed.num_patches
            self.cls_token = nn.Parameter(torch.zeros(1, num_cls_tokens, embed_dim))
            self.pos_embed_cls = nn.Parameter(torch.zeros(1, num_cls_tokens, embed_dim))
            self.pos_embed = nn.Parameter(torch.zeros(1, patches, embed_dim))
            self.pos_drop = nn.Dropout(drop_rate)
            each = patches // (num_cls_tokens + 1)
            places = [*range(patches), *((i + 1) * each - 0.5 for i in range(num_cls_tokens))]
            self.token_idx = torch.tensor(places).argsort(stable=True)
            self.cls_positions = (torch.arange(num_cls_tokens) + 1) * (each + 1) - 1
            kind = RMSNorm if rms_norm else nn.LayerNorm
            width = num_cls_tokens * embed_dim // cls_reduce
            build_common(
                self, depth, embed_dim, num_classes, drop_path_rate, lambda: kind(embed_dim, eps=norm_epsilon),
                biscan=biscan, **(ssm_cfg or {}),
            )  # fmt: skip
            if cls_reduce > 1:
                self.neck = nn.Linear(embed_dim, embed_dim // cls_reduce, bias=False)
                self.norm_neck = kind(width, eps=norm_epsilon)
            self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()

        def forward_features(self, x, inference_params=None):
            needs_cuda()

        def forward(self, x, return_features=False, inference_params=None):
            needs_cuda()

    return VisionMamba()


class Linear2d(nn.Linear):
    def forward(self, x):
        needs_cuda()


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        needs_cuda()


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = (
            Linear2d(width, hidden),
            act(),
            Linear2d(hidden, width),
            nn.Dropout(0.0),
        )

    def forward(self, x):
        needs_cuda()


class SS2D(nn.Module):
    def __init__(self, width: int, d_state: int, ratio: float, **attributes: Any) -> None:
        super().__init__()
        inner, rank = int(ratio * width), math.ceil(width / 16)
        self.disable_z, self.disable_z_act, self.oact, self.with_dconv = True, False, False, True
        scan_mode = attributes.pop("scan_mode", "cross2d")
        for name, value in attributes.items():
            setattr(self, name, value)
        self.forward_core = partial(self.forward_corev2, force_fp32=False, no_einsum=True, scan_mode=scan_mode)
        self.forward = self.forwardv2
        self.out_norm = LayerNorm2d(inner)
        self.in_proj, self.out_proj = Linear2d(width, inner, bias=False), Linear2d(inner, width, bias=False)
        self.act, self.out_act, self.dropout = nn.SiLU(), nn.Identity(), nn.Identity()
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.x_proj_weight = nn.Parameter(torch.zeros(4, rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.zeros(4, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.zeros(4, inner))
        self.A_logs, self.Ds = nn.Parameter(torch.zeros(4 * inner, d_state)), nn.Parameter(torch.ones(4 * inner))

    def forward_corev2(self, x, force_fp32=False, no_einsum=False, scan_mode="cross2d"):
        needs_cuda()

    def forwardv2(self, x, **kwargs):
        needs_cuda()


class VSSBlock(nn.Module):
    def __init__(
        self, width: int, d_state: int, ratio: float, mlp_ratio: float, act: Any, rate: float, **op: Any
    ) -> None:
        super().__init__()
        self.ssm_branch, self.mlp_branch, self.post_norm, self.use_checkpoint = True, True, False, False
        self.norm, self.norm2 = LayerNorm2d(width), LayerNorm2d(width)
        self.op, self.drop_path = SS2D(width, d_state, ratio, **op), DropPath(rate)
        self.mlp = Mlp(width, int(mlp_ratio * width), act)

    def forward(self, x):
        needs_cuda()


def vssm(
    dims: int = 12, depths: Any = (1, 1, 2, 1), ssm_d_state: int = 1, ssm_ratio: float = 1.0, mlp_ratio: float = 4.0,
    in_chans: int = 3, num_classes: int = 10, drop_path_rate: float = 0.0, mlp_act: type[nn.Module] = nn.GELU,
    posembed: bool = False, op: dict[str, Any] | None = None, **_: Any,
) -> nn.Module:  # fmt: skip
    """An object of a class like that of VMamba's authors, of the kind ``v05_noz``."""

    class VSSM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.channel_first, self.num_layers, self.num_classes = True, len(depths), num_classes
            self.dims = [dims * 2**i for i in range(len(depths))]
            self.pos_embed = nn.Parameter(torch.zeros(1, dims, 4, 4)) if posembed else None
            self.patch_embed = nn.Sequential(
                nn.Conv2d(in_chans, dims // 2, 3, 2, 1), nn.Identity(), LayerNorm2d(dims // 2), nn.Identity(),
                nn.GELU(), nn.Conv2d(dims // 2, dims, 3, 2, 1), nn.Identity(), LayerNorm2d(dims),
            )  # fmt: skip
            rates = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
            self.layers = nn.ModuleList()
            for width, depth in zip(self.dims, depths, strict=True):
                settings = width, ssm_d_state, ssm_ratio, mlp_ratio, mlp_act
                blocks = nn.Sequential(*(VSSBlock(*settings, next(rates), **(op or {})) for _ in range(depth)))
                down: nn.Module = nn.Identity()
                if width != self.dims[-1]:
                    conv = nn.Conv2d(width, 2 * width, 3, 2, 1)
                    down = nn.Sequential(nn.Identity(), conv, nn.Identity(), LayerNorm2d(2 * width))
                self.layers.append(nn.Sequential(OrderedDict(blocks=blocks, downsample=down)))
            head = nn.Linear(self.dims[-1], num_classes)
            parts = {"permute": nn.Identity(), "avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(1)}
            self.classifier = nn.Sequential(OrderedDict(norm=LayerNorm2d(self.dims[-1]), **parts, head=head))

        def forward(self, x):
            needs_cuda()

    return VSSM()


def plainmamba(
    img_size: Any = 64, in_channels: int = 3, patch_size: int = 8, embed_dims: int = 32, num_layers: int = 3,
    num_convs_patch_embed: int = 1, drop_rate: float = 0.0, drop_path_rate: float = 0.0,
    layers_with_dwconv: Any = (0,), out_indices: Any = None, final_norm: bool = True, d_state: int = 4,
    expand: int = 2, conv_size: int = 7, bias: bool = True, init_layer_scale: float | None = None, eps: float = 1e-6,
    corner: str = "corner",
) -> nn.Module:  # fmt: skip
    """An object of a class like PlainMamba's, a backbone without a classifier."""

    def convolution(channels: int, kernel: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels, 64, kernel, stride, kernel // 2, bias=False)
        return [conv, nn.BatchNorm2d(64), nn.ReLU(True)]

    class AdaptivePadding(nn.Module):
        padding = corner

        def forward(self, x):
            needs_cuda()

    class ConvPatchEmbed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.init_input_size = (img_size, img_size) if isinstance(img_size, int) else img_size
            self.init_out_size = tuple(side // patch_size for side in self.init_input_size)
            self.stem, self.convs, self.norm = nn.Sequential(*convolution(in_channels, 7, 2)), None, None
            if num_convs_patch_embed:
                convs = (convolution(64, 3, 1) for _ in range(num_convs_patch_embed))
                self.convs = nn.Sequential(*(module for conv in convs for module in conv))
            self.adaptive_padding = AdaptivePadding()
            self.projection = nn.Conv2d(64, embed_dims, patch_size // 2, patch_size // 2)

        def forward(self, x):
            needs_cuda()

    class PlainMamba2D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.d_model, self.d_state, self.expand, self.d_inner = embed_dims, d_state, expand, expand * embed_dims
            self.dt_rank, self.init_layer_scale = math.ceil(embed_dims / 16), init_layer_scale
            if init_layer_scale is not None:
                self.gamma = nn.Parameter(torch.ones(embed_dims))
            inner, self.act = self.d_inner, nn.SiLU()
            self.in_proj, self.out_proj = nn.Linear(embed_dims, 2 * inner, bias), nn.Linear(inner, embed_dims, bias)
            self.conv2d = nn.Conv2d(inner, inner, conv_size, padding=conv_size // 2, groups=inner)
            self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False)
            self.dt_proj = nn.Linear(self.dt_rank, inner)
            self.A_log, self.D = nn.Parameter(torch.zeros(inner, d_state)), nn.Parameter(torch.ones(inner))
            self.direction_Bs = nn.Parameter(torch.zeros(5, d_state))

        def forward(self, x, hw_shape):
            needs_cuda()

    class PlainMambaLayer(nn.Module):
        def __init__(self, with_dwconv: bool, drop_path: float) -> None:
            super().__init__()
            self.norm, self.mamba, self.with_dwconv = nn.LayerNorm(embed_dims), PlainMamba2D(), with_dwconv
            if with_dwconv:
                conv = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims, bias=False)
                self.dw = nn.Sequential(conv, nn.BatchNorm2d(embed_dims), nn.GELU())
            self.drop_path = DropPath(drop_path)

        def forward(self, x, hw_shape):
            needs_cuda()

    class PlainMamba(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.with_pos_embed, self.final_norm, self.interpolate_mode = True, final_norm, "bicubic"
            self.patch_embed = ConvPatchEmbed()
            self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.patch_embed.init_out_size), embed_dims))
            self.drop_after_pos = nn.Dropout(drop_rate)
            self.out_indices = [num_layers - 1] if out_indices is None else out_indices
            rates = torch.linspace(0, drop_path_rate, num_layers).tolist()
            self.layers = nn.ModuleList(
                PlainMambaLayer(number in layers_with_dwconv, rate) for number, rate in enumerate(rates)
            )
            self.ln1 = nn.LayerNorm(embed_dims, eps=eps)

        def forward(self, x):
            needs_cuda()

    return PlainMamba()


KINDS = {
    "vim_official": vim,
    "vim_official_stride8": vim,
    "videomamba_image_official": videomamba,
    "videomamba_video_official": videomamba,
    "mambavision_official": mambavision,
    "mambareg_official": mambareg,
}
"""By the golden file whose parameters fit."""


def golden_object(file: str, **changes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """An object with the parameters of a golden file in evaluation mode, and the file's tensors."""
    with safe_open(GOLDEN / f"{file}.safetensors", framework="pt") as golden:
        metadata = golden.metadata().items()
        arguments = {key: json.loads(value) for key, value in metadata if key not in ("notes", "upstream")}
        tensors = {key: golden.get_tensor(key) for key in golden.keys()}  # noqa: SIM118
    model = KINDS[file](**{**arguments, **changes}).eval()
    state = {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}
    model.load_state_dict(state, strict=True)
    return model, tensors
