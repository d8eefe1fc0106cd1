"""VMamba: parity with the authors' model, loops in float64, the pyramid, and what a reduction does to it."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from authors_objects import vssm
from test_golden import load, parameters, relative_error
from torch import Tensor, nn

import mtr_lab
from mtr_lab import UserError, create_model, ops
from mtr_lab.backbones import blocks_of
from mtr_lab.backbones.norms import LayerNorm2d
from mtr_lab.measure.flops import counted_flops, model_costs
from mtr_lab.reduction import trace
from mtr_lab.tasks.features import FeatureMaps
from mtr_lab.tokens import TokenState, restore
from mtr_lab.tokens.positions import Positions

ABOUT_THE_FILE = ("notes", "upstream")


def official(**changes: Any) -> tuple[Any, dict[str, Tensor]]:
    """The model with the authors' random parameters, and the tensors of their file."""
    arguments, golden = load("vmamba_official")
    model = create_model("vmamba_t", **{k: v for k, v in arguments.items() if k not in ABOUT_THE_FILE}, **changes)
    model.load_state_dict(parameters(golden), strict=True)
    return model.eval(), golden


def small(**changes: Any) -> Any:
    torch.manual_seed(0)
    geometry = {"img_size": (72, 104), "dims": 8, "depths": (1, 2, 3, 1), "num_classes": 5, "ssm_d_state": 2}
    return create_model("vmamba_t", **{**geometry, **changes}).eval()


@pytest.mark.parametrize("backend", ["reference", "cpu", "portable"])
@torch.no_grad()
def test_outputs_equal_the_authors(backend: str) -> None:
    model, golden = official()
    mixed: list[Tensor] = []
    model.stages[2].blocks[0].op.register_forward_hook(lambda *call: mixed.append(call[2][0]))
    images = golden["input"]
    with ops.use_backend(backend):
        logits, (features, maps) = model(images), model.forward_intermediates(images)
        pooled = model.forward_head(features, pre_logits=True)
    assert relative_error(logits, golden["logits"]) < 1e-5
    assert relative_error(pooled, golden["features"]) < 1e-5
    operator = golden["layer.2.block.0.op"]
    assert relative_error(mixed[0].transpose(1, 2).unflatten(2, operator.shape[2:]), operator) < 1e-5
    for stage, actual in enumerate(maps):
        assert relative_error(actual, golden[f"layer.{stage}.blocks"]) < 1e-5


@torch.no_grad()
def test_the_file_tells_the_paths_apart() -> None:
    model, golden = official()
    for block in blocks_of(model):
        block.op.x_proj_weight.copy_(block.op.x_proj_weight[[0, 2, 1, 3]])
    assert relative_error(model(golden["input"]), golden["logits"]) > 1e-3


@torch.no_grad()
def test_a_mixer_equals_loops_over_its_paths() -> None:
    """Two states, an odd grid, in float64."""
    model = small().double()
    mixer, rows, columns = model.stages[0].blocks[0].op, 3, 5
    tokens = torch.randn(2, rows * columns, 8, dtype=torch.float64)
    grid = torch.arange(rows * columns).view(rows, columns)
    u = F.silu(mixer.conv2d(mixer.in_proj(tokens).transpose(1, 2).unflatten(2, (rows, columns)))).flatten(2)
    total = torch.zeros_like(u)
    orders = grid.flatten(), grid.T.flatten(), grid.flatten().flip(0), grid.T.flatten().flip(0)
    A, D = -mixer.A_logs.exp().view(4, mixer.d_inner, 2), mixer.Ds.view(4, mixer.d_inner)
    for k, order in enumerate(orders):
        state = torch.zeros(2, mixer.d_inner, 2, dtype=torch.float64)
        for place in order:
            x = u[:, :, place]
            low_rank, b, c = (x @ mixer.x_proj_weight[k].T).split([mixer.dt_rank, 2, 2], dim=1)
            delta = F.softplus(low_rank @ mixer.dt_projs_weight[k].T + mixer.dt_projs_bias[k])[..., None]
            state = (delta * A[k]).exp() * state + delta * x[..., None] * b[:, None]
            total[:, :, place] += (state * c[:, None]).sum(-1) + D[k] * x
    expected = mixer.out_proj(mixer.out_norm(total.transpose(1, 2)))
    layout = model.layouts((4 * rows, 4 * columns))[0]
    actual, _ = mixer(tokens, Positions(TokenState.start(tokens, (), layout)))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("options", [{"elementwise_affine": False}, {"bias": False}, {}], ids=str)
@torch.no_grad()
def test_every_layer_norm_normalises(options: dict[str, bool]) -> None:
    """With neither weight nor bias, with a weight alone, with both: at their initial values they change nothing."""
    model = small()
    mixer, tokens = model.stages[0].blocks[0].op, torch.randn(2, 15, 8)
    positions = Positions(TokenState.start(tokens, (), model.layouts((12, 20))[0]))
    expected, _ = mixer(tokens, positions)
    mixer.out_norm = nn.LayerNorm(mixer.d_inner, **options)
    actual, _ = mixer(tokens, positions)
    torch.testing.assert_close(actual, expected)
    maps = torch.randn(2, 8, 3, 5)
    normed = F.layer_norm(maps.movedim(1, -1), (8,)).movedim(-1, 1)
    torch.testing.assert_close(LayerNorm2d(8, **options)(maps), normed)


@pytest.mark.parametrize(
    ("name", "literature", "published"), [("vmamba_t", 4.88, 4.9), ("vmamba_s", 8.67, 8.7), ("vmamba_b", 15.29, 15.4)]
)
def test_flops_are_the_published_ones(name: str, literature: float, published: float) -> None:
    """The authors count norms, too, which are up to 0.7 %."""
    with torch.device("meta"):
        costs, _ = model_costs(create_model(name))
    assert costs.literature / 1e9 == pytest.approx(literature, abs=0.005)
    assert costs.literature / 1e9 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("size", [(32, 32), (72, 104), (33, 50), (5, 1)])
@torch.no_grad()
def test_any_size(size: tuple[int, int]) -> None:
    model = small()
    layouts = model.layouts(size)
    maps = FeatureMaps(model, 4)(torch.randn(1, 3, *size))
    assert [tuple(level.shape[2:]) for level in maps] == [layout.grid for layout in layouts]
    assert layouts[0].grid == tuple(math.ceil(side / 4) for side in size)
    assert [level.shape[1] for level in maps] == [8, 16, 32, 64]


@torch.no_grad()
def test_dense_tasks_get_the_pyramid() -> None:
    model, images = small(), torch.randn(1, 3, 72, 104)
    features = FeatureMaps(model, 4)
    assert features.strides == [4, 8, 16, 32]
    _, expected = model.forward_intermediates(images)
    for actual, level in zip(features(images), expected, strict=True):
        torch.testing.assert_close(actual, level)
    mtr_lab.patch(model, "mtr", ratio=0.2, first_block=0)
    for level, reduced in zip(expected, model.forward_intermediates(images)[1], strict=True):
        assert reduced.shape == level.shape
        assert not torch.equal(reduced, level)


@torch.no_grad()
def test_features_only() -> None:
    model = small(features_only=True, out_indices=(1, 3))
    assert [tuple(level.shape) for level in model(torch.randn(1, 3, 64, 64))] == [(1, 16, 8, 8), (1, 64, 2, 2)]
    assert small(features_only=True, out_indices=2).feature_info.channels() == [32, 64]


@torch.no_grad()
def test_the_last_stage_is_pooled_by_size() -> None:
    """Pooling the survivors equals the mean over the restored map."""
    model, images = small(), torch.randn(2, 3, 72, 104)
    reduction = mtr_lab.patch(model, "tome", schedule=[0, 0, 0, 0, 0, 0, 4])
    assert trace(model, images)[-1].index.shape[1] == 12 - 4
    torch.testing.assert_close(model(images), model.forward_head(model.forward_features(images)))
    assert counted_flops(model, images) == (reduction.schedule.flops, reduction.schedule.flops_overhead)


@torch.no_grad()
def test_a_stage_is_restored_by_what_its_tokens_gain() -> None:
    """``skip``: a position keeps its own last features, and gains what the token that absorbed it has gained since."""
    model, images = small(), torch.randn(2, 3, 72, 104)
    mtr_lab.patch(model, "mtr", schedule=[0, 40, 0, 0, 0, 0, 0])
    state, with_skip = trace(model, images)[2], model(images)
    expected = model.layers[1]["downsample"](restore(state, (9, 13), "skip"))
    torch.testing.assert_close(model.enter(2, state).hidden, expected.flatten(2).transpose(1, 2))
    model.restoration = "nearest"
    assert trace(model, images)[1].offset is None
    assert not torch.equal(model(images), with_skip)


@torch.no_grad()
def test_a_stage_follows_the_grid_that_storm_leaves() -> None:
    model, images = small(), torch.randn(2, 3, 72, 104)
    sides = [len(set(state.index.flatten().tolist())) for state in trace(model, images)]
    removed = [18 * 26 - 15 * 22, 0, 0, 0, 0, 0, 0]
    schedule = mtr_lab.patch(model, "storm", schedule=removed).schedule
    assert schedule.tokens == (18 * 26, 8 * 11, 8 * 11, 4 * 6, 4 * 6, 4 * 6, 2 * 3)
    assert [state.layout.grid for state in trace(model, images)][::3] == [(18, 26), (4, 6), (2, 3)]
    assert counted_flops(model, images) == (schedule.flops, schedule.flops_overhead)
    assert sides[-1] == 12
    with pytest.raises(UserError, match=r"removes 5 tokens after block 1: of the 88 there, storm can remove 8 or "):
        mtr_lab.patch(model, "storm", schedule=[*removed[:1], 5, *removed[2:]])
    grid = FeatureMaps(model, 4)(images)[-1].shape[2:]
    assert tuple(grid) == (3, 4)  # of the picture, on which heads were trained


@pytest.mark.parametrize(("policy", "most"), [("mtr", r"0\.8"), ("mlp", r"0\.33"), ("quartermap", r"0\.0338")])
def test_a_ratio_out_of_reach_names_the_most(policy: str, most: str) -> None:
    with torch.device("meta"):
        model = create_model("vmamba_t", img_size=(96, 128))
    with pytest.raises(UserError, match=rf"out of reach: at most {most}\d* of the FLOPs"):
        mtr_lab.patch(model, policy, ratio=0.9, first_block=0)


def test_equal_shares_of_every_stage_go() -> None:
    with torch.device("meta"):
        model = create_model("vmamba_t")
    removed = mtr_lab.patch(model, "mtr", ratio=0.3, first_block=0).schedule.remove
    shares = [removed[block] / tokens for block, tokens in ((0, 3136), (2, 784), (4, 196), (12, 49))]
    assert shares == pytest.approx([0.2] * 4, abs=0.01)


def test_initialisation() -> None:
    model = small(dims=64)
    mixer = model.stages[3].blocks[0].op
    delta = F.softplus(mixer.dt_projs_bias)
    assert 0.0009 < delta.min() < 0.003
    assert 0.03 < delta.max() < 0.11
    assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert mixer.x_proj_weight.abs().max() <= mixer.d_inner**-0.5
    assert torch.equal(mixer.A_logs.exp()[0].round(), torch.tensor([1.0, 2.0]))


def test_stochastic_depth_is_that_of_each_block() -> None:
    """Of a block whose outputs are always dropped nothing is added, and its stage keeps its input."""
    model = small(drop_path_rate=0.5)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks_of(model)]
    assert rates == pytest.approx([0.5 * i / 6 for i in range(7)])
    block = model.stages[3].blocks[0].train()
    block.drop_path.drop_prob = 1 - 1e-7
    tokens = torch.randn(2, 12, 64)
    state = TokenState.start(tokens, (), model.layouts()[3])
    after = TokenState(*block(*state))
    assert torch.equal(after.stream, tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forward_type": "v0"}, r"forward_type='v0' of vmamba_t is not represented: the mixers have a gate"),
        ({"norm_layer": "bn"}, "norm_layer='bn' .* the norms are batch norms"),
        ({"patch_size": 8}, "patch_size=8 .* a stride other than 4 pixels"),
        ({"dims": (8, 16)}, r"dims=\(8, 16\) and depths=\(1, 2, 3, 1\): expected one of each"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"global_pool": "token"}, "unknown global_pool"),
    ],
)
def test_variants_that_are_not_represented_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**arguments)


def test_a_release_is_taken_from_the_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / "vssm1_tiny_0230s_ckpt_epoch_264.pth"
    file.parent.mkdir()
    torch.save({"model": small(num_classes=1000).state_dict()}, file)
    loaded = small(num_classes=1000, pretrained=True)
    assert loaded.weights["published_top1"] == 0.826
    assert loaded.weights["source"].startswith("https://github.com/MzeroMiko/VMamba/releases/")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), small(num_classes=1000).parameters(), strict=True)
    )
    file.unlink()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(
        UserError, match=r"cannot download vssm1_tiny_0230s\S+ from https://github.com/\S+: no route(.|\n)*checkpoint="
    ):
        small(num_classes=1000, pretrained=True)


@pytest.mark.parametrize(
    "policy", ["mtr", *(pytest.param(name, marks=pytest.mark.slow) for name in (None, "mlp", "storm", "quartermap"))]
)
@torch.no_grad()
def test_it_compiles_without_a_break(policy: str | None) -> None:
    model, images = small(img_size=(64, 96), depths=(1, 1, 1, 1)), torch.randn(1, 3, 64, 96)
    if policy:
        mtr_lab.patch(model, policy, ratio=0.01, first_block=0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


@torch.no_grad()
def test_an_object_of_the_authors_class() -> None:
    """Its attributes alone tell its geometry; it cannot run here."""
    arguments, golden = load("vmamba_official")
    theirs = vssm(**arguments).eval()
    theirs.load_state_dict(parameters(golden), strict=True)
    with pytest.raises(RuntimeError, match="is_cuda"):
        theirs(golden["input"])
    mtr_lab.patch(theirs, "mtr", ratio=0)
    assert relative_error(theirs(golden["input"]), golden["logits"]) < 1e-5
    reduction = mtr_lab.patch(theirs, "mlp", schedule=[10, 8, 5, 5, 2])
    ours, _ = official()
    mtr_lab.patch(ours, "mlp", schedule=reduction.schedule.remove)
    assert torch.equal(theirs(golden["input"]), ours(golden["input"]))
    mtr_lab.unpatch(theirs)
    with pytest.raises(RuntimeError, match="is_cuda"):
        theirs(golden["input"])


@pytest.mark.parametrize(
    "arguments", [{"ssm_d_state": 2, "ssm_ratio": 1.75}, {"depths": (2, 3), "mlp_ratio": 2.6, "dims": 10}]
)
def test_the_geometry_of_an_object(arguments: dict[str, Any]) -> None:
    theirs = vssm(drop_path_rate=0.2, **arguments)
    ours = mtr_lab.patch(theirs, "mtr", ratio=0).model
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    assert [block.drop_path.extra_repr() for block in blocks_of(ours)][-1] == "drop_prob=0.200"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"op": {"disable_z": False}}, r"disable_z=False of layers\.0\.blocks\.0\.op of VSSM .* has a gate"),
        ({"op": {"scan_mode": "bidi"}}, "scan_mode='bidi' .* along other paths"),
        ({"op": {"oact": True}}, "oact=True"),
        ({"mlp_act": nn.ReLU}, "the MLP has an activation other than GELU"),
        ({"posembed": True}, "use the authors. code"),
    ],
)
def test_objects_that_are_not_represented_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mtr_lab.patch(vssm(**arguments), "mtr", ratio=0)
