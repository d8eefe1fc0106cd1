"""Images to patch tokens, and position embeddings for any grid."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtr_lab.errors import UserError


class PatchEmbed(nn.Module):
    """Convolution that turns an image into a row-major sequence of patch tokens; patches may overlap.

    Raises:
        UserError: the image does not fit the patch grid.
    """

    def __init__(self, img_size: tuple[int, int], patch_size: int, stride: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size, self.stride = patch_size, stride
        self.grid_size = self.grid(*img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride)

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

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, in_chans, H, W) -> tokens (B, rows · columns, C) and (rows, columns)."""
        if images.ndim != 4:
            raise UserError(f"expected images (B, channels, H, W), got shape {tuple(images.shape)}.")
        grid = self.grid(*images.shape[-2:])
        return self.proj(images).flatten(2).transpose(1, 2), grid


def resize_positions(
    embedding: Tensor, class_position: int, old: tuple[int, int], new_class_position: int, new: tuple[int, int]
) -> Tensor:
    """Interpolate position embeddings to another grid, bicubic with antialiasing.

    Args:
        embedding: (1, 1 + old rows · columns, C); the class token's entry, at ``class_position``, is not interpolated.
        old, new: (rows, columns).
        new_class_position: where the class token's entry goes in the result.

    Returns:
        (1, 1 + new rows · columns, C).
    """
    class_entry = embedding[:, class_position : class_position + 1]
    patches = torch.cat([embedding[:, :class_position], embedding[:, class_position + 1 :]], dim=1)
    image = patches.float().unflatten(1, old).permute(0, 3, 1, 2)  # (1, C, old rows, old columns)
    image = F.interpolate(image, size=new, mode="bicubic", antialias=True)
    patches = image.flatten(2).transpose(1, 2).to(embedding.dtype)
    return torch.cat([patches[:, :new_class_position], class_entry, patches[:, new_class_position:]], dim=1)
