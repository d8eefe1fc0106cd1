"""Feature maps of a backbone: its tokens at several depths, restored to the grid of patches."""

from itertools import accumulate

from torch import Tensor, nn

from mtr_lab.backbones import Backbone, blocks_of, convolutional_levels, first_state, run
from mtr_lab.errors import UserError
from mtr_lab.tokens import check_restoration, fit_grid, restore


class FeatureMaps(nn.Module):
    """The residual stream after several blocks, restored to the grid: a pyramid where the backbone is one.

        maps = FeatureMaps(mtr_lab.create_model("vim_s", pretrained=True))(images)

    The maps are those at the end of the last stages, convolutional ones included, if there are as many stages as maps,
    else those of blocks that are evenly spread over the depth. The backbone may be patched at any time, before or
    after; unpatched, the maps are the streams themselves.

    Args:
        backbone: any model of this library for images; its head and last norm are not used.
        levels: the number of maps.
        restoration: one of ``mtr_lab.reduction.RESTORATIONS``.

    Raises:
        UserError: an unknown restoration, a model of videos, or one with fewer blocks than levels.
    """

    def __init__(self, backbone: Backbone, levels: int = 4, restoration: str = "nearest") -> None:
        super().__init__()
        check_restoration(restoration)
        depth = len(blocks_of(backbone))
        if len(backbone.input_shape) != 3:
            raise UserError(
                "feature maps need a model that takes images: leave num_frames out (backbone.num_frames=null)."
            )
        convolutional = convolutional_levels(backbone)
        is_pyramid = 1 < levels <= len(convolutional) + len(backbone.stages)
        if depth < levels and not is_pyramid:
            raise UserError(
                f"{levels} feature maps need at least {levels} blocks, the backbone has {depth}: raise backbone.depth."
            )
        self.backbone = backbone
        self.restoration = restoration
        ends = list(accumulate(len(stage.blocks) for stage in backbone.stages))
        evenly = [(i + 1) * depth // levels - 1 for i in range(levels)]
        self.depths = [end - 1 for end in ends[-levels:]] if is_pyramid else evenly
        """The blocks after which a map is taken, from 0."""
        self._first = convolutional[len(self.depths) - levels :] if len(self.depths) < levels else ()
        stages = [stage for stage in backbone.stages for _ in stage.blocks]
        self._stages = [number for number, stage in enumerate(backbone.stages) for _ in stage.blocks]
        self.channels = [*(width for width, _ in self._first), *(stages[depth].width for depth in self.depths)]
        """Channels of the maps."""
        self.strides = [*(stride for _, stride in self._first), *(stages[depth].stride for depth in self.depths)]
        """Pixels between the cells of the maps."""

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> maps (B, C, rows, columns) in float32, from the first depth to the last.

        Rows and columns are those of the patches: H / stride and W / stride where patches do not overlap. Those of a
        picture that the policy resizes are interpolated to the same grid, on which the heads were trained.
        """
        grids = [layout.image_grid for layout in self.backbone.layouts(images.shape[-2:])]
        skips = self.restoration == "skip"
        first: list[Tensor] = []
        state = first_state(self.backbone, images, traced=True, tracking_offset=skips, maps=first)
        maps = [map.float() for map in first[len(first) - len(self._first) :]]
        for i, (_, after) in enumerate(run(self.backbone, state)):
            if i in self.depths:
                layout = after.layout
                assert layout is not None
                restored = layout.join(restore(after, layout.grid, self.restoration))
                maps.append(fit_grid(restored, grids[self._stages[i]]))
        return maps
