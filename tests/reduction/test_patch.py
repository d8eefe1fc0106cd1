"""Patching a model in place, unpatching it, and tracing its tokens."""

import copy

import pytest
import timm
import torch

import mtr_lab
from mtr_lab import UserError, ops
from mtr_lab.reduction import decision, trace_blocks

TINY = {"img_size": 48, "patch_size": 8, "stride": 8, "depth": 6, "embed_dim": 32, "num_classes": 5}
MODELS = {
    "vim": ("vim_ti", TINY),
    "videomamba": ("videomamba_ti", TINY),
    "video": ("videomamba_ti", {**TINY, "img_size": 24, "num_frames": 8, "kernel_size": 2}),
}
"""All with 36 patches; those of the video in four layers of 3 × 3."""


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    name, geometry = MODELS[request.param]
    return mtr_lab.create_model(name, **geometry).eval()


@pytest.fixture
def images(model) -> torch.Tensor:
    return torch.randn(3, *model.patch_embed.input_shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_ratio_zero_is_bit_identical(model, images) -> None:
    expected = model(images)
    mtr_lab.patch(model, "mtr", ratio=0)
    assert torch.equal(model(images), expected)


@torch.no_grad()
def test_unpatch_restores_the_model_bit_for_bit(model, images) -> None:
    expected, keys, modules = model(images), list(model.state_dict()), len(list(model.modules()))
    mtr_lab.patch(model, "mtr", ratio=0.4)
    assert not torch.equal(model(images), expected)
    assert list(model.state_dict()) == keys
    mtr_lab.unpatch(model)
    assert torch.equal(model(images), expected)
    assert len(list(model.modules())) == modules
    mtr_lab.unpatch(model)  # harmless


@torch.no_grad()
def test_blocks_see_the_scheduled_token_counts(model, images) -> None:
    seen = []
    for block in model.blocks:
        block.mixer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    schedule = mtr_lab.patch(model, ratio=0.3).schedule
    model(images)
    assert tuple(seen) == schedule.tokens
    assert schedule.tokens[-1] < schedule.tokens[0] == 37


@torch.no_grad()
def test_schedules_are_swapped_without_patching_again(model, images) -> None:
    expected = {}
    for ratio in (0.2, 0.35):
        mtr_lab.patch(model, ratio=ratio)
        expected[ratio] = model(images)
    reduction = mtr_lab.patch(model, ratio=0.1)
    for ratio in (0.35, 0.2):
        reduction.use(reduction.solve(ratio))
        assert torch.equal(model(images), expected[ratio])


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch_mates(model, images) -> None:
    mtr_lab.patch(model, ratio=0.4)
    together = model(images)
    torch.testing.assert_close(torch.cat([model(image[None]) for image in images]), together, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_trace_tells_the_patches_of_each_token(model, images) -> None:
    schedule = mtr_lab.patch(model, ratio=0.4).schedule
    states = mtr_lab.trace(model, images)
    assert [state.hidden.shape[1] for state in states] == [*schedule.tokens[1:], 37 - sum(schedule.remove)]
    for state in states:
        for b in range(3):
            held = state.source[b].bincount(minlength=state.hidden.shape[1])
            assert held.tolist() == state.size[b].tolist()
            # A survivor contains itself: ``source`` maps its original position to it.
            assert state.source[b].gather(0, state.index[b]).tolist() == list(range(state.hidden.shape[1]))
            assert state.index[b].gather(0, state.special[b]).tolist() == [model.class_position(36)]


@torch.no_grad()
@pytest.mark.parametrize("policy", ["mtr", "write", "hsa", "utr", "pumer"])
def test_traced_scores_are_those_the_policy_used(model, images, policy: str, monkeypatch) -> None:
    """(B, L) at blocks that reduce, for the tokens that enter; no score at other blocks."""
    used, terms = [], decision._terms
    schedule = mtr_lab.patch(model, policy, ratio=0.3).schedule
    with monkeypatch.context() as patched:
        patched.setattr(decision, "_terms", lambda *args: used.append(terms(*args)) or used[-1])
        model(images)
    blocks = trace_blocks(model, images)
    assert [block.score is not None for block in blocks] == [count > 0 for count in schedule.remove]
    for score, summed in zip([block.score for block in blocks if block.score is not None], used, strict=True):
        assert torch.equal(score, ops.importance(*summed))
    for block, tokens in zip(blocks, schedule.tokens, strict=True):
        assert block.before.hidden.shape[:2] == (3, tokens)
    for block, state in zip(blocks, mtr_lab.trace(model, images), strict=True):
        assert torch.equal(block.after.hidden, state.hidden)


@torch.no_grad()
def test_no_score_is_traced_where_similarity_alone_decides(model, images) -> None:
    mtr_lab.patch(model, "rmeeto", ratio=0.3)
    assert all(block.score is None for block in trace_blocks(model, images))


@torch.no_grad()
@pytest.mark.parametrize("model", ["vim"], indirect=True)
def test_the_class_token_is_read_at_its_position_in_each_image(model, images) -> None:
    """After a reduction its position differs between images, as it is in the middle of Vim's sequence."""
    images = torch.randn(20, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    mtr_lab.patch(model, ratio=0.4)
    state = mtr_lab.trace(model, images)[-1]
    assert len(set(state.special.flatten().tolist())) > 1
    tokens = torch.stack([state.stream[b, state.special[b, 0]] for b in range(len(images))])
    normed, _ = model.norm_f(tokens[:, None])
    torch.testing.assert_close(model.head(normed[:, 0]), model(images))


def test_training_through_a_reduction(model, images) -> None:
    mtr_lab.patch(model, ratio=0.3)
    model.train()(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_patched_models_are_copied_with_their_patch(model, images) -> None:
    mtr_lab.patch(model, ratio=0.3)
    clone = copy.deepcopy(model)
    mtr_lab.unpatch(model)
    with torch.no_grad():
        assert not torch.equal(clone(images), model(images))


@pytest.mark.slow  # of fewer blocks, in tests/backbones/test_timm_interface.py
@pytest.mark.parametrize("model", ["vim", "video"], indirect=True)
def test_torch_compile_sees_one_graph(model, images) -> None:
    mtr_lab.patch(model, ratio=0.3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images))


def test_ratio_for_another_image_size(model) -> None:
    schedule = mtr_lab.patch(model, ratio=0.3, img_size=(96, 48)).schedule
    assert schedule.tokens[0] == model.patch_embed.frames * 12 * 6 + 1
    with torch.no_grad():
        assert model(torch.zeros(1, *model.patch_embed.input_shape[:-2], 96, 48)).shape == (1, 5)


def test_a_refused_patch_leaves_the_model_alone(model, images) -> None:
    with torch.no_grad():
        expected = model(images)
        with pytest.raises(UserError, match="at most 0"):
            mtr_lab.patch(model, ratio=0.99)
        assert torch.equal(model(images), expected)


def test_bad_calls_are_explained(model) -> None:
    with pytest.raises(UserError, match="unknown policy 'mtrr'.*'mtr'"):
        mtr_lab.patch(model, "mtrr", ratio=0.3)
    with pytest.raises(UserError, match="needs a ratio"):
        mtr_lab.patch(model)
    with pytest.raises(UserError, match="made by mtr_lab.create_model, got VisionTransformer"):
        mtr_lab.patch(timm.create_model("vit_tiny_patch16_224"), ratio=0.3)
    with pytest.raises(UserError, match="add mtr.ratio=null"):
        mtr_lab.patch(model, ratio=0.3, schedule=[0, 1, 0, 0, 0, 0])
