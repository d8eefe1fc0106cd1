"""Whole models on the kernels: inference, reduced and unreduced, against the reference in float64."""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from new_statistics import NEW
from torch.utils.flop_counter import FlopCounterMode

import mtr_lab
from mtr_lab import ops
from mtr_lab.backbones.bimamba import INNER
from mtr_lab.measure.flops import counted_flops, model_flops
from mtr_lab.ops.convolution import causal_conv1d_reference
from mtr_lab.ops.gpu import occupancy, project
from mtr_lab.ops.statistics import STATISTICS

SLOW = pytest.mark.slow
GEOMETRY = {"img_size": 24, "patch_size": 8, "stride": 8, "depth": 3, "embed_dim": 20, "d_state": 5, "num_classes": 3}


def model(name="vim_ti", **geometry):
    torch.manual_seed(0)
    made = mtr_lab.create_model(name, **GEOMETRY | geometry).eval()
    for parameter in made.parameters():  # biases and skips too
        parameter.data += 0.02 * torch.randn_like(parameter)
    return made


def mixer_weights(made):
    mixer = made.blocks[0].mixer
    inner = [[getattr(mixer, name), getattr(mixer, f"{name}_b")] for name in INNER]
    return mixer._weights(mixer.paths, *inner)


def packed(made):
    return ops.pack(mixer_weights(made), torch.float32)


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("vim_ti", torch.float32),
        ("videomamba_ti", torch.float16),
        pytest.param("videomamba_ti", torch.float32, marks=SLOW),
        pytest.param("vim_ti", torch.bfloat16, marks=SLOW),
    ],
)
def test_unreduced(name, dtype):
    made, images = model(name, depth=2), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        with ops.use_backend("reference"):
            expected = copy.deepcopy(made).double()(images.double())
        made, images = made.to(dtype), images.to(dtype)
        with ops.use_backend("reference"):
            of_the_reference = relative(made(images), expected)
        with ops.use_backend("triton"):
            # Triton's interpreter truncates to bfloat16 instead of rounding, which doubles the error.
            factor = 4 if dtype == torch.bfloat16 and not torch.cuda.is_available() else 2
            assert relative(made(images), expected) < factor * of_the_reference + 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    made, images = model().half(), torch.randn(2, 3, 24, 24).half()
    mtr_lab.patch(made, "mtr", schedule=[3, 0, 2])
    with torch.no_grad():
        elsewhere = copy.deepcopy(made).to("cuda:1")(images.to("cuda:1"))
        assert elsewhere.get_device() == 1
        torch.testing.assert_close(elsewhere.to("cuda:0"), made(images))


def test_kernels_run_on_the_device_of_their_data(monkeypatch):
    current = [0]

    @contextmanager
    def device_of(tensor):
        before, current[0] = current[0], tensor.get_device()
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    where = occupancy.on_its_device(lambda tensor, more=0: (current[0], more))
    data = SimpleNamespace(is_cuda=True, get_device=lambda: 3)
    assert where(data, more=1) == where(tensor=data, more=1) == (3, 1)
    assert where(SimpleNamespace(is_cuda=True, get_device=lambda: 0)) == (0, 0)
    assert where(torch.zeros(1, device="cpu")) == (0, 0)
    assert current == [0]


@pytest.mark.parametrize(
    "policy",
    [
        "write",
        "fovea",
        "hsa",
        "utr",
        *(pytest.param(name, marks=SLOW) for name in ("mtr", "random", "rmeeto", "tome", "evit")),
    ],
)
def test_reduced(policy):
    made, images = model(), torch.randn(2, 3, 24, 24)
    mtr_lab.patch(made, policy, schedule=[3, 0, 2])
    with torch.no_grad():
        with ops.use_backend("reference"):
            expected = copy.deepcopy(made).double()(images.double())
        with ops.use_backend("triton"):
            assert relative(made(images), expected) < 1e-5


EARLY = {"features": "residual", "merge_at": "scan"}
LAST = {"last_block": "read", "convolution": "unmerged"}


@pytest.mark.parametrize("parts", [{"convolution": "unmerged"}, {"stretch": "exact"}, EARLY, LAST])
def test_parts_that_later_blocks_read(parts):
    made, images = model(), torch.randn(2, 3, 24, 24)
    mtr_lab.patch(made, "write", schedule=[3, 0, 2], **parts)
    with torch.no_grad():
        with ops.use_backend("reference"):
            expected = copy.deepcopy(made).double()(images.double())
        with ops.use_backend("triton"):
            assert relative(made(images), expected) < 1e-5


def test_trace():
    made, images = model(), torch.randn(1, 3, 24, 24)
    mtr_lab.patch(made, "mtr", schedule=[3, 0, 2])
    with torch.no_grad(), ops.use_backend("triton"):
        states = mtr_lab.trace(made, images)
    assert [state.hidden.shape[1] for state in states] == [7, 7, 5]
    assert all(state.pending is None for state in states)


@SLOW
@pytest.mark.parametrize("form", [16, 32, "chunks"], indirect=True)
@pytest.mark.usefixtures("form")
def test_reduced_in_every_form_of_the_scan():
    test_reduced("hsa")


def test_many_tokens_are_convolved_in_runs(monkeypatch):
    monkeypatch.setattr(project, "SMALL", 0)
    weights = packed(model())
    x = torch.randn(2, 37, 40)  # runs of 19 and 18 tokens
    u, *_ = project.project(x, weights, None, (False, True), ())
    expected = causal_conv1d_reference(x, weights.conv_weight.mT, weights.conv_bias, (False, True))
    torch.testing.assert_close(u, expected)


@pytest.mark.parametrize(("width", "num_sms"), [(72, 1), (160, 8)])
def test_several_programs_share_the_channels_of_a_token(width, num_sms, monkeypatch):
    monkeypatch.setattr(project, "num_sms", lambda device: num_sms)
    assert project.channel_blocks(2 * 14, 2 * width, torch.device("cpu")) > 1
    weights = packed(model(embed_dim=width))
    x = torch.randn(2, 7, 2 * width)
    u, delta, _, sums = project.project(x, weights, None, (False, True), ("delta", "write"))
    expected = torch.stack([delta.sum(-1), (delta * u).square().sum(-1)], dim=-1)
    torch.testing.assert_close(sums, expected)


def test_new_statistics_of_the_fused_mixer(monkeypatch):
    for name, statistic in NEW.items():
        monkeypatch.setitem(STATISTICS, name, statistic)
    weights, xz = mixer_weights(model()), torch.randn(1, 5, 80)
    options = {"reverse": (False, True), "stats": ("absolute", "taken", "output", "delta")}
    with torch.no_grad():
        with ops.use_backend("triton"):
            _, sums, *_ = ops.mamba_inner(xz, weights, **options)
        with ops.use_backend("reference"):
            _, expected, *_ = ops.mamba_inner(xz, weights, **options)
    torch.testing.assert_close(sums, expected)


@pytest.mark.parametrize(
    ("tokens", "channels", "expected"),
    [(10**6, 768, 1), (0, 768, 6), (394, 768, 6), (394, 384, 6), (394, 1536, 8), (2 * 8 * 674, 768, 4), (64, 20, 1)],
)
def test_every_program_of_few_tokens_has_channels(tokens, channels, expected, monkeypatch):
    monkeypatch.setattr(project, "num_sms", lambda device: 132)
    blocks = project.channel_blocks(tokens, channels, torch.device("cpu"))
    assert blocks == expected
    tiles = -(-channels // project.TILE)
    assert (blocks - 1) * -(-tiles // blocks) < tiles  # the last program has at least one tile


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("policy", [None, "mtr"])
def test_no_images(policy, backend):
    made = model()
    if policy:
        mtr_lab.patch(made, policy, schedule=[3, 0, 2])
    with torch.no_grad(), ops.use_backend(backend):
        assert made(torch.randn(0, 3, 24, 24)).shape == (0, 3)


def test_a_changed_parameter_is_packed_again():
    made, images = model(depth=2), torch.randn(1, 3, 24, 24)
    with torch.no_grad(), ops.use_backend("triton"):
        before = made(images)
        for name in ("conv1d_b.bias", "x_proj.weight", "A_log"):
            made.get_parameter(f"layers.1.mixer.{name}").mul_(1.1)
            after = made(images)
            assert not torch.equal(after, before), name
            before = after
        made.load_state_dict(model(depth=2).state_dict())
        assert not torch.equal(made(images), before)
        assert made.half()(images.half()).dtype == torch.float16


def test_changes_without_a_new_version():
    """Fused optimizers and writes to ``parameter.data`` do not bump versions, and a parametrisation hides them."""
    made, images = model(depth=2), torch.randn(1, 3, 24, 24)

    def outputs():
        with torch.no_grad():
            with ops.use_backend("triton"):
                actual = made(images)
            with ops.use_backend("reference"):  # on a copy, so that the model itself runs no other pass
                return actual, copy.deepcopy(made)(images)

    outputs()
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.1, fused=True)
    with ops.use_backend("triton"):
        made(images)  # packs again only after a pass with gradients
        made(images).sum().backward()
    optimizer.step()
    torch.testing.assert_close(*outputs())
    for parameter in made.parameters():
        parameter.data *= 1.1
    made.eval()
    torch.testing.assert_close(*outputs())
    torch.nn.utils.parametrize.register_parametrization(made.blocks[1].mixer.x_proj, "weight", torch.nn.Tanh())
    outputs()
    made.blocks[1].mixer.x_proj.parametrizations.weight.original.data *= 1.5
    torch.testing.assert_close(*outputs())


def test_state_dict_and_copies_have_no_packed_weights():
    made, names = model(), set(model().state_dict())
    with torch.no_grad(), ops.use_backend("triton"):
        actual = made(torch.ones(1, 3, 24, 24))
        assert set(made.state_dict()) == names
        assert made.blocks[0].mixer.packed.entry
        assert copy.deepcopy(made).blocks[0].mixer.packed.entry is None
        assert torch.equal(copy.deepcopy(made)(torch.ones(1, 3, 24, 24)), actual)


@pytest.mark.parametrize("policy", ["write", pytest.param(None, marks=SLOW), pytest.param("mtr", marks=SLOW)])
def test_training_gradients(policy):
    made, images = model(depth=2), torch.randn(2, 3, 24, 24)
    if policy:
        mtr_lab.patch(made, policy, schedule=[3, 0])
    exact = copy.deepcopy(made).double()
    with ops.use_backend("reference"):
        exact(images.double()).square().sum().backward()
    with ops.use_backend("triton"):
        made(images).square().sum().backward()
    for (name, actual), expected in zip(made.named_parameters(), exact.parameters(), strict=True):
        assert relative(actual.grad, expected.grad) < 1e-4, name


@pytest.mark.parametrize("policy", [None, "write", pytest.param("utr", marks=SLOW)])
def test_flops_are_those_of_the_composed_model(policy):
    made, images = model(), torch.randn(1, 3, 24, 24)
    if policy:
        mtr_lab.patch(made, policy, schedule=[3, 2, 0])
    with ops.use_backend("reference"):
        expected = counted_flops(made, images)
    with ops.use_backend("triton"):
        assert counted_flops(made, images) == expected
        if not policy:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                made(images)
            assert counter.get_total_flops() == model_flops(made)


@pytest.mark.slow
def test_flops_of_a_training_step_are_those_of_the_composed_model():
    made, images = model(depth=2), torch.randn(1, 3, 24, 24)
    counted = {}
    for backend in ("reference", "triton"):
        with ops.use_backend(backend), FlopCounterMode(display=False) as counter:
            made(images).sum().backward()
        counted[backend] = counter.get_total_flops()
    assert counted["triton"] == counted["reference"]


@pytest.mark.parametrize("policy", ["write", pytest.param(None, marks=SLOW)])
def test_compiles_without_graph_break(policy):
    made, images = model(depth=2), torch.randn(1, 3, 24, 24)
    if policy:
        mtr_lab.patch(made, policy, schedule=[3, 0])
    with torch.no_grad(), ops.use_backend("triton"):
        compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), made(images))


def test_registration():
    weights = packed(model())
    for stats in ("", "delta", "write output", "output"):
        arguments = (torch.randn(1, 5, 80), *weights, *(None,) * 5, [False, True], 2, 5, stats, 0.5, "triton")
        operator = torch.ops.mtr_lab.mamba_inner.default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
        torch.testing.assert_close(ops.decompositions()[operator](*arguments), operator(*arguments))
