"""Turn images and videos into patch tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtr_lab import ops
from mtr_lab.backbones.plain import as_built, is_plain, is_untouched
from mtr_lab.errors import UserError


class PatchEmbed(nn.Module):
    """A convolution that turns an image into a row-major sequence of patch tokens; patches may overlap.

    A video becomes a concatenation of ``frames`` = ``num_frames`` / ``kernel_size`` such sequences; a patch spans
    ``kernel_size`` frames.

    Raises:
        UserError: the image or video does not fit the patch grid.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        stride: int,
        in_chans: int,
        embed_dim: int,
        num_frames: int | None = None,
        kernel_size: int = 1,
    ) -> None:
        super().__init__()
        if (num_frames or 1) % kernel_size:
            raise UserError(f"kernel_size={kernel_size} does not divide num_frames={num_frames}: give a multiple.")
        self.img_size, self.patch_size, self.stride, self.in_chans = img_size, patch_size, stride, in_chans
        self.num_frames, self.frames = num_frames, (num_frames or 1) // kernel_size
        self.grid_size = self.grid(*img_size)
        proj: nn.Conv2d | nn.Conv3d
        if num_frames is None:
            proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride)
        else:
            sizes, strides = (kernel_size, patch_size, patch_size), (kernel_size, stride, stride)
            proj = nn.Conv3d(in_chans, embed_dim, sizes, strides)
        self.proj: Any = as_built(proj)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(in_chans, H, W) of an image or (in_chans, T, H, W) of a video of the model's own size."""
        frames = () if self.num_frames is None else (self.num_frames,)
        return (self.in_chans, *frames, *self.img_size)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image of ``height`` × ``width`` pixels."""
        for name, pixels in (("height", height), ("width", width)):
            if pixels < self.patch_size or (pixels - self.patch_size) % self.stride:
                low = max(pixels - self.patch_size, 0) // self.stride * self.stride + self.patch_size
                raise UserError(
                    f"image {name} {pixels} does not fit patches of {self.patch_size} at stride {self.stride}: "
                    f"resize to {low} or {low + self.stride}."
                )
        rows, columns = ((pixels - self.patch_size) // self.stride + 1 for pixels in (height, width))
        return rows, columns

    @property
    def tiles(self) -> bool:
        """Whether the patches tile an image: no overlap, no video."""
        return self.num_frames is None and self.stride == self.patch_size

    @property
    def can_fuse(self) -> bool:
        """Whether the projection's parameters may be used directly: patches tile, and no hook or adapter is set."""
        return self.tiles and is_untouched(self) and is_plain(self.proj)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in images (B, in_chans, H, W), or in videos (B, in_chans, t, H, W) of any length.

        A policy may shorten videos to ``t`` frames, a multiple of ``kernel_size``.
        """
        frames = None if self.num_frames is None or images.ndim != 5 else images.shape[2]
        check_images(images, self.in_chans, self.proj, frames or self.num_frames)
        return self.grid(*images.shape[-2:])

    def frames_of(self, length: int) -> int:
        """The frames of the token grid of a video with ``length`` frames."""
        kernel_size = (self.num_frames or 1) // self.frames
        if length < kernel_size or length % kernel_size:
            raise UserError(f"a video of {length} frames does not fit patches of {kernel_size}: give a multiple.")
        return length // kernel_size

    def check(self, images: Tensor) -> None:
        """Raise a ``UserError`` unless shape and dtype are those of images (or videos); values are not checked."""
        check_images(images, self.in_chans, self.proj, self.num_frames)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> tokens (B, rows · columns, C).

        Videos (B, in_chans, T, H, W) -> tokens (B, frames · rows · columns, C), frame by frame.
        """
        self.grid_of(images)  # raises an error if the images do not fit
        if self.tiles and is_plain(self.proj):
            return ops.project_patches(images, self.proj.weight, self.proj.bias)
        if self.num_frames == self.frames and self.stride == self.patch_size and is_plain(self.proj):
            frames = images.transpose(1, 2).flatten(0, 1)
            tokens = ops.project_patches(frames, self.proj.weight.squeeze(2), self.proj.bias)
            return tokens.unflatten(0, (-1, images.shape[2])).flatten(1, 2)
        return self.proj(images).flatten(2).transpose(1, 2)


def check_images(images: Tensor, channels: int, convolution: nn.Module, num_frames: int | None = None) -> None:
    """Raise a ``UserError`` unless shape and dtype are those of images (or videos); values are not checked.

    Args:
        images: what a model got.
        channels: of the model's images.
        convolution: the one that reads the images, in the dtype of the model.
        num_frames: of the model's videos; ``None`` for images.
    """
    what = "images (B, channels, H, W)" if num_frames is None else "videos (B, channels, T, H, W)"
    if isinstance(images, torch.fx.Proxy):
        raise UserError("torch.fx cannot trace the model symbolically: use torch.export or torch.compile.")
    if not isinstance(images, Tensor):
        raise UserError(
            f"expected {what} as a tensor, got {type(images).__qualname__}: make a batch of it, "
            "timm.data.create_transform(**timm.data.resolve_model_data_config(model))(image)[None]."
        )
    shape, dimensions = tuple(images.shape), 4 if num_frames is None else 5
    if images.ndim != dimensions:
        missing = ": add the dimension of the batch, images[None]" if images.ndim == dimensions - 1 else ""
        raise UserError(f"expected {what}, got shape {shape}{missing}.")
    if images.shape[1] != channels:
        last = images.shape[-1] == channels
        advice = "move the channels, images.movedim(-1, 1)" if last else f"create it with in_chans={shape[1]}"
        raise UserError(f"expected {what} of the model's {channels} channels, got shape {shape}: {advice}.")
    if num_frames is not None and images.shape[2] != num_frames:
        raise UserError(
            f"expected videos of {num_frames} frames (B, channels, T, H, W), got shape {shape}: "
            f"create the model with num_frames={shape[2]}."
        )
    if not images.is_floating_point():
        raise UserError(
            f"expected {what} of floating-point numbers, got {images.dtype}: scale them to 0 … 1 and normalise "
            "them, as timm.data.create_transform does."
        )
    weight = getattr(convolution, "weight", None)
    dtype = weight.dtype if isinstance(weight, Tensor) else images.dtype  # an adapter or a quantised layer
    if images.dtype != dtype and not _autocasts(images.device.type):
        raise UserError(
            f"expected {what} in the model's {dtype}, got {images.dtype}: convert them, "
            f"images.to({dtype}), or call the model inside torch.autocast."
        )


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def for_convolutions(images: Tensor) -> Tensor:
    """Images (B, C, H, W), channels-last if in half precision on a GPU, where cuDNN's convolutions are faster."""
    half = images.is_cuda and images.dtype in (torch.float16, torch.bfloat16)
    return images.contiguous(memory_format=torch.channels_last) if half else images


def height_and_width(img_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of an image whose size is one number for both sides, or (height, width)."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return height, width


def evenly(available: int, wanted: int) -> list[int]:
    """The frames that stand for a video when few are wanted: the middle one of each of as many equal parts."""
    return [(2 * i + 1) * available // (2 * wanted) for i in range(wanted)]
