"""The keywords of the authors' constructors that are not arguments of ours: which of their values a family represents.

Objects of the authors' classes have attributes of the same names, to which the same tables apply.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mtr_lab.errors import UserError


@dataclass(frozen=True)
class Keyword:
    """A keyword of the authors' constructor, or an attribute of their objects."""

    fits: Callable[[Any], bool]
    """Whether our model computes the same as theirs with this value."""
    otherwise: str = ""
    """What theirs does with other values, a sentence without its full stop."""
    argument: str | None = None
    """The argument of our constructor with another name, to which the value goes."""

    def check(self, what: str, value: Any, advice: str) -> None:
        """Raise a ``UserError`` about ``what``, with the advice, unless the value is represented."""
        try:
            fits = bool(self.fits(value))
        except (TypeError, ValueError, RuntimeError):  # of another type, for instance an array
            fits = False
        if not fits:
            raise UserError(f"{what} is not represented: {self.otherwise}. {advice}.")


HARMLESS = Keyword(lambda value: True)
"""With given weights, the output in float32 evaluation does not depend on it."""


def only(*values: Any, otherwise: str) -> Keyword:
    """A keyword of which these values alone are represented."""
    return Keyword(lambda value: value in values, otherwise)


def named(argument: str) -> Keyword:
    """A keyword whose value goes to the argument of our constructor with this name."""
    return Keyword(lambda value: True, argument=argument)


NESTED = ("ssm_cfg", "layer_cfgs", "mamba_cfg")
"""Keywords whose value is a dict of more keywords: of the blocks, or of their mixers."""

MIXER: Mapping[str, Keyword] = {
    "d_conv": only(4, otherwise="the causal convolutions have another width"),
    "expand": only(2, otherwise="the mixers have another inner width"),
    "dt_rank": only("auto", None, otherwise="Δ has a rank other than a sixteenth of the width"),
    "bias": only(False, otherwise="in_proj and out_proj have a bias"),
    "conv_bias": only(True, otherwise="the causal convolutions have no bias"),
    "use_fast_path": only(True, otherwise="the authors' slow path scans forward only"),
    **dict.fromkeys(("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "layer_idx"), HARMLESS),
}
"""Of the authors' mixer, that is of ``ssm_cfg``."""

MODEL: Mapping[str, Keyword] = {
    "rms_norm": only(True, otherwise="the norms are layer norms"),
    **dict.fromkeys(("fused_add_norm", "residual_in_fp32", "initializer_cfg"), HARMLESS),
}
"""Of the constructors of Vim and VideoMamba."""


def translate(name: str, keywords: Mapping[str, Keyword], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of our constructor, out of those of the authors'.

    Args:
        name: of the model, for errors.
        keywords: those that are not arguments of ours; those of ``NESTED`` contain more of them.
        arguments: by keyword.

    Raises:
        UserError: a value that the family does not represent.
    """
    ours = dict(arguments)
    for nested in NESTED if keywords else ():
        more = ours.pop(nested, None) or {}
        if not isinstance(more, Mapping):
            raise UserError(f"{nested}={more!r} of {name}: expected a dict of the mixers' arguments.")
        if twice := sorted(key for key in more if key in ours):
            raise UserError(f"{twice[0]} of {name} is given twice: leave it out of {nested}.")
        ours |= more
    for key in [key for key in ours if key in keywords]:
        keyword, value = keywords[key], ours.pop(key)
        keyword.check(f"{key}={value!r} of {name}", value, "Leave it out")
        if keyword.argument is not None:
            if keyword.argument in ours:
                raise UserError(f"{key} and {keyword.argument} of {name} are the same: leave one out.")
            ours[keyword.argument] = value
    return ours
