"""Images in, batches out: datasets, class names and their mapping to a model's outputs."""

from mtr_lab.data.classes import imagenet_classes, map_classes
from mtr_lab.data.datamodule import ImageDataModule
from mtr_lab.data.detection import DetectionDataModule

__all__ = ["DetectionDataModule", "ImageDataModule", "imagenet_classes", "map_classes"]
