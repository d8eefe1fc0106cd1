"""The tokens after a plan in Triton: index, size and special positions if the plan brings none, and their source."""

import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.occupancy import on_its_device


@triton.jit(do_not_specialize=["length", "num_removed", "specials"])
def _update_metadata(index, size, special, dest, keep, removed, new_index, new_size, new_special,
                     length, num_removed, specials, M: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """A program for each image."""
    image = tl.program_id(0).to(tl.int64)
    first, kept = image * length, length - num_removed
    j = tl.arange(0, M)
    mask = j < kept
    i = tl.load(keep + image * kept + j, mask, 0)
    tl.store(new_index + image * kept + j, tl.load(index + first + i, mask, 0), mask)
    total = tl.load(size + first + i, mask, 0)
    for k in range(num_removed):
        other = tl.load(removed + image * num_removed + k)
        total += tl.where(j == tl.load(dest + first + other), tl.load(size + first + other), 0)
    tl.store(new_size + image * kept + j, total, mask)
    s = tl.arange(0, S)
    place = tl.load(special + image * specials + s, s < specials, 0)
    tl.store(new_special + image * specials + s, tl.load(dest + first + place, s < specials, 0), s < specials)


@on_its_device
def update_metadata(
    index: Tensor, size: Tensor, special: Tensor, dest: Tensor, keep: Tensor, removed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract of ``mtr_lab.ops.update_metadata``, on a GPU."""
    images, length = index.shape
    kept = keep.shape[1]
    new_index, new_size, new_special = (
        index.new_empty(images, kept),
        size.new_empty(images, kept),
        special.new_empty(special.shape),
    )
    _update_metadata[(images,)](
        *(t.contiguous() for t in (index, size, special, dest, keep, removed)), new_index, new_size, new_special,
        length, length - kept, special.shape[1], M=triton.next_power_of_2(kept),
        S=triton.next_power_of_2(max(special.shape[1], 1)), num_warps=4,
    )  # fmt: skip
    return new_index, new_size, new_special


@triton.jit(do_not_specialize=["length", "positions"])
def _follow(dest, source, followed, length, positions, P: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * P + tl.arange(0, P)
    token = tl.load(source + image * positions + p, p < positions, -1)
    tl.store(followed + image * positions + p, tl.load(dest + image * length + token, token >= 0, -1), p < positions)


@on_its_device
def follow(dest: Tensor, source: Tensor) -> Tensor:
    """The contract of ``mtr_lab.ops.follow``, on a GPU."""
    images, positions = source.shape
    followed = source.new_empty(images, positions)
    block = 256
    _follow[images, triton.cdiv(positions, block)](
        dest.contiguous(), source.contiguous(), followed, dest.shape[1], positions, P=block, num_warps=2,
    )  # fmt: skip
    return followed
