"""Video classification data for Lightning: training, held-out and evaluation videos of one dataset."""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtr_lab.data.batches import Collate, ImageLoader
from mtr_lab.data.classes import map_classes, name_classes
from mtr_lab.data.classification.cache import CachedImages
from mtr_lab.data.classification.images import Preparation
from mtr_lab.data.folders import find_root
from mtr_lab.data.images import Entry
from mtr_lab.data.splits import SplitDataModule
from mtr_lab.data.video.augmentation import clip_augmentation
from mtr_lab.data.video.device_clips import ClipLoader, DeviceClips
from mtr_lab.data.video.motion import MotionSource
from mtr_lab.data.video.sampling import Sampling
from mtr_lab.data.video.sources import LAYOUT, open_videos
from mtr_lab.data.video.videos import AugmentedVideos, Videos, VideoSource, Views
from mtr_lab.errors import UserError, unknown

SOURCES = ("files", "motion")


class VideoDataModule(SplitDataModule[Any]):
    """Videos from class folders, CSV lists, or generated.

    A batch has ``image`` (B, views, 3, T, H, W) uint8 for evaluation and (B, 3, T, H, W) float32 for training. See
    :class:`~mtr_lab.data.video.sampling.Sampling` for the views of a video; their outputs are averaged.

    Args:
        data_config: timm's ``input_size``, ``mean`` and ``std``.
        num_frames: T, of the model.
        root: directory with ``val.csv`` or ``val/<class>/<video>``, for training also ``train``;
            ``pkg://package/path`` is a directory in an installed package.
        source: ``files``, or ``motion``: generated clips, see :mod:`~mtr_lab.data.video.motion`.
        count: how many clips of each split to generate: (training, evaluation).
        classes: names of labels 0, 1, 2 … where a list has numbers alone.
        frame_stride, clips, crops: see ``Sampling``.
        cache: directory for decoded evaluation videos, see :class:`~mtr_lab.data.classification.cache.CachedImages`.
        train_cache: ``"device"`` decodes the training videos once a run, their middle clip, and keeps them on the
            device, which augments them.
        model_classes, num_classes: of the model, as in ``ImageDataModule``.
        train_transform: options of :class:`~mtr_lab.data.video.augmentation.ClipAugmentation`.
        split: the other options of :class:`~mtr_lab.data.splits.SplitDataModule`.

    Raises:
        UserError: an option is invalid, or does not fit the videos.
    """

    _collate: Collate

    def __init__(
        self,
        *,
        data_config: Mapping[str, Any],
        num_frames: int,
        root: str | None = None,
        source: str = "files",
        count: Sequence[int] = (10_000, 1_000),
        classes: Sequence[str] | None = None,
        frame_stride: int | None = None,
        clips: int = 1,
        crops: int = 1,
        batch_size: int = 16,
        cache: str | None = None,
        train_cache: str | None = None,
        model_classes: Sequence[str] | None = None,
        num_classes: int | None = None,
        train_transform: Mapping[str, Any] | None = None,
        **split: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **split)
        if source not in SOURCES:
            raise unknown("dataset.source", source, SOURCES)
        if train_cache not in (None, "device"):
            raise unknown("dataset.train_cache", str(train_cache), ["device", "null"])
        channels, height, width = data_config["input_size"]
        self._root, self._source, self._count = None if root is None else str(root), source, count
        self._sampling = Sampling(num_frames, (height, width), frame_stride, clips, crops)
        self._one_clip = Sampling(num_frames, (height, width), frame_stride)
        self._shape = (channels, num_frames, height, width)
        self._collate = Collate((self._sampling.views, *self._shape))  # type: ignore[arg-type]
        self._mean, self._std = data_config["mean"], data_config["std"]
        self._augmentation = clip_augmentation((height, width), train_transform or {})
        self._cache = None if cache is None else Path(os.path.expanduser(str(cache)))
        self._train_cache = train_cache
        self._classes = classes
        self._test_classes = name_classes(self._test_source.classes, classes)
        self.class_names = model_classes or self._test_classes
        if num_classes is None:
            num_classes = len(self.class_names) if self.class_names is not None else self._highest_label() + 1
        self.num_classes = num_classes
        self.num_images = self._test_source.num_images
        self._test_labels = map_classes(self._test_classes, model_classes, num_classes)

    def normalise(self, clips: Tensor) -> Tensor:
        """Clips (…, 3, T, H, W), uint8 -> float32, normalised as the model expects, on their device."""
        return self._standardise(clips.float().div_(255))

    def _standardise(self, clips: Tensor) -> Tensor:
        """The same of clips from 0 to 1."""
        mean, std = (torch.tensor(values, device=clips.device).view(3, 1, 1, 1) for values in (self._mean, self._std))
        return (clips - mean) / std

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Lightning's hook: normalise clips on the device, in the trainer's precision."""
        if batch["image"].dtype == torch.uint8:
            assert self.trainer is not None
            batch["image"] = self.trainer.precision_plugin.convert_input(self.normalise(batch["image"]))
        return batch

    def train_dataloader(self) -> ImageLoader | ClipLoader:  # type: ignore[override]
        """As in :class:`SplitDataModule`."""
        if self._train_cache is None:
            return super().train_dataloader()
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        indices = self._training_indices(held_out=False)
        videos = self._videos(self._train_source, self._train_labels, self._one_clip)
        kept = DeviceClips(videos, indices, self._shape, device, self._num_workers, self.name)
        sampler = self._training_sampler(range(len(kept)))
        return ClipLoader(kept, self._augmentation, self._standardise, sampler, self._seed)

    def calibration_images(self, count: int) -> Tensor:
        """As in :class:`SplitDataModule`: the first view of each video, (count, 3, T, H, W), normalised."""
        return self.normalise(super().calibration_images(count)[:, 0])

    def _open(self, split: str, training: bool) -> VideoSource:
        if self._source == "motion":
            return MotionSource(split, self._count[0 if split == "train" else 1])
        if not self._root:
            raise UserError(f"dataset {self.name!r} needs a directory of videos: set dataset.root=DIR. {LAYOUT}")
        return open_videos(find_root(self.name, self._root, of_classes=False), split, self._on_error)

    def _training_images(self, augmented: bool) -> Dataset[Entry]:
        videos = self._videos(self._train_source, self._train_labels, self._one_clip)
        return AugmentedVideos(videos, self._one_clip, self._augment) if augmented else videos

    def _augment(self, clips: Tensor) -> Tensor:
        return self._standardise(self._augmentation(clips))

    def _evaluation_images(self) -> Dataset[Entry]:
        return self._test_videos

    @cached_property
    def _test_videos(self) -> Dataset[Entry]:
        videos: Any = self._videos(self._test_source, self._test_labels, self._sampling)
        if self._cache is None:
            return videos
        return CachedImages(videos, self._collate.input_size, self._cache, self.name, self._num_workers)

    def _videos(self, source: VideoSource, label_map: Sequence[int] | None, sampling: Sampling) -> Videos:
        prepare = Preparation(Views.of(sampling), label_map, self.num_classes, self._on_error)  # type: ignore[arg-type]
        return Videos(source, prepare, sampling)

    @cached_property
    def _train_labels(self) -> list[int] | None:
        classes = name_classes(self._train_source.classes, self._classes)
        if self.class_names is self._test_classes and set(classes or ()) != set(self._test_classes or ()):
            only_one = sorted(set(classes or ()) ^ set(self._test_classes or ()))
            raise UserError(
                f"{self._train_source.location} and {self._test_source.location} differ in the classes "
                f"{', '.join(only_one)}: give both the same."
            )
        return map_classes(classes, self.class_names, self.num_classes)

    def _highest_label(self) -> int:
        """Of a list with numbers alone."""
        return max(self._test_source.label(index) for index in range(len(self._test_source)))
