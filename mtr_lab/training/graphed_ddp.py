"""Data-parallel training of a model whose gradients come all at once, as those of a CUDA graph do."""

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor

GRAPHED_DDP = "graphed_ddp"
"""Lightning's name of the strategy."""


class GraphedDDP(DDPStrategy):
    """Averages all gradients in one message after the backward pass.

    ``DistributedDataParallel`` sends gradients while earlier layers compute theirs. A CUDA graph yields all of them at
    its end, where ``DistributedDataParallel`` would copy each twice and hand it from stream to stream.
    """

    def configure_ddp(self) -> None:
        """Start every process from rank 0's weights, and leave the module unwrapped."""
        assert self.model is not None
        for value in self.model.state_dict().values():
            dist.broadcast(value, src=0)

    def post_backward(self, closure_loss: Tensor) -> None:
        assert self.model is not None
        average([parameter.grad for parameter in self.model.parameters() if parameter.grad is not None])


StrategyRegistry.register(GRAPHED_DDP, GraphedDDP)


def average(gradients: list[Tensor]) -> None:
    """Replace tensors of one dtype by their mean over all processes."""
    mean = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    parts = mean.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(of) for part, of in zip(parts, gradients, strict=True)])
