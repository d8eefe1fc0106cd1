"""VMamba: a pyramid of four stages; each block scans its grid along four paths, then has an MLP.

Between stages a convolution of stride 2 halves the grid, so a stage of which tokens were removed is restored at its
end; the last one is pooled by the sizes of its tokens instead.

Source: Liu et al., "VMamba: Visual State Space Model", arXiv 2401.10166; code and weights MzeroMiko/VMamba (MIT), of
which the published models are ``forward_type="v05_noz"``. State-dict names are the authors'.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mtr_lab.backbones.adaptation import resize_channels
from mtr_lab.backbones.costs import Costs
from mtr_lab.backbones.factory import build
from mtr_lab.backbones.foreign import recognises
from mtr_lab.backbones.initialisation import initialise_vmamba
from mtr_lab.backbones.keywords import HARMLESS, Keyword, only
from mtr_lab.backbones.norms import LayerNorm, LayerNorm2d
from mtr_lab.backbones.patch_embed import check_images, for_convolutions, height_and_width
from mtr_lab.backbones.pretrained import complete
from mtr_lab.backbones.ss2d import VSSBlock
from mtr_lab.backbones.stage import Stage
from mtr_lab.backbones.timm_pyramid import TimmPyramid
from mtr_lab.backbones.vmamba_objects import read_arguments
from mtr_lab.errors import UserError, check_number
from mtr_lab.tokens import Layout, TokenState, restore
from mtr_lab.tokens.pooling import mean_by_size

STRIDE = 4  # pixels between the tokens of the first stage


class VMamba(TimmPyramid):
    """VMamba classifier for images of any size.

    Args:
        img_size: pixels of a side, or (height, width), of the model's own images.
        dims: width of the first stage, which doubles from stage to stage; or the width of each stage.
        depths: number of blocks of each stage.
        ssm_ratio: inner width of a mixer, divided by the width of its stage.
        ssm_d_state: N, states a channel.
        mlp_ratio: inner width of an MLP, divided by the width of its stage.
        channels: of the input image.
        num_classes: 0 for no head.
        drop_path_rate: stochastic depth of the last block while training; it falls linearly to 0 at the first one.
        drop_rate: dropout before the head while training.
        global_pool: ``avg`` or ``""``, see ``mtr_lab.backbones.timm_pyramid.POOLINGS``.
        use_checkpoint: compute activations again in the backward pass, as ``set_grad_checkpointing``.

    Raises:
        UserError: an impossible geometry, or an unknown pooling.
    """

    stands_for: ClassVar[Mapping[str, str]] = {"forward": "forward"}
    """By the names of methods of the authors' class: our methods that compute the same."""
    equivalents: ClassVar[Mapping[str, type]] = {
        "Linear2d": nn.Linear,
        **dict.fromkeys(("GELU", "Permute", "AdaptiveAvgPool2d", "Flatten"), nn.Identity),
    }
    """By the names of classes of modules of the authors' objects: those whose modules stand in their place here."""
    sets_forward = ("op",)
    """Modules of the authors' objects whose class sets ``forward`` on the object."""
    restoration = "skip"
    """How a stage is restored at its end where tokens were merged; where some were dropped, by ``nearest``."""
    keywords: ClassVar[Mapping[str, Keyword]] = {
        "patch_size": only(4, otherwise="the stem has a stride other than 4 pixels"),
        "forward_type": only("v05_noz", otherwise="the mixers have a gate, or other precisions"),
        "ssm_dt_rank": only("auto", otherwise="Δ has a rank other than a sixteenth of the width"),
        "ssm_act_layer": only("silu", otherwise="the mixers have an activation other than SiLU"),
        "ssm_conv": only(3, otherwise="the convolutions over the grid have a width other than 3"),
        "ssm_conv_bias": only(False, otherwise="the convolutions over the grid have a bias"),
        "mlp_act_layer": only("gelu", otherwise="the MLPs have an activation other than GELU"),
        "gmlp": only(False, otherwise="the MLPs have a gate"),
        "patch_norm": only(True, otherwise="the stem has no norms"),
        "norm_layer": only("ln", "ln2d", otherwise="the norms are batch norms"),
        "downsample_version": only("v3", otherwise="the stages are joined by patch merging"),
        "patchembed_version": only("v2", otherwise="the stem is a single convolution"),
        "posembed": only(False, otherwise="there are position embeddings"),
        "ssm_drop_rate": only(0, 0.0, otherwise="the mixers drop some of their output while training"),
        "mlp_drop_rate": only(0, 0.0, otherwise="the MLPs drop some of their activations while training"),
        **dict.fromkeys(("ssm_init", "imgsize"), HARMLESS),
    }

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        dims: int | tuple[int, ...] = 96,
        depths: tuple[int, ...] = (2, 2, 8, 2),
        ssm_ratio: float = 1.0,
        ssm_d_state: int = 1,
        mlp_ratio: float = 4.0,
        channels: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.dims = tuple(dims * 2**i for i in range(len(depths))) if isinstance(dims, int) else tuple(dims)
        self._check_geometry(depths, ssm_ratio, mlp_ratio)
        self.img_size, self.in_chans = height_and_width(img_size), channels
        self.num_features = self.head_hidden_size = self.dims[-1]
        first = self.dims[0]
        self.patch_embed = nn.Sequential(
            nn.Conv2d(channels, first // 2, 3, 2, 1),
            nn.Identity(),
            LayerNorm2d(first // 2),
            nn.Identity(),
            nn.GELU(),
            nn.Conv2d(first // 2, first, 3, 2, 1),
            nn.Identity(),
            LayerNorm2d(first),
        )
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.layers = nn.ModuleList()
        for dim, depth, wider in zip(self.dims, depths, (*self.dims[1:], None), strict=True):
            blocks = [VSSBlock(dim, ssm_d_state, ssm_ratio, mlp_ratio, next(rates)) for _ in range(depth)]
            down: nn.Module = nn.Identity()
            if wider is not None:
                down = nn.Sequential(nn.Identity(), nn.Conv2d(dim, wider, 3, 2, 1), nn.Identity(), LayerNorm2d(wider))
            self.layers.append(nn.ModuleDict({"blocks": nn.ModuleList(blocks), "downsample": down}))
        self.classifier = nn.ModuleDict({"norm": LayerNorm(self.dims[-1])})
        self.head_drop = nn.Dropout(drop_rate) if drop_rate > 0 else nn.Identity()
        self.set_grad_checkpointing(use_checkpoint)
        self.pretrained_cfg = self.default_cfg = {}
        self.reset_classifier(num_classes, global_pool)
        initialise_vmamba(self)

    def _check_geometry(self, depths: Sequence[int], ssm_ratio: float, mlp_ratio: float) -> None:
        if not depths or len(self.dims) != len(depths):
            raise UserError(f"dims={self.dims} and depths={tuple(depths)}: expected one of each per stage.")
        if self.dims[0] < 2:
            raise UserError(f"dims={self.dims}: the stem has half the width of the first stage, expected 2 or more.")
        for name, ratio in (("ssm_ratio", ssm_ratio), ("mlp_ratio", mlp_ratio)):
            check_number(name, ratio, float, 1 / min(self.dims))

    @property
    def stages(self) -> list[Stage]:
        """A stage for each of ``layers``."""
        return [
            Stage(list(layer["blocks"]), dim, STRIDE * 2**i, STRIDE * 2**i)  # type: ignore[index]
            for i, (layer, dim) in enumerate(zip(self.layers, self.dims, strict=False))
        ]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, H, W) of one image."""
        return (self.in_chans, *self.img_size)

    @property
    def final_norm(self) -> nn.Module:  # type: ignore[override]
        """The norm before the head."""
        return self.classifier["norm"]

    def layouts(self, img_size: Sequence[int] | None = None) -> list[Layout]:
        """The tokens of each stage; any size fits, as convolutions pad the sides."""
        height, width = img_size or self.img_size
        layouts = [Layout(-(-height // STRIDE), -(-width // STRIDE))]
        for stage in range(1, len(self.layers)):
            layouts.append(self.layout_after(stage, layouts[-1]))
        return layouts

    def layout_after(self, stage: int, layout: Layout) -> Layout:
        """The tokens of a stage when those of the stage before it form the grid ``layout`` at its end."""
        return Layout(-(-layout.rows // 2), -(-layout.columns // 2))

    def costs(self, layouts: Sequence[Layout]) -> Costs:
        """The costs of stem, downsampling and head; of the stem as for sides that are multiples of 4 pixels."""
        stem = 4 * _weights(self.patch_embed[0]) + _weights(self.patch_embed[5])
        downs = [_weights(layer["downsample"][1]) for layer in self.layers[: len(layouts) - 1]]  # type: ignore[index]
        products = sum(n * layout.patches for n, layout in zip([stem, *downs], layouts, strict=True))
        return Costs.products(products + self.dims[-1] * self.num_classes)

    def check(self, images: Tensor) -> None:
        """Raise a ``UserError`` unless shape and dtype are those of images."""
        check_images(images, self.in_chans, self.patch_embed[0])

    def embed(self, images: Tensor) -> TokenState:
        """Images (B, channels, H, W) to the state before the first block."""
        self.check(images)
        return _start(self.patch_embed(for_convolutions(images)))

    def enter(self, stage: int, state: TokenState) -> TokenState:
        """The state before the first block of a stage: the map of the stage before it, downsampled.

        A reduction that leaves a full grid is not undone: the next stage is smaller, too.
        """
        whole = state.current_layout
        if whole is not None:
            maps = state.stream.transpose(1, 2).unflatten(2, whole.grid)
        else:
            assert state.layout is not None
            maps = restore(state, state.layout.grid, "nearest" if state.offset is None else self.restoration)
        return _start(self.layers[stage - 1]["downsample"](maps.to(state.raw_hidden.dtype)))  # type: ignore[index]

    def classify(self, state: TokenState) -> Tensor:
        """The state after the last block -> logits (B, num_classes); without pooling, of each token."""
        tokens = self.normalise(state)
        return self.forward_head(mean_by_size(tokens, state) if self.global_pool == "avg" else tokens)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> logits (B, num_classes); without pooling, of each token, (B, L, num_classes)."""
        return self.classify(self.forward_state(images))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.classifier["head"]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained head, none for 0 classes; and another pooling, unless ``global_pool`` is ``None``.

        Raises:
            UserError: an unknown pooling.
        """
        if global_pool is not None:
            self.check_pooling(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        head = nn.Linear(self.dims[-1], num_classes) if num_classes > 0 else nn.Identity()
        weight = self.patch_embed[0].weight
        self.classifier["head"] = head.to(weight.device, weight.dtype)  # type: ignore[arg-type]
        if self.pretrained_cfg.get("num_classes", num_classes) != num_classes:
            self.pretrained_cfg |= {"num_classes": num_classes, "label_names": None}

    def remove_norm(self) -> None:
        self.classifier["norm"] = nn.Identity()

    def copy_settings(self, model: Any) -> None:
        """Take the numbers that are attributes of an object of the authors' class: ε of each norm."""
        for theirs, ours in zip(_norms(model, model.classifier.norm), _norms(self, self.final_norm), strict=True):
            if ours.eps != theirs.eps:
                ours.eps = theirs.eps

    def no_weight_decay(self) -> set[str]:
        """Parameters that are exempt from weight decay, besides biases and norms."""
        return {name for name, _ in self.named_parameters() if name.endswith(("A_logs", "Ds", "dt_projs_bias"))}

    def fit_weights(self, state: dict[str, Tensor], grid: Sequence[int] | None, label: str) -> bool:
        """Adapt weights of another number of channels to the model's, in place; no weight depends on the grid.

        Returns:
            Whether the weights are for other channels.
        """
        kernel = state.get("patch_embed.0.weight")
        if kernel is None or kernel.ndim < 2 or kernel.shape[1] in (0, self.in_chans):
            return False
        state["patch_embed.0.weight"] = resize_channels(kernel, self.in_chans)
        return True


def _norms(model: Any, final_norm: Any) -> Iterator[Any]:
    """The norms of a model of ours, or of an object of the authors' class."""
    yield from (model.patch_embed[2], model.patch_embed[7], final_norm)
    for layer in model.layers:
        parts = dict(layer.named_children())
        yield from list(parts["downsample"].children())[3:]
        for block in parts["blocks"]:
            yield from (block.norm, block.norm2, block.op.out_norm)


def _weights(convolution: Any) -> int:
    return int(convolution.weight.numel())


def _start(maps: Tensor) -> TokenState:
    """Maps (B, C, rows, columns) -> the state of a stage that starts with them."""
    layout = Layout(maps.shape[2], maps.shape[3])
    return TokenState.start(maps.flatten(2).transpose(1, 2), (), layout)


RELEASE = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/"


def _release(file: str, top1: float, gflops: float) -> dict[str, Any]:
    """The authors' weights; their accuracy and GFLOPs by the README of their repository."""
    figures = {"published_top1": top1, "published_gflops": gflops}
    return {"url": f"{RELEASE}{file}.pth", "license": "mit", **figures}


CONFIGS = complete(
    {
        "vmamba_t.in1k": _release("vssm1_tiny_0230s_ckpt_epoch_264", 0.826, 4.9),
        "vmamba_s.in1k": _release("vssm_small_0229_ckpt_epoch_222", 0.836, 8.7),
        "vmamba_b.in1k": _release("vssm_base_0229_ckpt_epoch_237", 0.839, 15.4),
    },
    first_conv="patch_embed.0",
    classifier="classifier.head",
)


def vmamba_t(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T (s1l8), 30 M parameters; the authors state 4.9 GFLOPs at 224²."""
    geometry = {"dims": 96, "depths": (2, 2, 8, 2), "ssm_ratio": 1.0}
    return build(VMamba, CONFIGS["vmamba_t"], pretrained, geometry, kwargs)


def vmamba_s(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S (s2l15), 50 M parameters; the authors state 8.7 GFLOPs at 224²."""
    geometry = {"dims": 96, "depths": (2, 2, 15, 2), "ssm_ratio": 2.0}
    return build(VMamba, CONFIGS["vmamba_s"], pretrained, geometry, kwargs)


def vmamba_b(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B (s2l15), 89 M parameters; the authors state 15.4 GFLOPs at 224²."""
    geometry = {"dims": 128, "depths": (2, 2, 15, 2), "ssm_ratio": 2.0}
    return build(VMamba, CONFIGS["vmamba_b"], pretrained, geometry, kwargs)


@recognises("VMamba")
def read_object(model: Any) -> nn.Module | None:
    """An object of the authors' class -> our model that computes the same, without weights; see ``foreign.Reader``."""
    arguments = read_arguments(model, VMamba.stands_for)
    if arguments is None:
        return None
    ours = build(VMamba, CONFIGS["vmamba_t"], False, {}, arguments)
    ours.copy_settings(model)
    return ours
