"""When a graph is captured and when it is replayed; on a GPU, that a replay equals the model bit for bit."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import mtr_lab
from mtr_lab import ops
from mtr_lab.backbones.cuda_graph import CompiledModel, Recording
from mtr_lab.reduction import Reduction, policy_config


class Rehearsal(CompiledModel):
    """Captures on the CPU: replays call a copy of the model with the weights at the time of capture."""

    device_type = "cpu"

    def __init__(self, model, max_graphs: int = 32) -> None:
        super().__init__(model, max_graphs)
        self.captured: list[tuple[Tensor, Recording | None]] = []

    def capture(self, images: Tensor, sibling: Recording | None) -> Recording:
        self.captured.append((images, sibling))
        frozen = copy.deepcopy(self.model)
        logits = self.model(images)
        replay = SimpleNamespace(replay=lambda: logits.copy_(frozen(images)))
        return Recording(replay, images, logits, None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    """Where gradients are asked for, other kernels run, which round differently."""
    with torch.no_grad():
        yield


@pytest.fixture
def reference() -> Iterator[None]:
    """No packed weights, which hold one dtype."""
    with ops.use_backend("reference"):
        yield


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mtr_lab.create_model("vim_nano", depth=6, embed_dim=16, img_size=32).eval()


def images(count: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_a_replay_equals_the_model_and_is_captured_once(model) -> None:
    fast = Rehearsal(model)
    with torch.enable_grad():
        assert not fast(images()).requires_grad
    outputs = [fast(images(seed=seed)) for seed in range(3)]
    for seed, output in enumerate(outputs):
        assert torch.equal(output, model(images(seed=seed)))  # the earlier ones were not written over
    assert len(fast.captured) == 1


def test_shapes_dtypes_and_layouts_get_a_graph_each_and_graphs_of_one_layout_one_input(model) -> None:
    fast = Rehearsal(model)
    batches = [images(), images(3), images(2, 40), images().to(memory_format=torch.channels_last)]
    reduction = Reduction(model, policy_config("mtr"))
    for _ in range(2):
        for batch in batches:
            assert torch.equal(fast(batch), model(batch))
    assert len(fast.captured) == len(batches)
    reduction.use(reduction.solve(0.3))
    fast(batches[0])
    assert fast.captured[-1][0] is fast.captured[0][0]
    assert len({id(static) for static, _ in fast.captured}) == len(batches)


def test_later_captures_share_the_memory_of_an_earlier_one(model) -> None:
    fast = Rehearsal(model)
    fast(images(1))
    fast(images(2))
    assert fast.captured[0][1] is None
    assert fast.captured[1][1] is not None
    assert fast.captured[1][1].images is fast.captured[0][0]
    model.double().float()
    fast(images(2))
    assert fast.captured[2][1] is None  # the graphs of the old weights and their pool were freed


def test_a_schedule_gets_a_graph_and_going_back_to_it_replays(model) -> None:
    fast = Rehearsal(model)
    reduction = Reduction(model, policy_config("mtr"))
    schedules = [reduction.solve(ratio) for ratio in (0.0, 0.2, 0.3)]
    for _ in range(2):
        for schedule in schedules:
            reduction.use(schedule)
            assert torch.equal(fast(images()), model(images()))
    assert len(fast.captured) == 3


def test_patching_anew_and_unpatching_are_seen(model) -> None:
    unreduced = model(images())
    fast = Rehearsal(model)
    counts = [0, 3, 0, 0, 0, 0]
    outputs = []
    for policy in ("mtr", "write", "hsa", "random"):
        mtr_lab.patch(model, policy, schedule=counts)
        outputs.append(fast(images()))
        assert torch.equal(outputs[-1], model(images()))
    assert not any(torch.equal(outputs[0], other) for other in outputs[1:])  # or the test could not tell them apart
    mtr_lab.unpatch(model)
    assert torch.equal(fast(images()), unreduced)
    assert len(fast.captured) == 5


def test_another_pooling_is_seen(model) -> None:
    fast = Rehearsal(model)
    for pooling in ("token", "avg", ""):
        model.reset_classifier(0, pooling)
        for _ in range(2):
            assert torch.equal(fast(images()), model(images()))


def change_in_place(model) -> None:
    with torch.no_grad():
        model.head.bias += 1


def load(model) -> None:
    model.load_state_dict({name: weight + 0.01 for name, weight in model.state_dict().items()})


def assign(model) -> None:
    model.load_state_dict({name: weight + 0.01 for name, weight in model.state_dict().items()}, assign=True)


def replace_head(model) -> None:
    model.head = torch.nn.Linear(16, 4)


def round_weights(model) -> None:
    model.bfloat16().float()


def free_and_allocate_again(model) -> None:
    values = model.head.weight.detach() + 1
    model.head.weight.data = torch.empty(0)
    model.head.weight.data = values.clone()  # where the old ones were, if nobody holds them


CHANGES = [change_in_place, load, assign, replace_head, round_weights, free_and_allocate_again]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen_by_every_graph(model, change: Callable) -> None:
    fast = Rehearsal(model)
    before = [fast(images(1)), fast(images(2))]
    change(model)
    for old, batch in zip(before, (images(1), images(2)), strict=True):
        new = fast(batch)
        assert torch.equal(new, model(batch))
        assert not torch.equal(new, old)
    assert len(fast.captured) == 4
    fast(images(1))
    assert len(fast.captured) == 4


def test_another_dtype_of_the_model_is_seen(model) -> None:
    fast = Rehearsal(model)
    fast(images())
    model.double()
    assert torch.equal(fast(images().double()), model(images().double()))


@pytest.mark.usefixtures("reference")
def test_backend_autocast_and_training_mode_are_told_apart(model) -> None:
    fast = Rehearsal(model)
    fast(images())
    with ops.use_backend("portable"):
        fast(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast(images())
    model.train()
    fast(images())
    assert len(fast.captured) == 4
    model.eval()
    fast(images())
    assert len(fast.captured) == 4


def test_weights_that_a_forward_pass_repacks_are_captured_once(model) -> None:
    """A kernel may repack weights in a buffer, at the first call and after every change."""
    seen = None

    def repack(module, inputs) -> None:
        nonlocal seen
        if seen != module.head.weight._version:
            seen = module.head.weight._version
            module.register_buffer("packed", module.head.weight.detach().clone(), persistent=False)

    model.register_forward_pre_hook(repack)
    fast = Rehearsal(model)
    for _ in range(3):
        fast(images(1))
    assert len(fast.captured) == 1
    change_in_place(model)
    load(model)
    for _ in range(3):
        fast(images(1))
    assert len(fast.captured) == 2


def test_a_capture_that_repacks_weights_outdates_the_graphs_before_it(model) -> None:
    """A kernel may repack weights for the size of the batch."""
    count = 0

    def repack(module, inputs) -> None:
        nonlocal count
        if count != len(inputs[0]):
            count = len(inputs[0])
            module.register_buffer("packed", module.head.weight.detach().clone(), persistent=False)

    model.register_forward_pre_hook(repack)
    fast = Rehearsal(model)
    for batch in (1, 2, 1):
        fast(images(batch))
    assert len(fast.captured) == 3


class Layout:
    """A copy of the weights in a kernel's order, which a module caches in a plain attribute."""


def test_a_packed_copy_of_weights_lives_as_long_as_the_graph_that_reads_it(model) -> None:
    def lay_out(module, inputs) -> None:
        if getattr(module, "dtype", None) != inputs[0].dtype:
            module.dtype, module.layout = inputs[0].dtype, Layout()

    model.head.register_forward_pre_hook(lay_out)
    fast = Rehearsal(model)
    fast(images())
    layout = weakref.ref(model.head.layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.forward_head(torch.zeros(1, 16, dtype=torch.bfloat16))
    assert model.head.layout is not layout()
    assert layout() is not None
    change_in_place(model)
    fast(images())
    gc.collect()
    assert layout() is None


def test_the_least_recently_used_graph_goes_first(model) -> None:
    fast = Rehearsal(model, max_graphs=2)
    for count in (1, 2, 1, 3, 1):  # 3 takes the place of 2
        fast(images(count))
    assert len(fast.captured) == 3
    fast(images(2))
    assert len(fast.captured) == 4
    with pytest.raises(ValueError, match="max_graphs >= 2"):
        mtr_lab.compile(model, max_graphs=1)


def test_it_may_be_called_in_and_out_of_inference_mode(model) -> None:
    fast = Rehearsal(model)
    with torch.inference_mode():
        with_mode = fast(images().clone())
    outside = fast(images())
    assert torch.equal(with_mode, outside)
    outside += 1
    assert len(fast.captured) == 1


@torch.enable_grad()
def test_on_a_cpu_it_is_the_model_with_gradients(model) -> None:
    output = mtr_lab.compile(model)(images())
    assert torch.equal(output, model(images()))
    output.sum().backward()
    assert model.head.weight.grad is not None


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Without it, the order in which merged tokens are added changes from call to call."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_a_gpu_a_replay_is_the_model_bit_for_bit(deterministic: None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = mtr_lab.create_model("vim_nano").eval().to("cuda", dtype)
    fast = mtr_lab.compile(model)
    batches = [torch.randn(count, 3, 112, 112, device="cuda", dtype=dtype) for count in (1, 5, 1)]

    def check() -> list[Tensor]:
        outputs = [fast(batch) for batch in batches]
        with torch.no_grad():
            for batch, output in zip(batches, outputs, strict=True):
                assert torch.equal(output, model(batch))
        return outputs

    unreduced = check()
    for policy in ("mtr", "write"):
        reduction = mtr_lab.patch(model, policy, ratio=0.4)
        reduced = check()
        assert not torch.equal(reduced[0], unreduced[0])
        reduction.use(reduction.solve(0.2))
        check()
    mtr_lab.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(check(), unreduced, strict=True))
    change_in_place(model)
    assert not torch.equal(check()[0], unreduced[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_autocast_in_inference_mode_is_captured() -> None:
    torch.manual_seed(0)
    model = mtr_lab.create_model("vim_nano").eval().cuda()
    fast = mtr_lab.compile(model)
    batch = torch.randn(3, 3, 112, 112, device="cuda")
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        expected, first = model(batch), fast(batch)
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        again = fast(batch)
    assert torch.equal(first, expected)
    assert torch.equal(again, expected)
