"""Mamba-Reg: registers at any place of the sequence are kept, and the head reads all of them."""

import pytest
import torch
from fitting_counts import FOR_ANY_FAMILY, fitting
from torch import Tensor, nn

import mtr_lab
from mtr_lab import UserError, create_model
from mtr_lab.tasks.segmentation.model import Segmenter
from mtr_lab.tokens.pooling import ordinary_tokens

TINY = {"img_size": (40, 56), "patch_size": 8, "depth": 3, "embed_dim": 24, "d_state": 4, "num_classes": 5}
"""5 x 7 patches."""


def tiny(**changes):
    torch.manual_seed(0)
    model = create_model("mambareg_s", **{**TINY, "num_cls_tokens": 5, "cls_reduce": 2, **changes}).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("patches", [3, 35, 64, 196])
@pytest.mark.parametrize("registers", [1, 4, 12, 16, 40])
def test_registers_are_even(patches: int, registers: int) -> None:
    model = tiny(num_cls_tokens=registers)
    positions = model.special_positions(patches)
    before = patches // (registers + 1)
    assert list(positions) == [before + i * (before + 1) for i in range(registers)]


@pytest.mark.parametrize("removed", [0, 6])
@torch.no_grad()
def test_the_head_reads_every_register(removed: int, images: Tensor) -> None:
    model = tiny()
    mtr_lab.patch(model, "mtr", schedule=[0, removed, 0])
    features = model.forward_features(images)
    assert features.shape == (2, 35 + 5 - removed, 24)
    assert (model.num_prefix_tokens, model.num_features, model.head_hidden_size) == (5, 24, 60)
    reduced, _ = model.norm_neck(model.neck(features[:, :5]).flatten(1))
    torch.testing.assert_close(model(images), model.head(reduced))
    assert torch.equal(model.forward_head(features), model(images))
    for register in range(5):
        changed = features.clone()
        changed[:, register] += 1
        assert not torch.allclose(model.forward_head(changed), model(images))


@pytest.mark.parametrize("policy", FOR_ANY_FAMILY)
@torch.no_grad()
def test_registers_are_never_removed(policy: str, images: Tensor) -> None:
    model = tiny(num_cls_tokens=2)
    counts = fitting(policy, [0, 4, 0], model.layouts()[0])
    assert 0 < mtr_lab.patch(model, policy, schedule=counts).schedule.remove[1] < 20
    for state in mtr_lab.trace(model, images):
        assert (state.size.gather(1, state.special) == 1).all()
        assert (state.special.diff(dim=1) > 0).all()


@torch.no_grad()
def test_poolings(images: Tensor) -> None:
    model = tiny()
    features = model.forward_features(images)
    model.reset_classifier(0)
    assert torch.equal(model(images), model.forward_head(features, pre_logits=True))
    assert model(images).shape == (2, 60)
    model.reset_classifier(7, "avg")
    assert (model(images).shape, model.head_hidden_size) == ((2, 7), 24)
    assert not any("neck" in name for name in model.state_dict())
    model.reset_classifier(0, "")
    assert torch.equal(model(images), features)
    model.reset_classifier(5, "token")
    assert model(images).shape == (2, 5)
    with pytest.raises(UserError, match="unknown global_pool 'max'"):
        model.reset_classifier(5, "max")


@torch.no_grad()
def test_registers_themselves_are_read_without_a_reduction(images: Tensor) -> None:
    model = tiny(cls_reduce=1, num_classes=0)
    assert not any("neck" in name for name in model.state_dict())
    assert torch.equal(model(images), model.forward_features(images)[:, :5].flatten(1))


@torch.no_grad()
def test_positions_of_another_grid_are_interpolated(tmp_path, images: Tensor) -> None:
    """A ramp stays a ramp; registers keep their own embeddings."""
    model = tiny(img_size=64)
    model.pos_embed.copy_(torch.arange(8.0).expand(8, 8).reshape(1, 64, 1).expand(1, 64, 24))
    model.pos_embed_cls.fill_(100.0)
    model.cls_token.zero_()
    for parameter in model.patch_embed.proj.parameters():
        parameter.zero_()
    state = model.embed(torch.zeros(1, 3, 128, 64))
    assert state.special.tolist() == [list(model.special_positions(128))]
    assert (state.special_tokens() == 100).all()
    grid = state.hidden[0, ordinary_tokens(state.special, 133)[0], 0].reshape(16, 8)
    assert torch.allclose(grid, torch.arange(8.0).expand(16, 8), atol=0.05)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    settings = {**TINY, "num_cls_tokens": 5, "img_size": (128, 64), "checkpoint": tmp_path / "w.pth"}
    loaded = create_model("mambareg_s", **settings).eval()
    assert torch.equal(loaded(torch.ones(1, 3, 128, 64)), model(torch.ones(1, 3, 128, 64)))


def test_a_dense_head_leaves_no_parameter_without_gradient(images: Tensor) -> None:
    model = Segmenter(tiny(depth=4), 3, width=16)
    mtr_lab.patch(model.backbone, "mtr", ratio=0.1, schedule="auto", images=images)
    model(images).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []


def test_a_reduction_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="cls_reduce=5 does not divide embed_dim=24: give a divisor"):
        tiny(cls_reduce=5)
