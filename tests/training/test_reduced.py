"""A reduced model learns: every policy has gradients, a step does what its schedule says, the ratio rises by epochs."""

import pytest
import torch
from fitting_counts import FOR_ANY_FAMILY
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

import mtr_lab
from mtr_lab.reduction import Reduction, policy_config
from mtr_lab.training.reduced import epoch_ratios, unfused_settings


def is_of_direction(parameter: str, block: int, direction: str) -> bool:
    prefix, _, name = parameter.partition("mixer.")
    shared = name.startswith(("in_proj", "out_proj")) or not name
    return prefix == f"layers.{block}." and not shared and ("_b" in name.split(".")[0]) == (direction == "backward")


@pytest.mark.parametrize("policy", FOR_ANY_FAMILY)
def test_every_parameter_has_a_gradient_under_every_policy(policy: str) -> None:
    torch.manual_seed(0)
    model = mtr_lab.create_model("vim_nano", depth=6, embed_dim=16, img_size=48, num_classes=3).train()
    images = torch.randn(2, 3, 48, 48)
    schedule = mtr_lab.patch(model, policy, ratio=0.2, images=images).schedule
    skipped = [(number, name) for number, names in enumerate(schedule.skipped) for name in names]
    logits = model(images)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    for name, parameter in model.named_parameters():
        if any(is_of_direction(name, *pair) for pair in skipped):
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.startswith("layers.5.mixer.A"):  # evit puts the class token first: in the last block it has no past
            assert parameter.grad.abs().max() > 0, name


def test_a_training_step_saves_what_the_schedule_says() -> None:
    model = mtr_lab.create_model("vim_nano", depth=6, embed_dim=16, img_size=64, num_classes=3).train()
    reduction = Reduction(model, policy_config("mtr"))

    def flops(ratio: float) -> int:
        reduction.use(reduction.solve(ratio))
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(2, 3, 64, 64)).sum().backward()
        return counter.get_total_flops()

    unreduced, reduced = flops(0.0), flops(0.4)
    assert reduced < 0.7 * unreduced


@pytest.mark.parametrize(
    ("ratio", "warmup_epochs", "expected"),
    [(0.0, 3, []), (0.4, 0, [0.4]), (0.4, 3, [0.1, 0.2, 0.3, 0.4]), (None, 0, [None])],
)
def test_the_ratio_rises_in_equal_steps(ratio: float | None, warmup_epochs: int, expected: list) -> None:
    mtr = OmegaConf.create({"ratio": ratio, "schedule": "constant"})
    assert epoch_ratios(mtr, warmup_epochs) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("policy", "expected"), [("mtr", []), ("write", ["mtr.stretch=0.5"]), ("hsa", ["mtr.align=True"])]
)
def test_settings_without_fused_gradients_are_named(policy: str, expected: list[str]) -> None:
    assert unfused_settings(OmegaConf.create(policy_config(policy))) == expected
