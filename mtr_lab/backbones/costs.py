"""The costs of a part of a model for one image, in both conventions of counting FLOPs."""

from dataclasses import dataclass

from torch import nn

from mtr_lab import ops


@dataclass(frozen=True)
class Costs:
    """Operation counts, without normalisations and activations."""

    flops: int = 0
    """True FLOPs, 2 for a multiply-accumulate."""
    literature: int = 0
    """FLOPs as papers count them, 1 for a multiply-accumulate."""
    exponentials: int = 0
    """Of exp(Δ A)."""

    @classmethod
    def products(cls, multiply_accumulates: int) -> "Costs":
        """The costs of matrix products or convolutions."""
        return cls(2 * multiply_accumulates, multiply_accumulates)

    def repeating(self, directions: int) -> "Costs":
        """The costs of a mixer that scans tokens in that many directions, with ``repeats`` as in ``selective_scan``."""
        more = ops.REPEAT_FLOPS * self.exponentials
        return Costs(self.flops + more, self.literature + more // max(directions, 1), 2 * self.exponentials)

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(
            self.flops + other.flops,
            self.literature + other.literature,
            self.exponentials + other.exponentials,
        )

    def __mul__(self, times: int) -> "Costs":
        return Costs(times * self.flops, times * self.literature, times * self.exponentials)


def linear_costs(module: nn.Module, tokens: int) -> Costs:
    """The costs of all linear layers in a module, for one call of each with that many tokens."""
    weights = (layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
    return Costs.products(tokens * sum(weights))
