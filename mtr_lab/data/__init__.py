"""Images in, batches out: datasets, class names and their mapping to a model's outputs."""

from mtr_lab.data.classes import imagenet_classes, map_classes
from mtr_lab.data.datamodule import ImageDataModule

__all__ = ["ImageDataModule", "imagenet_classes", "map_classes"]
