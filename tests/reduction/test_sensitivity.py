"""``schedule=auto``: the schedules, their repeatability, and that the model is unchanged afterwards."""

import weakref
from typing import Any

import pytest
import torch
from fitting_counts import FOR_ANY_FAMILY

import mtr_lab
from mtr_lab import UserError
from mtr_lab.reduction import make_policy, policy_config
from mtr_lab.reduction.schedule import SHAPES
from mtr_lab.reduction.sensitivity import STRIDE

DEPTH = 6


@pytest.fixture
def model():
    torch.manual_seed(0)
    geometry = {"img_size": 24, "patch_size": 4, "stride": 4, "embed_dim": 16, "num_classes": 5}
    return mtr_lab.create_model("vim_ti", depth=DEPTH, **geometry).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def test_images_are_freed_on_request(model, images: torch.Tensor) -> None:
    images = images.clone()
    reduction, held = mtr_lab.patch(model, "mtr", ratio=0.2, schedule="auto", images=images), weakref.ref(images)
    schedule = reduction.schedule
    del images
    reduction.release_images()
    assert held() is None
    assert reduction.schedule == schedule
    with pytest.raises(UserError, match="got none"):
        reduction.solve(0.1)


def silence(model, *blocks: int) -> None:
    """Make blocks add nothing to the stream, so that their input does not matter."""
    for block in blocks:
        torch.nn.init.zeros_(model.blocks[block].mixer.out_proj.weight)


def test_tokens_are_removed_where_they_do_not_matter(model, images) -> None:
    """No block reads the tokens after block 2, so that removing them there does not change the output."""
    silence(model, 3, 4, 5)
    with torch.no_grad():
        expected = model(images)
    schedule = mtr_lab.patch(model, "mtr", ratio=0.25, schedule="auto", images=images).schedule
    assert schedule.remove[:2] == (0, 0)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected)
    constant = mtr_lab.patch(model, "mtr", ratio=0.25).schedule
    assert sum(constant.remove[:2]) > 0
    with torch.no_grad():
        assert not torch.allclose(model(images), expected)


def test_a_model_in_half_precision(model, images) -> None:
    schedule = mtr_lab.patch(model.bfloat16(), ratio=0.2, schedule="auto", images=images.bfloat16()).schedule
    assert 0.2 <= schedule.reduction < 0.25


@pytest.mark.parametrize("name", ["mtr", "random", "hsa"])
@torch.no_grad()
def test_the_first_step_is_the_cheapest_of_all_blocks(name: str, model, images) -> None:
    """Against whole forward passes that remove, at one block, as many tokens as needed to save ``STRIDE``."""
    reference = model(images).double().log_softmax(-1)
    prices = {}
    for block in range(DEPTH - 1):
        for count in range(1, 36):
            counts = [count * (i == block) for i in range(DEPTH)]
            try:
                reduction = mtr_lab.patch(model, name, schedule=counts).schedule.reduction
            except UserError:
                break
            if reduction >= STRIDE:
                reduced = model(images).double().log_softmax(-1)
                prices[block] = (reference.exp() * (reference - reduced)).sum(-1).mean().item() / reduction
                break
    actual = mtr_lab.patch(model, name, ratio=STRIDE / 2, schedule="auto", images=images).schedule.remove
    assert [block for block, count in enumerate(actual) if count] == [min(prices, key=prices.get)]


@pytest.mark.parametrize("name", [name for name in FOR_ANY_FAMILY if policy_config(name)["schedule"] != "none"])
def test_the_ratio_is_met_to_a_token_for_every_policy(name: str, model, images) -> None:
    schedule = mtr_lab.patch(model, name, ratio=0.2, schedule="auto", images=images).schedule
    assert schedule.reduction >= 0.2
    policy, fewer = make_policy(policy_config(name)), list(schedule.remove)
    last = max(block for block, count in enumerate(fewer) if count)
    fewer[last] = policy.possible(fewer[last] - 1, schedule.tokens[last], model.layouts()[0])
    assert mtr_lab.patch(model, name, schedule=fewer).schedule.reduction < 0.2
    if name == "famba":  # mtr.layers=lower
        assert sum(schedule.remove[DEPTH // 2 :]) == 0


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("policy", ["fovea", "write"])
def test_no_named_schedule_changes_the_output_less(policy: str, ratio: float, model, images) -> None:
    reference = model(images).double().log_softmax(-1)

    def kl(schedule: str, **settings: Any) -> float:
        """Of the output on these images, nats an image."""
        mtr_lab.patch(model, policy, ratio=ratio, schedule=schedule, **settings)
        reduced = model(images).double().log_softmax(-1)
        return (reference.exp() * (reference - reduced)).sum(-1).mean().item()

    assert kl("auto", images=images) <= min(kl(shape) for shape in SHAPES) * (1 + 1e-9)


def test_named_schedules_of_blocks_that_the_model_lacks_are_left_out(model, images) -> None:
    schedule = mtr_lab.patch(model, "mtr", ratio=0.2, schedule="auto", first_block=DEPTH + 3, images=images).schedule
    assert schedule.reduction >= 0.2


def test_the_same_images_give_the_same_schedule_after_other_ratios(model, images) -> None:
    alone = mtr_lab.patch(model, "write", ratio=0.4, schedule="auto", images=images).schedule
    reduction = mtr_lab.patch(model, "write", ratio=0.1, schedule="auto", images=images)
    assert [reduction.solve(0.2), reduction.solve(0.4)][1] == alone
    assert reduction.solve(0.1) == reduction.schedule


@torch.no_grad()
def test_measuring_leaves_the_model_as_it_was(model, images) -> None:
    reduction = mtr_lab.patch(model.train(), "write", ratio=0.1, schedule="auto", images=images)
    before = model(images)
    reduction.solve(0.4)
    assert model.training
    assert torch.equal(model(images), before)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_images_of_another_size_set_the_size(model) -> None:
    schedule = mtr_lab.patch(model, "mtr", ratio=0.2, schedule="auto", images=torch.randn(2, 3, 32, 16)).schedule
    assert schedule.tokens[0] == 8 * 4 + 1


def test_missing_images_and_other_mistakes_are_named(model, images, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"mtr.schedule=auto measures on images.*patch\(…, images=images\)"):
        mtr_lab.patch(model, "mtr", ratio=0.2, schedule="auto")
    with pytest.raises(UserError, match="must be a share of the FLOPs"):
        mtr_lab.patch(model, "mtr", schedule="auto", images=images)
    with pytest.raises(UserError, match=r"images \(B, channels, H, W\), got shape \(3, 24, 24\)"):
        mtr_lab.patch(model, "mtr", ratio=0.2, schedule="auto", images=images[0])
    with pytest.raises(UserError, match=r"mtr.schedule=auto measures on images, and got a batch without images"):
        mtr_lab.patch(model, "mtr", ratio=0.2, schedule="auto", images=images[:0])
    with pytest.raises(UserError, match=r"got images with values that are not finite"):
        mtr_lab.patch(model, "mtr", ratio=0.2, schedule="auto", images=images / 0)
    stale = mtr_lab.patch(model, "mtr", ratio=0.2, schedule="auto", images=images)
    mtr_lab.unpatch(model)
    with pytest.raises(UserError, match="no longer in force"):
        stale.solve(0.4)
    monkeypatch.setattr(model.layers[0], "forward", None)  # nothing is measured for a ratio out of reach
    with pytest.raises(UserError, match="out of reach"):
        mtr_lab.patch(model, "mtr", ratio=0.97, schedule="auto", images=images)
