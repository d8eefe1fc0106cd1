"""Faster and Mask R-CNN on the one map of a plain backbone, or on the four of a hierarchical one.

The parts of the two-stage detectors are torchvision's. Sources: Ren et al., "Faster R-CNN", arXiv 1506.01497; He et
al., "Mask R-CNN", arXiv 1703.06870; the pyramid: Li et al., "Exploring plain vision transformer backbones for object
detection" (ViTDet), arXiv 2203.16527; that of a hierarchical one: Lin et al., "Feature Pyramid Networks for Object
Detection", arXiv 1612.03144.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from mtr_lab.backbones import convolutional_levels, remove_head
from mtr_lab.errors import UserError, unknown
from mtr_lab.reduction import check_restoration
from mtr_lab.tasks.features import FeatureMaps

STRIDES = (4, 8, 16, 32)
PROPOSALS = {"training": 600, "testing": 300}
"""Regions of an image that the second stage classifies."""
BOX_NMS, SCORE = 0.5, 0.01
"""IoU threshold of the non-maximum suppression, and the lowest score of a detection."""


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's pyramid: one map (B, C, H/s, W/s) to maps (B, width, H/4, W/4), … H/8, H/16, H/32, by stride.

    Args:
        channels: C.
        stride: s, pixels between the map's cells: 4, 8, 16 or 32.
        width: channels of the result.

    Raises:
        UserError: another stride.
    """

    def __init__(self, channels: int, stride: int, width: int) -> None:
        super().__init__()
        if stride not in STRIDES:
            raise UserError(f"the patches are {stride} pixels apart: a feature pyramid needs one of {STRIDES}.")
        self.levels = nn.ModuleDict()
        for target in STRIDES:
            layers: list[nn.Module] = []
            inner = channels
            for step in range(round(math.log2(max(stride / target, 1)))):
                layers += [LayerNorm2d(inner), nn.GELU()] if step else []
                layers.append(nn.ConvTranspose2d(inner, inner // 2, 2, 2))
                inner //= 2
            layers += [nn.MaxPool2d(2) for _ in range(round(math.log2(max(target / stride, 1))))]
            layers += [nn.Conv2d(inner, width, 1, bias=False), LayerNorm2d(width)]
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width)]
            self.levels[str(target)] = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {stride: level(features) for stride, level in self.levels.items()}


class FeaturePyramid(nn.Module):
    """The feature pyramid network: four maps (B, C, H/s, W/s), normalised first, to maps (B, width, …) by stride."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(map(LayerNorm2d, channels))
        self.network = FeaturePyramidNetwork(list(channels), width, norm_layer=LayerNorm2d)

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        normed = (norm(level) for norm, level in zip(self.norms, maps, strict=True))
        pyramid: dict[str, Tensor] = self.network(dict(zip(map(str, STRIDES), normed, strict=True)))
        return pyramid


class DetectionHead(nn.Module):
    """Feature pyramid, region proposal network and the second stage: boxes and classes, with ``masks`` masks too.

    Args:
        channels, stride: of the feature map; a sequence of each for maps at the strides of ``STRIDES``.
        num_classes: without the background, which is label 0 here.
        anchors: the sides of the anchors in pixels, a list for every stride of ``STRIDES``.
        ratios: height / width of the anchors; every side is combined with every ratio.
        masks: Mask R-CNN instead of Faster R-CNN.
        width: channels of the pyramid.
        hidden: width of the second stage's fully connected layer.
    """

    def __init__(
        self,
        channels: int | Sequence[int],
        stride: int | Sequence[int],
        num_classes: int,
        *,
        anchors: Sequence[Sequence[float]],
        ratios: Sequence[float],
        masks: bool = False,
        width: int = 256,
        hidden: int = 1024,
    ) -> None:
        super().__init__()
        if len(anchors) != len(STRIDES):
            raise UserError(f"{len(anchors)} lists of anchors: give one for each of the strides {STRIDES}.")
        self.num_classes, self.masks = num_classes, masks
        if isinstance(channels, int) and isinstance(stride, int):
            self.levels = [(channels, stride)]
            self.pyramid: nn.Module = SimpleFeaturePyramid(channels, stride, width)
        elif not isinstance(channels, int) and not isinstance(stride, int) and tuple(stride) == STRIDES:
            self.levels = list(zip(channels, stride, strict=True))
            self.pyramid = FeaturePyramid(channels, width)
        else:
            raise UserError(f"maps of {channels} channels at strides {stride}: expected the strides {STRIDES}, or one.")
        generator = AnchorGenerator(tuple(map(tuple, anchors)), (tuple(ratios),) * len(anchors))
        counts = set(generator.num_anchors_per_location())
        if len(counts) > 1:
            raise UserError(f"anchors={anchors}: give every stride the same number of sizes.")
        self.rpn = RegionProposalNetwork(
            generator,
            RPNHead(width, counts.pop()),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 1000, "testing": 500},
            post_nms_top_n=PROPOSALS,
            nms_thresh=0.7,
        )
        levels = list(map(str, STRIDES))
        mask_parts = {}
        if masks:
            mask_parts = {
                "mask_roi_pool": MultiScaleRoIAlign(levels, 14, 2),
                "mask_head": MaskRCNNHeads(width, (width,) * 4, 1, LayerNorm2d),
                "mask_predictor": MaskRCNNPredictor(width, width, num_classes + 1),
            }
        self.roi_heads = RoIHeads(
            MultiScaleRoIAlign(levels, 7, 2),
            FastRCNNConvFCHead((width, 7, 7), [width, width], [hidden], LayerNorm2d),
            FastRCNNPredictor(hidden, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=256,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=SCORE,
            nms_thresh=BOX_NMS,
            detections_per_img=100,
            **mask_parts,
        )

    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        images: Tensor,
        sizes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections in evaluation mode, losses in training mode.

        Args:
            features: (B, C, H/s, W/s), or a list of four.
            images: (B, 3, H, W); only their shape is read.
            sizes: (height, width) of every image, which is at the top left of its (H, W).
            targets: in training mode, for every image ``boxes`` (n, 4), left, top, right, bottom in pixels, ``labels``
                (n,) int64 from 1, and of Mask R-CNN ``masks`` (n, H, W) uint8.

        Returns:
            In evaluation mode for every image ``boxes`` (m, 4), ``scores`` (m,), ``labels`` (m,), and ``masks``
            (m, 1, 28, 28) within the box; in training mode the losses by name. The other one is empty.
        """
        pyramid = self.pyramid(features)
        # Autocast ends here: boxes in bfloat16 would be whole pixels off.
        with torch.autocast(images.device.type, enabled=False):
            pyramid = {stride: level.float() for stride, level in pyramid.items()}
            proposals, first = self.rpn(ImageList(images, sizes), pyramid, targets)
            detections, second = self.roi_heads(pyramid, proposals, sizes, targets)
        return detections, {**first, **second}

    def flops(self, height: int, width: int) -> int:
        """True FLOPs for one image of that size, with the maximum number of regions, without masks."""
        counter = FlopCounterMode(display=False)
        weight = next(self.parameters())
        maps = [weight.new_zeros(1, channels, height // s, width // s) for channels, s in self.levels]
        with torch.no_grad(), counter:
            pyramid = self.pyramid(maps[0] if len(maps) == 1 else maps)
            self.rpn.head(list(pyramid.values()))
            regions = weight.new_zeros(PROPOSALS["testing"], pyramid["4"].shape[1], 7, 7)
            self.roi_heads.box_predictor(self.roi_heads.box_head(regions))
        return counter.get_total_flops()


class Detector(nn.Module):
    """A backbone and a detection head on its last map; the parameters are ``backbone.*`` and ``head.*``.

    The head of a hierarchical backbone is on four maps, at the strides of ``STRIDES``.

    Args:
        backbone: its classification head is removed.
        num_classes: without the background.
        restoration: of reduced tokens, one of ``mtr_lab.reduction.RESTORATIONS``.
        settings: the other arguments of :class:`DetectionHead`.

    Raises:
        UserError: an unknown or impossible setting.
    """

    def __init__(self, backbone: Any, num_classes: int, *, restoration: str = "nearest", **settings: Any) -> None:
        super().__init__()
        check_restoration(restoration)
        known = inspect.signature(DetectionHead).parameters
        for name in settings:
            if name not in known:
                raise unknown("setting task.", name, ["restoration", *list(known)[3:]])
        remove_head(backbone)
        self.backbone, self.restoration = backbone, restoration
        levels = [*convolutional_levels(backbone), *((stage.width, stage.stride) for stage in backbone.stages)]
        widths, strides = zip(*levels, strict=True)
        self.is_pyramid = strides == STRIDES
        if self.is_pyramid:
            backbone.final_norm.requires_grad_(False)  # unused: the head normalises each map
        channels, stride = (widths, strides) if self.is_pyramid else levels[-1]
        self.head = DetectionHead(channels, stride, num_classes, **settings)

    def features(self, images: Tensor) -> Tensor | list[Tensor]:
        """The tokens after the last block, restored and normalised: (B, 3, H, W) -> (B, C, H/s, W/s).

        Of a hierarchical backbone, the maps of its four levels.
        """
        if self.is_pyramid:
            maps: list[Tensor] = FeatureMaps(self.backbone, len(STRIDES), self.restoration)(images)
            return maps
        (last,) = FeatureMaps(self.backbone, levels=1, restoration=self.restoration)(images)
        normed, _ = self.backbone.final_norm(last.flatten(2).transpose(1, 2))
        return normed.transpose(1, 2).unflatten(2, last.shape[2:])

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The losses by name, of a training batch of ``DetectionDataModule``."""
        targets = [{**objects, "labels": objects["labels"] + 1} for objects in batch["objects"]]
        return self.head(self.features(batch["image"]), batch["image"], batch["size"], targets)[1]

    def detect(self, batch: Mapping[str, Any], features: Tensor | Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """For every image ``boxes`` (m, 4) in its pixels, ``scores``, ``labels`` from 0, and ``masks`` of Mask R-CNN.

        Args:
            batch: as ``DetectionDataModule`` has it for evaluation.
            features: of its images, see :meth:`features`.
        """
        detections, _ = self.head(features, batch["image"], batch["size"])
        return [
            {**to_original(detection, size, original), "labels": detection["labels"] - 1}
            for detection, size, original in zip(detections, batch["size"], batch["original_size"], strict=True)
        ]


def to_original(detection: dict[str, Tensor], size: tuple[int, int], original: tuple[int, int]) -> dict[str, Tensor]:
    """A detection in the pixels of the original image, masks as (m, height, width) bool.

    Args:
        detection: an output of ``DetectionHead``.
        size, original: (height, width) of the resized image in the model's input, and of the original image.
    """
    vertical, horizontal = original[0] / size[0], original[1] / size[1]
    boxes = detection["boxes"] * detection["boxes"].new_tensor([horizontal, vertical, horizontal, vertical])
    resized = {**detection, "boxes": boxes}
    if "masks" in detection:
        resized["masks"] = paste_masks_in_image(detection["masks"], boxes, original)[:, 0] > 0.5
    return resized
