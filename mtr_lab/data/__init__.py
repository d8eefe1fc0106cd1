"""Datasets and their batches: classification, detection and segmentation; class names and model outputs."""

from mtr_lab.data.classes import imagenet_classes, map_classes
from mtr_lab.data.classification.datamodule import ImageDataModule
from mtr_lab.data.detection.datamodule import DetectionDataModule
from mtr_lab.data.segmentation.datamodule import SegmentationDataModule

__all__ = ["DetectionDataModule", "ImageDataModule", "SegmentationDataModule", "imagenet_classes", "map_classes"]
