"""Models support PyTorch's hooks, adapters, checkpoints, quantisation, tracing and second derivatives."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import mtr_lab
from mtr_lab.packages import installed

GEOMETRY = {"img_size": 16, "patch_size": 4, "stride": 4, "depth": 3, "embed_dim": 16, "num_classes": 3}
INNER = ["patch_embed.proj"]
INNER += [f"layers.1.mixer.{name}{suffix}" for name in ("conv1d", "x_proj", "dt_proj") for suffix in ("", "_b")]


def small(name: str = "vim_nano", policy: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = mtr_lab.create_model(name, **GEOMETRY)
    if policy is not None:
        mtr_lab.patch(model, policy, ratio=0.2)
    return model


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, output: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(output.square().sum(), list(model.parameters())))


def close(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("policy", [None, "mtr", "write"])
def test_checkpoints_of_the_model_and_of_its_blocks(policy: str | None, use_reentrant: bool) -> None:
    model = small(policy=policy)
    model(images()).square().sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]

    def backward(x: torch.Tensor) -> list[torch.Tensor | None]:
        model.zero_grad()
        whole = checkpoint(model, x, use_reentrant=use_reentrant) if x.requires_grad else model(x)
        whole.square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    assert close(backward(images().requires_grad_()), expected)
    for block in model.layers:
        run = block.forward
        block.forward = lambda *state, run=run: checkpoint(run, *state, use_reentrant=use_reentrant)
    assert close(backward(images()), expected)


@pytest.mark.parametrize("policy", [None, "mtr"])
def test_hooks_are_called_and_change_nothing(policy: str | None) -> None:
    model = small(policy=policy)
    expected = gradients(model, model(images()))
    forward, backward = set(), {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: forward.add(name))
        module.register_full_backward_hook(lambda _, __, grads, name=name: backward.update({name: grads[0]}))
    model(images().requires_grad_()).square().sum().backward()
    assert close([parameter.grad for parameter in model.parameters()], expected)
    containers = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    assert set(dict(model.named_modules())) - containers == forward
    for name in ("layers.1", "layers.1.mixer", *INNER):
        assert backward[name].abs().sum() > 0, name


def test_the_hook_of_a_block_may_replace_its_output() -> None:
    model = small().eval()
    model.layers[2].register_forward_hook(lambda _, __, state: state._replace(raw_hidden=0 * state.raw_hidden))
    shallow = small().eval()
    shallow.layers = shallow.layers[:2]
    assert torch.allclose(model(images()), shallow(images()), atol=1e-6)


def test_grad_cam_finds_the_patch_the_class_depends_on() -> None:
    """Gradient times activation of a block's norm, at the tokens of the patches (Selvaraju et al., 2017)."""
    model = small().eval()
    seen: dict[str, torch.Tensor] = {}
    norm = model.layers[1].norm
    norm.register_forward_hook(lambda _, __, output: (output[0] * only[..., None], output[1]))
    only = torch.zeros(17)
    only[5] = 1  # the scan of this block is given one token alone
    norm.register_forward_hook(lambda _, __, output: seen.update(activation=output[0]))
    norm.register_full_backward_hook(lambda _, __, grads: seen.update(gradient=grads[0]))
    x = images(1).requires_grad_()
    model(x)[0, 1].backward()
    weights = seen["gradient"].mean(1, keepdim=True)
    cam = (weights * seen["activation"]).sum(-1)
    assert cam.shape == (1, 17)
    assert cam.abs().argmax() == 5
    assert cam.abs().topk(2).values[0, 1] == 0


class Adapter(nn.Module):
    """Low-rank adaptation around any module (Hu et al., arXiv 2106.09685)."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) * (1 + self.scale)


ALIGNED = [None, "hsa"]  # hsa: the scan decays over what was removed


@pytest.mark.parametrize("policy", ALIGNED)
@pytest.mark.parametrize("name", INNER)
def test_an_adapter_on_an_inner_module_acts_and_trains(name: str, policy: str | None) -> None:
    model = small(policy=policy)
    expected = model(images())
    adapter = Adapter(model.get_submodule(name))
    model.set_submodule(name, adapter)
    output = model(images())
    assert torch.allclose(output, expected, atol=1e-5)  # not there yet, but called
    output.square().sum().backward()
    assert adapter.scale.grad.abs() > 0
    with torch.no_grad():
        adapter.scale.fill_(0.5)
        assert not torch.allclose(model(images()), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("layers.1.mixer.x_proj", nn.Linear(32, 33)),
        ("layers.1.mixer.dt_proj", nn.Linear(1, 32, bias=False)),
        ("layers.1.mixer.conv1d", nn.Conv1d(32, 32, 4, padding=6, dilation=2, groups=32)),
        ("layers.1.mixer.conv1d_b", nn.Conv1d(32, 32, 3, padding=2, groups=32, bias=False)),
        ("patch_embed.proj", nn.Conv2d(3, 16, 4, 4, padding=2, dilation=2)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_module_of_another_geometry_is_called(name: str, module: nn.Module) -> None:
    model = small().eval()
    expected = model(images())
    model.set_submodule(name, module)
    output = model(images())
    assert not torch.allclose(output, expected, atol=1e-5)
    module.register_forward_hook(lambda *_: None)  # has to be called now
    assert torch.equal(model(images()), output)


@pytest.mark.parametrize("name", ["vim_nano", "videomamba_ti"])
def test_called_modules_compute_the_same_as_their_parameters(name: str) -> None:
    for policy in (None, "mtr", "hsa", "write"):
        model = small(name, policy).eval()
        expected = model(images())
        for block in model.layers:
            block.mixer.dt_proj.register_forward_hook(lambda *_: None)
        assert torch.allclose(model(images()), expected, atol=1e-5), policy


def test_a_hook_changes_the_output_of_an_inner_module() -> None:
    model = small().eval()
    expected = model(images())
    hook = model.patch_embed.register_forward_hook(lambda _, __, tokens: tokens + 1)
    assert not torch.allclose(model(images()), expected)
    hook.remove()
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize("policy", ALIGNED)
def test_dynamic_quantisation_of_the_projections(policy: str | None) -> None:
    model = small(policy=policy).eval()
    expected = model(images())
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert "Dynamic" in repr(quantised.layers[0].mixer.x_proj)
    assert F.cosine_similarity(quantised(images()), expected).min() > 0.99


def test_a_traced_model_computes_the_same() -> None:
    model = small(policy="mtr").eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, images())
        for count in (2, 3):
            assert torch.allclose(traced(images(count) + 1), model(images(count) + 1), atol=1e-5)


def test_a_replica_has_no_parameters() -> None:
    """``DataParallel`` gives its replicas plain tensors in their place."""
    embed = small().patch_embed
    replica = embed._replicate_for_data_parallel()
    replica.proj = embed.proj._replicate_for_data_parallel()
    replica.proj.weight, replica.proj.bias = embed.proj.weight.detach(), embed.proj.bias.detach()
    assert torch.equal(replica(images()), embed(images()))


@pytest.mark.parametrize("policy", [None, "mtr"])
def test_forward_mode_and_function_transforms(policy: str | None) -> None:
    model, x = small(policy=policy).double().eval(), images().double()
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))

    def output(x: torch.Tensor) -> torch.Tensor:
        return model(x).square().sum()

    expected = (output(x + 1e-6 * direction) - output(x - 1e-6 * direction)) / 2e-6
    _, tangent = torch.func.jvp(output, (x,), (direction,))
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close((torch.func.grad(output)(x) * direction).sum(), expected, rtol=1e-4, atol=1e-8)


def test_a_hessian_vector_product_equals_finite_differences() -> None:
    model, x, labels = small().double(), images().double(), torch.tensor([0, 2])
    parameters = list(model.parameters())
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(2)) for p in parameters]

    def gradient(**options: bool) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(model(x), labels), parameters, **options)

    def moved(step: float) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=step)
        actual = gradient()
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=-step)
        return actual

    product = sum((g * d).sum() for g, d in zip(gradient(create_graph=True), direction, strict=True))
    actual = torch.autograd.grad(product, parameters)
    for one, ahead, behind in zip(actual, moved(1e-5), moved(-1e-5), strict=True):
        torch.testing.assert_close(one, (ahead - behind) / 2e-5, rtol=1e-3, atol=1e-5)


def test_a_training_step_compiles_without_a_loop_over_tokens() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model = small()
    expected = gradients(model, model(images()))
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=count, bw_compiler=count), fullgraph=True)
    assert close(gradients(model, compiled(images())), expected)
    forward, backward = graphs
    assert len(forward.graph.nodes) < 100 * len(model.layers)
    assert len(backward.graph.nodes) < 150 * len(model.layers)


def test_a_stand_in_for_a_package_is_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = ModuleType("mamba_ssm")
    stub.__spec__ = None
    monkeypatch.setitem(sys.modules, "mamba_ssm", stub)
    assert not installed("mamba_ssm")
    assert installed("torch")
