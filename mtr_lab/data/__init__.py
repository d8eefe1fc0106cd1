"""Datasets and their batches: images, annotated images and videos; class names and model outputs."""

from mtr_lab.data.classes import imagenet_classes, map_classes
from mtr_lab.data.classification.datamodule import ImageDataModule
from mtr_lab.data.detection.datamodule import DetectionDataModule
from mtr_lab.data.segmentation.datamodule import SegmentationDataModule
from mtr_lab.data.video.datamodule import VideoDataModule

__all__ = [
    "DetectionDataModule",
    "ImageDataModule",
    "SegmentationDataModule",
    "VideoDataModule",
    "imagenet_classes",
    "map_classes",
]
