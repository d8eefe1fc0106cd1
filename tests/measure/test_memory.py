import pytest
import torch
from torch import Tensor, nn

from mtr_lab.measure.memory import MIB, peak_memory_mib

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
SLACK = 0.01  # MiB: scalars on the CPU, rounding to 512 bytes on a GPU


@torch.library.custom_op("mtr_lab_test::sum_of_copies", mutates_args=())
def sum_of_copies(x: Tensor, copies: int) -> Tensor:
    return x.repeat(copies, 1).view(copies, *x.shape).sum(dim=0)


def floats(mib: float, device: str) -> Tensor:
    return torch.zeros(1, int(mib * MIB / 4), device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_chain_holds_two_tensors_at_a_time(device: str) -> None:
    x = floats(2, device)

    def chain() -> Tensor:
        y = x + 1
        for _ in range(5):
            y = y + 1
        return y

    assert peak_memory_mib(chain, [x], device) == pytest.approx(2 + 2 * 2, abs=SLACK)
    assert peak_memory_mib(chain, [], device) == pytest.approx(2 * 2, abs=SLACK)


@pytest.mark.parametrize("device", DEVICES)
def test_in_place_operations_and_views_cost_nothing(device: str) -> None:
    x = floats(3, device)
    assert peak_memory_mib(lambda: x.add_(1).view(-1)[5:], [x], device) == pytest.approx(3, abs=SLACK)


@pytest.mark.parametrize("device", DEVICES)
def test_a_storage_counts_once(device: str) -> None:
    x = floats(1, device)
    assert peak_memory_mib(lambda: None, [x, x[:, 7:], x.view(2, -1)], device) == pytest.approx(1, abs=SLACK)


@pytest.mark.parametrize("device", DEVICES)
def test_custom_operators_show_what_they_return_and_use_inside(device: str) -> None:
    x = floats(1, device)
    sum_of_copies(x, 6)
    assert peak_memory_mib(lambda: sum_of_copies(x, 6), [x], device) == pytest.approx(1 + 6 + 1, abs=SLACK)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_keep_the_activations_alive(device: str) -> None:
    net = nn.Sequential(*[nn.Sequential(nn.Linear(512, 512, bias=False), nn.Sigmoid()) for _ in range(4)]).to(device)
    x = torch.randn(512, 512, device=device)  # 1 MiB, as every weight and activation
    net(x)
    with torch.no_grad():
        inference = peak_memory_mib(lambda: net(x), [*net.parameters(), x], device)
    training = peak_memory_mib(lambda: net(x), [*net.parameters(), x], device)
    assert inference == pytest.approx(4 + 1 + 3, abs=SLACK)  # a layer's input, its product and the sigmoid of it
    assert training == pytest.approx(4 + 1 + 4 + 1, abs=SLACK)  # every sigmoid and the product of the last


def test_the_figure_repeats_and_ignores_other_tensors() -> None:
    net = nn.Sequential(nn.Conv1d(8, 32, 3), nn.GELU(), nn.Conv1d(32, 8, 3))
    x = torch.randn(4, 8, 1001)
    first = peak_memory_mib(lambda: net(x), [*net.parameters(), x], "cpu")
    other = floats(8, "cpu")
    assert [peak_memory_mib(lambda: net(x), [*net.parameters(), x], "cpu") for _ in range(3)] == [first] * 3
    assert len(other)


def test_the_measurement_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    peak_memory_mib(lambda: torch.ones(3), [], "cpu")
    assert capfd.readouterr() == ("", "")
