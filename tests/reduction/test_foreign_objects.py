"""Objects of the authors' own classes are patched, evaluated, traced and exported like our models."""

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from authors_objects import KINDS, golden_object, mambareg, videomamba, vim
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mtr_lab
from mtr_lab import UserError
from mtr_lab.backbones.cuda_graph import CompiledModel, Recording
from mtr_lab.measure.flops import counted_flops, model_flops
from mtr_lab.measure.speed import measure_speed
from mtr_lab.pictures import observe

SMALL = {"img_size": 32, "patch_size": 8, "stride": 8, "depth": 3, "embed_dim": 24, "num_classes": 5, "d_state": 4}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def without_state(arguments: dict[str, Any]) -> dict[str, Any]:
    """The constructors of VideoMamba and Mamba-Reg have no ``d_state``."""
    return {key: value for key, value in arguments.items() if key != "d_state"}


def for_registers(arguments: dict[str, Any]) -> dict[str, Any]:
    """Patches do not overlap in Mamba-Reg: its constructor has no ``stride``."""
    return {key: value for key, value in without_state(arguments).items() if key != "stride"}


def randomised(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(count: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Any:
    return randomised(vim(**SMALL))


@pytest.mark.parametrize("file", KINDS)
@torch.no_grad()
def test_an_object_gives_the_authors_outputs(file: str) -> None:
    """The object cannot run here; its attributes alone tell its family and its geometry."""
    model, golden = golden_object(file)
    with pytest.raises(RuntimeError, match="is_cuda"):
        model(golden["input"])
    mtr_lab.patch(model, "mtr", ratio=0)
    assert relative_error(model(golden["input"]), golden["logits"]) < 1e-5
    if "features" in golden:
        assert relative_error(model.forward_features(golden["input"]), golden["features"].flatten(1)) < 1e-5


@pytest.mark.parametrize("file", KINDS)
@torch.no_grad()
def test_a_reduced_object_equals_our_model_with_its_parameters(file: str) -> None:
    model, golden = golden_object(file)
    reduction = mtr_lab.patch(model, "mtr", ratio=0.2)
    ours = copy.deepcopy(reduction.model)
    mtr_lab.unpatch(ours)
    mtr_lab.patch(ours, "mtr", ratio=0.2)
    outputs = model(golden["input"])
    assert torch.equal(outputs, ours(golden["input"]))
    assert relative_error(outputs, golden["logits"]) > 1e-3
    reduction.use(reduction.solve(0.1))
    assert not torch.equal(model(golden["input"]), outputs)


@torch.no_grad()
def test_unpatch_restores_the_object(model: Any) -> None:
    before, keys, signature = set(vars(model)), list(model.state_dict()), inspect.signature(model.forward)
    reduction = mtr_lab.patch(model, "mtr", ratio=0.2)
    assert list(model.state_dict()) == keys
    assert inspect.signature(model.forward) == signature
    model(images())
    mtr_lab.unpatch(model)
    assert set(vars(model)) == before
    with pytest.raises(RuntimeError, match="is_cuda"):
        model(images())
    with pytest.raises(UserError, match="no longer in force"):
        reduction.use(reduction.schedule)
    mtr_lab.unpatch(model)  # harmless


@torch.no_grad()
def test_a_refused_patch_leaves_the_object_alone(model: Any) -> None:
    before = set(vars(model))
    with pytest.raises(UserError, match="at most 0"):
        mtr_lab.patch(model, "mtr", ratio=0.99)
    assert set(vars(model)) == before


@pytest.mark.parametrize("ours", [False, True], ids=["object", "our model"])
@torch.no_grad()
def test_a_refused_patch_keeps_the_policy_that_was_in_force(model: Any, ours: bool) -> None:
    model = mtr_lab.create_model("vim_ti", **SMALL).eval() if ours else model
    reduction = mtr_lab.patch(model, "mtr", ratio=0.2)
    expected = model(images())
    with pytest.raises(UserError, match="at most 0"):
        mtr_lab.patch(model, "mtr", ratio=0.99)
    assert torch.equal(model(images()), expected)
    reduction.use(reduction.solve(0.1))
    assert not torch.equal(model(images()), expected)


@torch.no_grad()
def test_the_very_same_parameters_are_used(model: Any) -> None:
    ours = mtr_lab.patch(model, "mtr", ratio=0.2).model
    theirs = dict(model.named_parameters())
    assert theirs.keys() == dict(ours.named_parameters()).keys()
    assert all(theirs[name] is parameter for name, parameter in ours.named_parameters())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda model: model.head.weight.mul_(2),
    "load_state_dict": lambda model: model.load_state_dict(vim(**SMALL).state_dict()),
    "assign": lambda model: model.load_state_dict(vim(**SMALL).state_dict(), assign=True),
    "double": lambda model: model.double(),
    "another head": lambda model: setattr(model, "head", nn.Linear(24, 5)),
    "another parameter": lambda model: setattr(model, "cls_token", nn.Parameter(torch.ones(1, 1, 24))),
}


@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_changes_of_the_object_take_effect(model: Any, change: Callable, overwrites: bool) -> None:
    mtr_lab.patch(model, "mtr", ratio=0.2)
    before = model(images())
    default = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
    try:
        change(model)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(default)
    dtype = model.cls_token.dtype
    after = model(images().to(dtype))
    assert not torch.equal(after, before)
    fresh = vim(**SMALL).to(dtype).eval()
    fresh.load_state_dict(model.state_dict())
    mtr_lab.patch(fresh, "mtr", ratio=0.2)
    assert torch.equal(after, fresh(images().to(dtype)))


def replace_layer(model: Any) -> None:
    other = vim(**SMALL, if_divide_out=False, norm_epsilon=1e-2)
    other.load_state_dict(model.state_dict())
    model.layers[1] = other.layers[1]


SETTINGS: dict[str, Callable[[Any], Any]] = {
    "epsilon": lambda model: setattr(model.layers[1].norm, "eps", 1e-2),
    "directions": lambda model: setattr(model.layers[1].mixer, "if_divide_out", False),
    "layer": replace_layer,
}


@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS)
@torch.no_grad()
def test_settings_that_change_later_take_effect(model: Any, change: Callable) -> None:
    mtr_lab.patch(model, "mtr", ratio=0.2)
    before = model(images())
    change(model)
    after = model(images())
    assert not torch.equal(after, before)
    mtr_lab.unpatch(model)
    mtr_lab.patch(model, "mtr", ratio=0.2)
    assert torch.equal(after, model(images()))


def test_a_layer_of_another_variant_is_refused_when_the_object_is_called(model: Any) -> None:
    mtr_lab.patch(model, "mtr", ratio=0.2)
    model.layers[1] = vim(**SMALL).layers[1]
    model.layers[1].mixer.use_fast_path = False
    with pytest.raises(UserError, match=r"use_fast_path=False of layers\.1 of VisionMamba"):
        model(images())


def test_another_number_of_classes_needs_another_patch(model: Any) -> None:
    mtr_lab.patch(model, "mtr", ratio=0.2)
    model.head, model.num_classes = nn.Linear(24, 7), 7
    with pytest.raises(UserError, match="head.bias, head.weight.*call unpatch and patch again"):
        model(images())
    mtr_lab.unpatch(model)
    mtr_lab.patch(model, "mtr", ratio=0.2)
    assert model(images()).shape == (2, 7)


def test_training_reaches_the_parameters_of_the_object() -> None:
    model = randomised(vim(**SMALL, drop_path_rate=0.5))
    mtr_lab.patch(model, "mtr", ratio=0.2)
    assert torch.equal(model(images()), model(images()))
    model.train()
    assert not torch.equal(model(images(8)), model(images(8)))  # stochastic depth
    model.zero_grad()
    model(images(8)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not model.eval()(images()).isnan().any()


@torch.no_grad()
def test_a_compiled_object_follows_the_mode() -> None:
    model = randomised(vim(**SMALL, drop_path_rate=0.5))
    mtr_lab.patch(model.train(), "mtr", ratio=0.2)
    compiled = torch.compile(model, backend="eager")
    assert not torch.equal(compiled(images(8)), compiled(images(8)))  # stochastic depth
    model.eval()
    expected = copy.deepcopy(model)(images(8))
    assert torch.allclose(compiled(images(8)), expected, atol=1e-6)
    model.train()
    assert not torch.equal(compiled(images(8)), compiled(images(8)))


def test_rates_and_checkpointing_are_those_of_the_object() -> None:
    model = videomamba(**without_state(SMALL), num_frames=4, fc_drop_rate=0.3, drop_path_rate=0.2)
    model.use_checkpoint = True
    ours: Any = mtr_lab.patch(model, "mtr", ratio=0).model
    assert ours.grad_checkpointing
    model.use_checkpoint = False
    mtr_lab.trace(model.eval(), torch.randn(1, *ours.input_shape))
    assert not ours.grad_checkpointing
    model.use_checkpoint = True
    mtr_lab.trace(model.train(), torch.randn(1, *ours.input_shape))
    assert (ours.head_drop.p, ours.drop_path.drop_prob, ours.grad_checkpointing) == (0.3, 0.2, True)
    assert [getattr(block.drop_path, "drop_prob", 0) for block in ours.blocks] == [0, 0, pytest.approx(0.1)]


@pytest.mark.parametrize(
    ("attributes", "ours"),
    [
        ({"if_divide_out": False}, {"if_divide_out": False}),
        ({"if_divide_out": None}, {}),  # if_devide_out=True, the name of the attribute until July 2024
        ({"use_middle_cls_token": False}, {"use_middle_cls_token": False}),
        ({"norm_epsilon": 1e-2}, {"norm_epsilon": 1e-2}),
        ({"d_state": 6, "img_size": (32, 48), "channels": 1}, {"d_state": 6, "img_size": (32, 48), "channels": 1}),
        ({"patch_size": 16, "num_classes": 0}, {"patch_size": 16, "num_classes": 0}),
        ({"final_pool_type": "none", "flip_img_sequences_ratio": 0}, {}),
    ],
)
@torch.no_grad()
def test_what_the_attributes_say_is_computed(attributes: dict, ours: dict) -> None:
    model = randomised(vim(**{**SMALL, **attributes}))
    expected = mtr_lab.create_model("vim_ti", **{**SMALL, **ours}).eval()
    expected.load_state_dict(model.state_dict())
    mtr_lab.patch(model, "mtr", ratio=0)
    batch = torch.randn(2, *expected.input_shape)
    assert torch.equal(model(batch), expected(batch))


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"num_cls_tokens": 5, "cls_reduce": 4, "img_size": (32, 48), "channels": 1},
        {"cls_reduce": 1, "num_cls_tokens": 2, "norm_epsilon": 1e-2},
        {"num_cls_tokens": 1, "num_classes": 0},
    ],
)
@torch.no_grad()
def test_registers_are_those_of_the_object(attributes: dict) -> None:
    arguments = {**for_registers(SMALL), "num_cls_tokens": 3, "cls_reduce": 2, **attributes}
    model = randomised(mambareg(**arguments))
    expected = mtr_lab.create_model("mambareg_s", **arguments).eval()
    expected.load_state_dict(model.state_dict())
    reduction = mtr_lab.patch(model, "mtr", ratio=0)
    batch = torch.randn(2, *expected.input_shape)
    assert torch.equal(model(batch), expected(batch))
    assert torch.equal(model.forward_features(batch), expected.pooled(batch))
    assert reduction.model.norm_f.eps == arguments.get("norm_epsilon", 1e-5)


def test_registers_elsewhere_are_refused() -> None:
    for name in ("token_idx", "cls_positions"):
        model = mambareg(**for_registers(SMALL), num_cls_tokens=3)
        setattr(model, name, getattr(model, name).flip(0))
        with pytest.raises(UserError, match=f"{name} of VisionMamba is not represented: expected 4 patches"):
            mtr_lab.patch(model, "mtr", ratio=0)


def test_each_mixer_and_norm_has_its_own_settings(model: Any) -> None:
    model.layers[1].mixer.if_divide_out = False
    model.layers[2].norm.eps = 1e-3
    ours: Any = mtr_lab.patch(model, "mtr", ratio=0).model
    assert [block.mixer.average_directions for block in ours.blocks] == [True, False, True]
    assert [block.norm.eps for block in ours.blocks] == [1e-5, 1e-5, 1e-3]


@pytest.mark.parametrize(
    ("kind", "attributes", "message"),
    [
        (vim, {"if_bidirectional": True}, "if_bidirectional=True of VisionMamba .*scan in opposite directions"),
        (vim, {"flip_img_sequences_ratio": 0.5}, "flip_img_sequences_ratio=0.5 of VisionMamba .*flipped at random"),
        (vim, {"final_pool_type": "max"}, "final_pool_type='max' of VisionMamba .*the largest of the classes"),
        (vim, {"ssm_cfg": {"d_conv": 3}}, "d_conv=3 of layers.0 of VisionMamba .*another width"),
        (vim, {"ssm_cfg": {"expand": 1}}, "expand=1 of layers.0 of VisionMamba .*another inner width"),
        (vim, {"ssm_cfg": {"bias": True}}, "bias=True of layers.0 of VisionMamba .*have a bias"),
        (vim, {"ssm_cfg": {"conv_bias": False}}, "conv_bias=False of layers.0 of VisionMamba .*have no bias"),
        (vim, {"bimamba_type": "v1"}, "bimamba_type='v1' of layers.0 of VisionMamba .*share parameters"),
        (vim, {"bimamba_type": "none"}, "bimamba_type='none' of layers.0 of VisionMamba .*only one"),
        (vim, {"rms_norm": False}, "rms_norm=False of VisionMamba .*layer norms"),
        (vim, {"if_rope": True}, "if_rope=True of VisionMamba .*rotary"),
        (vim, {"use_double_cls_token": True, "num_tokens": 2}, "use_double_cls_token=True .*two class tokens"),
        (vim, {"if_cls_token": False, "num_tokens": 0}, "if_cls_token=False of VisionMamba .*no class token"),
        (vim, {"if_abs_pos_embed": False}, "if_abs_pos_embed=False of VisionMamba .*no position embeddings"),
        (vim, {"init_layer_scale": 0.1}, "init_layer_scale=0.1 of layers.0 of VisionMamba .*scaled by a parameter"),
        (vim, {"drop_rate": 0.1}, r"pos_drop of VisionMamba drops 0.1 .*set model\.pos_drop\.p = 0"),
        (videomamba, {"bimamba": False}, "bimamba=False of layers.0 of VisionMamba .*forward only"),
        (videomamba, {"ssm_cfg": {"d_conv": 2}}, "d_conv=2 of layers.0 of VisionMamba"),
        (mambareg, {"biscan": False}, "biscan=False of layers.0 of VisionMamba .*forward only"),
        (mambareg, {"rms_norm": False}, "rms_norm=False of VisionMamba .*layer norms"),
    ],
)
def test_variants_that_are_not_represented_are_refused_by_name(kind: Callable, attributes: dict, message: str) -> None:
    small = {vim: SMALL, videomamba: without_state(SMALL), mambareg: for_registers(SMALL)}[kind]
    model = kind(**{**small, **attributes})
    before = set(vars(model))
    with pytest.raises(UserError, match=message):
        mtr_lab.patch(model, "mtr", ratio=0.2)
    assert set(vars(model)) == before


@pytest.mark.parametrize("kind", [vim, videomamba, mambareg])
def test_the_authors_slow_path_is_refused(kind: Callable) -> None:
    model = kind(**for_registers(SMALL))
    model.layers[2].mixer.use_fast_path = False
    with pytest.raises(UserError, match=r"use_fast_path=False of layers\.2 of VisionMamba .*scans forward only"):
        mtr_lab.patch(model, "mtr", ratio=0.2)


class Adapter(nn.Linear):
    """As an adapter in place of a layer, of a class that has the same name."""


Adapter.__name__ = "Linear"


def replace_forward(model: Any) -> None:
    model.forward = lambda x: x


def override(module: Any, name: str) -> None:
    """Make the module's class a subclass with another method of that name."""
    base = type(module)
    module.__class__ = type(f"Other{base.__name__}", (base,), {name: lambda self, x: x})


TOUCHED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook": (
        lambda model: model.layers[1].mixer.register_forward_hook(lambda *_: None),
        r"layers\.1\.mixer has a hook",
    ),
    "hook of the model": (lambda model: model.register_forward_pre_hook(lambda *_: None), "VisionMamba has a hook"),
    "adapter": (lambda model: setattr(model.layers[1].mixer, "x_proj", Adapter(48, 10)), r"x_proj is .*merge adapters"),
    "adapter of patches": (
        lambda model: setattr(model.patch_embed, "proj", nn.Sequential(model.patch_embed.proj)),
        r"patch_embed\.proj of VisionMamba is Sequential, expected a convolution",
    ),
    "parametrisation": (
        lambda model: nn.utils.parametrizations.weight_norm(model.layers[0].mixer.in_proj),
        r"in_proj is .*undo parametrisations",
    ),
    "padding of the convolution": (
        lambda model: setattr(model.layers[2].mixer.conv1d, "padding", (0,)),
        r"layers\.2\.mixer\.conv1d is Conv1d\(.*, the authors' is Conv1d\(.*padding=\(3,\)",
    ),
    "dilation of patches": (
        lambda model: setattr(model.patch_embed.proj, "dilation", (2, 2)),
        r"patch_embed\.proj is Conv2d\(.*dilation.*, the authors' is Conv2d",
    ),
    "quantisation": (
        lambda model: setattr(
            model.layers[1].mixer, "in_proj", torch.ao.nn.quantized.dynamic.Linear(24, 96, bias_=False)
        ),
        r"in_proj is torch\.ao\..*Linear, expected Linear .*quantisation",
    ),
    "activation": (
        lambda model: setattr(model.layers[0].mixer, "act", nn.GELU()),
        r"act is .*GELU, which has no count",
    ),
    "module": (lambda model: model.add_module("neck", nn.Linear(2, 2)), "neck is .*which has no counterpart"),
    "parameter": (
        lambda model: model.register_parameter("extra", nn.Parameter(torch.ones(1))),
        "attributes desc.*extra",
    ),
    "forward": (replace_forward, r"VisionMamba\.forward was replaced in this object"),
    "subclass": (lambda model: override(model, "forward"), r"OtherVisionMamba\.forward is not VisionMamba\.forward"),
    "features": (lambda model: override(model, "forward_features"), r"OtherVisionMamba\.forward_features is not"),
    "mixer": (lambda model: override(model.layers[2].mixer, "forward"), r"OtherMamba\.forward is not Mamba\.forward"),
}


@pytest.mark.parametrize(("touch", "message"), TOUCHED.values(), ids=TOUCHED)
def test_objects_that_compute_something_else_are_refused(model: Any, touch: Callable, message: str) -> None:
    touch(model)
    with pytest.raises(UserError, match=message):
        mtr_lab.patch(model, "mtr", ratio=0.2)


@pytest.mark.parametrize("case", ["hook", "adapter", "parametrisation", "mixer"])
def test_an_object_that_is_changed_later_is_refused_when_it_is_called(model: Any, case: str) -> None:
    mtr_lab.patch(model, "mtr", ratio=0.2)
    touch, message = TOUCHED[case]
    if case == "mixer":
        model.layers[2].mixer.forward, message = (lambda x: x), r"Mamba\.forward was replaced"
    else:
        touch(model)
    with pytest.raises(UserError, match=message):
        model(images())


def test_a_forward_with_other_arguments_is_refused() -> None:
    model = vim(**SMALL)
    type(model).forward = lambda self, x, keep_tokens=7: x
    with pytest.raises(UserError, match=r"VisionMamba\.forward has the argument keep_tokens"):
        mtr_lab.patch(model, "mtr", ratio=0.2)


@pytest.mark.parametrize(
    "arguments", [{"return_features": True}, {"inference_params": object()}, {"if_random_token_rank": True}]
)
@torch.no_grad()
def test_other_arguments_are_refused_not_ignored(model: Any, arguments: dict) -> None:
    mtr_lab.patch(model, "mtr", ratio=0.2)
    expected = model(images())
    assert torch.equal(model(x=images(), inference_params=None), expected)
    assert torch.equal(model(images(), False), expected)
    with pytest.raises(UserError, match=f"{next(iter(arguments))}=.* is not represented: leave it out"):
        model(images(), **arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument 'typo'"):
        model(images(), typo=1)
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        model()


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "both": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),
}


@pytest.mark.parametrize(
    ("wrapper", "ours"),
    [
        pytest.param(name, ours, marks=pytest.mark.slow if (name, ours) == ("compile", False) else ())  # as in "both"
        for name in WRAPPERS
        for ours in (False, True)
    ],
)
@pytest.mark.usefixtures("one_process")
@torch.no_grad()
def test_wrappers_are_looked_into(model: Any, wrapper: str, ours: bool) -> None:
    if ours:
        model = mtr_lab.create_model("vim_ti", **SMALL).eval()
    wrapped = WRAPPERS[wrapper](model)
    reduction = mtr_lab.patch(wrapped, "mtr", ratio=0.2)
    reduced = model(images())
    torch.testing.assert_close(wrapped(images()), reduced)
    reduction.use(reduction.solve(0.0))
    torch.testing.assert_close(wrapped(images()), model(images()))
    assert not torch.allclose(wrapped(images()), reduced)
    assert len(mtr_lab.trace(wrapped, images())) == 3
    mtr_lab.unpatch(wrapped)
    assert "forward" not in vars(model)


@torch.no_grad()
def test_evaluation_leaves_an_object_as_it_was(model: Any) -> None:
    before = set(vars(model))
    data = TensorDataset(images(6), torch.arange(6) % 5)
    points = mtr_lab.evaluate_model(model.train(), DataLoader(data, batch_size=4), "mtr", ratio=[0.1, 0.2])
    assert (set(vars(model)), model.training) == (before, True)
    mtr_lab.patch(model.eval(), "mtr", ratio=0.2)
    reduced = model(images(6))
    assert mtr_lab.evaluate_model(model, DataLoader(data, batch_size=4), "mtr", ratio=[0.1, 0.2]) == points
    assert torch.equal(model(images(6)), reduced)
    assert points[2]["top1"] == (reduced.argmax(1) == data.tensors[1]).double().mean().item()


@torch.no_grad()
def test_tokens_pictures_flops_and_speed_of_an_object(model: Any) -> None:
    assert [state.hidden.shape[1] for state in mtr_lab.trace(model, images())] == [17] * 3
    reduction = mtr_lab.patch(model, "mtr", ratio=0.2)
    schedule = reduction.schedule
    assert [state.hidden.shape[1] for state in mtr_lab.trace(model, images())][:-1] == list(schedule.tokens[1:])
    observations = observe(model, reduction, images())
    assert [len(observation.blocks) for observation in observations] == [3, 3]
    counted, overhead = counted_flops(model, images())
    assert (counted, overhead) == (schedule.flops, schedule.flops_overhead)
    assert model_flops(model) > schedule.flops
    assert measure_speed({"mtr": model}, images(), min_rounds=1, max_seconds=0)["mtr"].img_per_s > 0


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@torch.no_grad()
def test_an_object_is_exported(model: Any, strict: bool) -> None:
    reduction = mtr_lab.patch(model, "mtr", ratio=0.2)
    for exported in (model, reduction.model):
        program = torch.export.export(exported, (images(),), strict=strict).module()
        torch.testing.assert_close(program(images()), model(images()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_keep_the_patch_and_are_independent(copied: Callable) -> None:
    model = randomised(picklable(vim(**SMALL)))
    mtr_lab.patch(model, "mtr", ratio=0.2)
    expected, clone = model(images()), copied(model)
    mtr_lab.unpatch(model)
    model.head.weight.zero_()
    assert torch.equal(clone(images()), expected)
    clone.head.weight.zero_()
    clone.head.bias.zero_()
    assert not clone(images()).any()


def picklable(model: nn.Module) -> nn.Module:
    """Its class is defined in a function; pickle looks for it in a module."""
    kind = type(model)
    kind.__qualname__, kind.__module__ = "VisionMamba", __name__
    globals()["VisionMamba"] = kind
    return model


class Rehearsal(CompiledModel):
    """Captures on the CPU: a replay returns what the model returned at the time of capture."""

    device_type = "cpu"
    captured = 0

    def capture(self, images: torch.Tensor, sibling: Recording | None) -> Recording:
        self.captured += 1
        logits = self.model(images)
        return Recording(type("Graph", (), {"replay": lambda _: None})(), images, logits, None)  # type: ignore[arg-type]


@torch.no_grad()
def test_a_graph_follows_the_patch_of_an_object(model: Any) -> None:
    mtr_lab.patch(model, "mtr", ratio=0.0)
    fast = Rehearsal(model)
    unreduced = fast(images())
    assert torch.equal(unreduced, model(images()))
    mtr_lab.patch(model, "mtr", ratio=0.2)
    reduced = fast(images())
    assert torch.equal(reduced, model(images()))
    assert not torch.equal(reduced, unreduced)
    mtr_lab.unpatch(model)
    mtr_lab.patch(model, "mtr", ratio=0.1)
    assert torch.equal(fast(images()), model(images()))
    assert torch.equal(fast(images()), model(images()))
    assert fast.captured == 3


@pytest.mark.parametrize(
    ("lacks", "what"),
    [
        (lambda model: delattr(model.patch_embed, "img_size"), "img_size"),
        (lambda model: delattr(model, "norm_f"), "norm_f"),
        (lambda model: delattr(model.layers[1].mixer, "out_proj"), "out_proj"),
        (lambda model: setattr(model.layers[1], "norm", nn.Identity()), "eps"),
        (lambda model: setattr(model.layers[0].mixer, "A_log", nn.Parameter(torch.ones(48))), "index"),
    ],
)
def test_objects_with_a_part_of_the_authors_modules_are_refused(model: Any, lacks: Callable, what: str) -> None:
    lacks(model)
    with pytest.raises(UserError, match=f"has the mixers of Vim, but not all modules and attributes of .*{what}"):
        mtr_lab.patch(model, "mtr", ratio=0.2)


@pytest.mark.filterwarnings("ignore")
def test_scripted_modules_are_refused() -> None:
    with pytest.raises(UserError, match="patch expects an object of the authors' class"):
        mtr_lab.patch(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), "mtr", ratio=0.2)


def test_objects_of_other_classes_are_refused(model: Any) -> None:
    model.num_cls_tokens = 4  # registers, but not all attributes of Mamba-Reg
    with pytest.raises(UserError, match="class of Mamba-Reg.* or Vim, or a model .*, got VisionMamba"):
        mtr_lab.patch(model, "mtr", ratio=0.2)
    with pytest.raises(UserError, match="patch expects .*got dict"):
        mtr_lab.patch({}, "mtr", ratio=0.2)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unpatch expects .*got dict"):
        mtr_lab.unpatch({})  # type: ignore[arg-type]
