"""Pictures of a policy's effect on an image or a video: surviving tokens, merged regions, scores."""

from mtr_lab.pictures.clips import clip_pages, clip_policies, clip_sheet, save_clip
from mtr_lab.pictures.detection import MIN_SCORE, Boxes, detection_sheet
from mtr_lab.pictures.marks import Sheet
from mtr_lab.pictures.observation import BlockView, Observation, observe
from mtr_lab.pictures.page import save_picture
from mtr_lab.pictures.segmentation import segmentation_sheet
from mtr_lab.pictures.sheets import (
    check_blocks,
    depth_frames,
    depth_sheet,
    policy_strip,
    save_depth,
    write_animation,
)

__all__ = [
    "MIN_SCORE",
    "BlockView",
    "Boxes",
    "Observation",
    "Sheet",
    "check_blocks",
    "clip_pages",
    "clip_policies",
    "clip_sheet",
    "depth_frames",
    "depth_sheet",
    "detection_sheet",
    "observe",
    "policy_strip",
    "save_clip",
    "save_depth",
    "save_picture",
    "segmentation_sheet",
    "write_animation",
]
