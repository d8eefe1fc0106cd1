"""Pictures of what a policy does to an image: surviving tokens, merge regions, scores."""

from mtr_lab.pictures.observe import BlockView, Observation, observe
from mtr_lab.pictures.sheets import (
    check_blocks,
    depth_frames,
    depth_sheet,
    policy_strip,
    save_depth,
    save_picture,
    write_animation,
)

__all__ = [
    "BlockView",
    "Observation",
    "check_blocks",
    "depth_frames",
    "depth_sheet",
    "observe",
    "policy_strip",
    "save_depth",
    "save_picture",
    "write_animation",
]
