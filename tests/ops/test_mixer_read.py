"""The mixer for a few tokens that are read: against the whole mixer, in every combination of its options."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mtr_lab import ops

G, E, W, R, N = 2, 70, 4, 3, 5
SHAPES = ops.MambaWeights((E, 1, W), (E,), (R + 2 * N, E), (E, R), (E,), (E, N), (E,))
BOTH = (False, True)
POSITIONS = ([0], [8], [3], [7])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def make_weights(dtype: torch.dtype = torch.float32) -> ops.MambaWeights:
    return ops.MambaWeights(*(0.4 * normal(G, *shape, seed=seed).to(dtype) for seed, shape in enumerate(SHAPES)))


def make_options(images: int, length: int) -> dict[str, dict]:
    count = torch.Generator().manual_seed(3)
    source = torch.arange(length).repeat_interleave(2)[None].repeat(images, 1)
    source[:, 5] = -1
    size = torch.randint(1, 4, (images, length), generator=count).float()
    gap = torch.randint(0, 3, (images, G, length), generator=count)
    gap[..., 0] = 0
    return {
        "plain": {},
        "scaled": {"delta_scale": size.sqrt()},
        "runs": {"repeats": size},
        "aligned": {"gap": gap},
        "unmerged": {"index": torch.arange(0, 2 * length, 2)[None].repeat(images, 1), "source": source},
    }


def whole(x, z_all, read, weights, **options):
    """``mamba_inner`` of all tokens, read afterwards."""
    y, *_ = ops.mamba_inner(torch.cat([x, z_all], dim=-1), weights, **options)
    return y.gather(1, read[..., None].expand(-1, -1, E))


def take(z, read):
    return z.gather(1, read[..., None].expand(-1, -1, E))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", ["plain", "scaled", "runs", "aligned", "unmerged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_reading_the_whole_mixer(name, recorded, dtype):
    x, z = normal(4, 9, E, dtype=dtype), normal(4, 9, E, seed=1, dtype=dtype)
    read, weights, options = torch.tensor(POSITIONS), make_weights(dtype), make_options(4, 9)[name]
    with torch.set_grad_enabled(recorded):
        y = ops.mamba_inner_read(x, take(z, read), read, weights, reverse=BOTH, scale=0.5, **options)
    assert y.dtype == dtype
    torch.testing.assert_close(y, whole(x, z, read, weights, reverse=BOTH, scale=0.5, **options))


@pytest.mark.parametrize(
    ("positions", "directions"), [([[0, 4, 5], [2, 1, 8]], BOTH), ([[4], [2]], (True, False)), ([[4], [2]], (True,))]
)
@torch.no_grad()
def test_several_tokens_and_other_directions(positions, directions):
    x, z, read = normal(2, 9, E).float(), normal(2, 9, E, seed=1).float(), torch.tensor(positions)
    weights = ops.MambaWeights(*(field[: len(directions)] for field in make_weights()))
    y = ops.mamba_inner_read(x, take(z, read), read, weights, reverse=directions)
    torch.testing.assert_close(y, whole(x, z, read, weights, reverse=directions))


@torch.no_grad()
def test_tokens_beyond_the_one_that_is_read_are_not_scanned():
    """Tokens behind it are read backwards alone, those before it forwards alone, and the others' outputs not at all."""
    x, weights, read = normal(1, 9, E).float(), make_weights(), torch.tensor([[4]])
    z = normal(1, 1, E, seed=1).float()
    forward, backward = (ops.MambaWeights(*(field[g : g + 1] for field in weights)) for g in (0, 1))
    parts = [
        whole(x[:, :5], z.expand(1, 5, E), read, forward, reverse=(False,)),
        whole(x[:, 4:], z.expand(1, 5, E), read - 4, backward, reverse=(True,)),
    ]
    torch.testing.assert_close(ops.mamba_inner_read(x, z, read, weights, reverse=BOTH), sum(parts))


def test_an_image_does_not_depend_on_its_batch():
    x, z, read = normal(4, 9, E).float(), normal(4, 1, E, seed=1).float(), torch.tensor(POSITIONS)
    with torch.no_grad():
        together = ops.mamba_inner_read(x, z, read, make_weights(), reverse=BOTH)
        alone = [
            ops.mamba_inner_read(*(t[i : i + 1] for t in (x, z, read)), make_weights(), reverse=BOTH) for i in range(4)
        ]
    torch.testing.assert_close(together, torch.cat(alone))


def test_gradients():
    def run(x, z, *fields):
        return ops.mamba_inner_read(x, z, torch.tensor([[1]]), ops.MambaWeights(*fields), reverse=BOTH)

    small = ops.MambaWeights((2, 1, W), (2,), (1 + 2, 2), (2, 1), (2,), (2, 1), (2,))
    fields = [0.4 * normal(G, *shape, seed=seed) for seed, shape in enumerate(small)]
    inputs = [t.requires_grad_() for t in (normal(1, 3, 2), normal(1, 1, 2, seed=1), *fields)]
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("name", ["plain", "runs"])
@torch.no_grad()
def test_flops_are_those_of_one_more_than_all_tokens_wherever_the_token_is(name):
    x, z, weights, options = normal(4, 9, E).float(), normal(4, 1, E).float(), make_weights(), make_options(4, 9)[name]
    with FlopCounterMode(display=False) as counter:
        ops.mamba_inner_read(x, z, torch.tensor(POSITIONS), weights, reverse=BOTH, **options)
    products = 2 * E * (W + R + 2 * N + R)  # convolution, x_proj, dt_proj
    state = (7 if name == "plain" else 11) * E * N
    output = 2 * E * N + 2 * E
    assert counter.get_total_flops() == 4 * (10 * (products + state) + 2 * output)


@pytest.mark.parametrize("name", ["plain", "scaled", "runs", "aligned", "unmerged"])
@torch.no_grad()
def test_registration(name):
    options = make_options(4, 9)[name]
    tokens = [options.get(key) for key in ("gap", "delta_scale", "repeats", "index", "source")]
    packed = ops.pack(make_weights(), torch.float32)
    arguments = (
        normal(4, 9, E).float(), normal(4, 1, E).float(), torch.tensor(POSITIONS), *packed, *tokens, R, N, 0.5, "cpu"
    )  # fmt: skip
    operator = torch.ops.mtr_lab.mamba_inner_read.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.testing.assert_close(ops.decompositions()[operator](*arguments), operator(*arguments))
