"""UPerNet on the maps of a plain backbone at four depths.

The decoder is segmentation-models-pytorch's. Sources: Xiao et al., "Unified perceptual parsing for scene
understanding" (UPerNet), arXiv 1807.10221; maps of a plain backbone at four depths, resampled to four strides: Bao et
al., "BEiT", arXiv 2106.08254.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mtr_lab.backbones import remove_head
from mtr_lab.errors import UserError, check_number
from mtr_lab.tasks.features import FeatureMaps

STRIDES = (4, 8, 16, 32)


class SegmentationHead(nn.Module):
    """Four maps (B, C, H/s, W/s), from shallow to deep, to logits (B, K, H/4, W/4).

    Args:
        channels: C of each map.
        strides: s of each map, pixels between its cells: 4, 8, 16 or 32.
        num_classes: K.
        width: channels of the decoder.

    Raises:
        UserError: another stride.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], num_classes: int, width: int) -> None:
        super().__init__()
        for stride in strides:
            if stride not in STRIDES:
                raise UserError(f"the patches are {stride} pixels apart: a segmentation head needs one of {STRIDES}.")
        check_number("task.width", width, int, 1)
        self.channels, self.strides, self.num_classes = tuple(channels), tuple(strides), num_classes
        levels = zip(channels, strides, STRIDES, strict=True)
        self.resample = nn.ModuleList(_resampling(*level) for level in levels)
        # The decoder expects five maps and ignores the two finest.
        self.decoder = UPerNetDecoder([0, 0, *channels], len(STRIDES) + 1, width)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(width, num_classes, 1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = [resample(level) for resample, level in zip(self.resample, maps, strict=True)]
        return self.classify(self.decoder([levels[0], levels[0], *levels]))

    def flops(self, height: int, width: int) -> int:
        """True FLOPs on the maps of one image of that size."""
        weight = next(self.parameters())
        levels = zip(self.channels, self.strides, strict=True)
        maps = [weight.new_zeros(1, channels, height // stride, width // stride) for channels, stride in levels]
        training = self.training
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.eval()(maps)
        self.train(training)
        return counter.get_total_flops()


class Segmenter(nn.Module):
    """A backbone and a segmentation head; the parameters are ``backbone.*`` and ``head.*``.

    Args:
        backbone: of at least four blocks; its classification head is removed.
        num_classes: of the pixels.
        width: channels of the decoder.
        restoration: of reduced tokens, one of ``mtr_lab.reduction.RESTORATIONS``.

    Raises:
        UserError: an impossible setting.
    """

    def __init__(self, backbone: Any, num_classes: int, *, width: int = 96, restoration: str = "nearest") -> None:
        super().__init__()
        maps = FeatureMaps(backbone, len(STRIDES), restoration)
        remove_head(backbone)
        backbone.final_norm.requires_grad_(False)  # unused: the maps are taken before it
        self.backbone, self.restoration = backbone, restoration
        self.head = SegmentationHead(maps.channels, maps.strides, num_classes, width)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, K, H, W) in float32."""
        maps = FeatureMaps(self.backbone, len(STRIDES), self.restoration)(images)
        return F.interpolate(self.head(maps).float(), images.shape[-2:], mode="bilinear")


def classify_pixels(logits: Tensor, batch: Mapping[str, Any]) -> list[Tensor]:
    """The class of every pixel of every image, (height, width) int64, in the size of its labels.

    Args:
        logits: (N, K, H, W) of the N windows of a batch.
        batch: an evaluation batch of ``SegmentationDataModule``.
    """
    parts = logits.split([len(places) for places in batch["windows"]])
    images = zip(parts, batch["windows"], batch["size"], batch["label"], strict=True)
    return [
        F.interpolate(join_windows(windows, places, size)[None], labels.shape[-2:], mode="bilinear")[0].argmax(0)
        for windows, places, size, labels in images
    ]


def join_windows(logits: Tensor, places: Sequence[tuple[int, int]], size: tuple[int, int]) -> Tensor:
    """Windows (n, K, H, W) at ``places`` (top, left) to one map (K, height, width), the mean where they overlap."""
    height, width = logits.shape[-2:]
    whole = [max(top for top, _ in places) + height, max(left for _, left in places) + width]
    total, count = logits.new_zeros(logits.shape[1], *whole), logits.new_zeros(whole)
    for window, (top, left) in zip(logits, places, strict=True):
        total[:, top : top + height, left : left + width] += window
        count[top : top + height, left : left + width] += 1
    return (total / count)[:, : size[0], : size[1]]


def _resampling(channels: int, stride: int, target: int) -> nn.Sequential:
    """Layers that bring a map of one stride to another, by factors of two."""
    halvings = round(math.log2(max(target / stride, 1)))
    layers: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True) for _ in range(halvings)]
    for step in range(round(math.log2(max(stride / target, 1)))):
        layers += [LayerNorm2d(channels), nn.GELU()] if step else []
        layers.append(nn.ConvTranspose2d(channels, channels, 2, 2))
    return nn.Sequential(*layers)
