"""PlainMamba: only the input of a scan follows its path; what that means for a reduced sequence."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from authors_objects import plainmamba
from safetensors import safe_open
from torch import Tensor, nn

import mtr_lab
from mtr_lab import UserError, create_model, ops
from mtr_lab.backbones.plainmamba_mixer import PAIRINGS, PlainMamba2D
from mtr_lab.tokens import Layout, TokenState
from mtr_lab.tokens.positions import Positions

GOLDEN = Path(__file__).parent.parent / "golden" / "plainmamba_official.safetensors"
TINY = {"img_size": (24, 40), "patch_size": 8, "depth": 3, "embed_dim": 24, "d_state": 4, "num_classes": 5}
"""3 x 5 patches."""


def tiny(name: str = "plainmamba_l2", **changes: Any) -> Any:
    torch.manual_seed(0)
    model = create_model(name, **{**TINY, **changes}).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
    return model


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *(size or (24, 40)), generator=torch.Generator().manual_seed(1))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@torch.no_grad()
def test_tokens_equal_the_authors(backend: str) -> None:
    with safe_open(GOLDEN, framework="pt") as file:
        arguments = {key: json.loads(value) for key, value in file.metadata().items()}
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model = create_model("plainmamba_l1", **arguments, num_classes=0).eval()
    parameters = {key[6:]: value for key, value in golden.items() if key.startswith("param.")}
    model.load_state_dict(parameters, strict=True)
    with ops.use_backend(backend):
        tokens = model.forward_features(golden["input"])
        assert relative_error(tokens, golden["tokens"]) < 1e-5
        assert relative_error(model(golden["input"]), golden["tokens"].mean(1)) < 1e-5
    for block in model.layers:
        block.mamba.direction_Bs.data = block.mamba.direction_Bs[[0, 2, 1, 4, 3]]
    assert relative_error(model.forward_features(golden["input"]), golden["tokens"]) > 1e-4


def walk(rows: int, columns: int) -> list[tuple[int, int]]:
    """A snake over rows, from the top left."""
    return [(row, column if row % 2 == 0 else columns - 1 - column) for row in range(rows) for column in range(columns)]


def walks(rows: int, columns: int) -> list[list[tuple[int, int]]]:
    """The four snakes: rows, back, columns, back."""
    down = walk(rows, columns)
    across = [(row, column) for column, row in walk(columns, rows)]
    return [down, down[::-1], across, across[::-1]]


MOVES = {(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}


def mix(mixer: PlainMamba2D, hidden: Tensor, rows: int, columns: int, kept: list[int], source: list[int]) -> Tensor:
    """One reduced sequence, step by step: the tokens ``hidden`` (M, C) of the positions ``kept``.

    Args:
        source: for each position of the grid, the number of the token that contains it.
    """
    x, z = mixer.in_proj(hidden).chunk(2, dim=-1)
    field = x[source].T.reshape(1, -1, rows, columns)
    u = F.silu(mixer.conv2d(field))[0].flatten(1).T[kept]
    low_rank, b, c = mixer.x_proj(u).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
    delta = F.softplus(mixer.dt_proj(low_rank) + mixer.dt_proj.bias)
    total = torch.zeros_like(u)
    for path in walks(rows, columns):
        state = torch.zeros(u.shape[1], mixer.d_state, dtype=u.dtype)
        for step, (row, column) in enumerate(path):
            if row * columns + column not in kept:
                continue
            token, pair = kept.index(row * columns + column), source[step]
            before = path[step - 1] if step else None
            move = MOVES[row - before[0], column - before[1]] if before else 0
            state = torch.exp(delta[pair][:, None] * -mixer.A_log.exp()) * state
            state = state + (delta[pair] * u[token])[:, None] * (b[pair] + mixer.direction_Bs[move])
            total[token] += state @ c[pair] + mixer.D * u[token]
    return mixer.out_proj(total * F.silu(z))


def random_mixer(d_state: int = 3, **options: Any) -> PlainMamba2D:
    torch.manual_seed(0)
    mixer = PlainMamba2D(8, d_state, **options)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixer.double()


def merged(layout: Layout, width: int, merges: dict[int, int]) -> TokenState:
    """A state in which some positions were merged into others."""
    tokens = torch.randn(1, layout.tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    state = TokenState.start(tokens, (), layout).traced()
    from_, into = (torch.tensor([list(places)]) for places in (merges.keys(), merges.values()))
    return state.reduced(ops.make_plan(from_, into, state.index.double(), state.size)).applied()


@pytest.mark.parametrize(
    ("grid", "merges"),
    [((3, 5), {}), ((4, 3), {}), ((1, 6), {}), ((3, 5), {1: 2, 7: 8, 14: 13}), ((4, 4), {0: 5, 3: 2, 15: 10, 12: 13})],
)
@pytest.mark.parametrize(("d_state", "conv_size"), [(1, 3), (2, 7), (16, 5)])
@torch.no_grad()
def test_a_step_reads_its_token_with_the_projections_of_the_raster_position_of_its_number(
    grid: tuple[int, int], merges: dict[int, int], d_state: int, conv_size: int
) -> None:
    mixer, layout = random_mixer(d_state, conv_size=conv_size), Layout(*grid)
    state = merged(layout, 8, merges)
    kept, source = state.index[0].tolist(), state.source[0].tolist()
    expected = mix(mixer, state.hidden[0], *grid, kept, source)
    actual, _ = mixer(state.hidden, Positions(state))
    torch.testing.assert_close(actual[0], expected)


@torch.no_grad()
def test_the_pairings_differ_only_in_reduced_sequences() -> None:
    mixers = [random_mixer(pairing=pairing) for pairing in PAIRINGS]
    for merges, same in (({}, True), ({1: 2, 7: 8}, False)):
        state = merged(Layout(3, 5), 8, merges)
        first, second = (mixer(state.hidden, Positions(state))[0] for mixer in mixers)
        assert torch.allclose(first, second) == same
    with pytest.raises(UserError, match="unknown pairing 'order'.*rank, source"):
        tiny(pairing="order")


@torch.no_grad()
def test_the_shortcut_numbers_survivors() -> None:
    """The t-th survivor of a path is read with the projections of the t-th one in raster order."""
    state = merged(Layout(3, 4), 8, {1: 0, 6: 5, 11: 10})
    mixer = random_mixer(pairing="rank")
    paths = mixer.paths
    kept = state.index[0].tolist()
    for path, places in zip(Positions(state).pairs(paths, by_rank=True)[:, 0], walks(3, 4), strict=True):
        survivors = [row * 4 + column for row, column in places if row * 4 + column in kept]
        assert path.tolist() == [survivors.index(position) for position in kept]


@torch.no_grad()
def test_evidence_belongs_to_the_token_that_is_read() -> None:
    mixer = random_mixer()
    for merges in ({}, {1: 2, 7: 8, 14: 13}):
        state = merged(Layout(3, 5), 8, merges)
        kept, source = state.index[0].tolist(), state.source[0].tolist()
        _, evidence = mixer(state.hidden, Positions(state), ("delta", "b"))
        x = mixer.in_proj(state.hidden[0]).chunk(2, dim=-1)[0]
        u = F.silu(mixer.conv2d(x[source].T.reshape(1, -1, 3, 5)))[0].flatten(1).T[kept]
        low_rank, b, _ = mixer.x_proj(u).split([mixer.dt_rank, 3, 3], dim=-1)
        delta = F.softplus(mixer.dt_proj(low_rank) + mixer.dt_proj.bias).sum(-1)
        for path, sums, projections in zip(walks(3, 5), evidence["delta"][0], evidence.projection("b")[0], strict=True):
            steps = [path.index((position // 5, position % 5)) for position in kept]
            torch.testing.assert_close(sums.double(), torch.stack([delta[source[step]] for step in steps]))
            first = steps.index(0) if 0 in steps else None
            if first is not None:
                torch.testing.assert_close(projections[first], b[source[0]] + mixer.direction_Bs[0])


@torch.no_grad()
def test_a_gap_decays_with_the_bias_that_is_added_twice() -> None:
    mixer, state = random_mixer(), merged(Layout(1, 6), 8, {2: 1, 3: 1})
    mixer.in_proj.weight.zero_()
    mixer.x_proj.weight.zero_()  # Δ is its bias everywhere
    _, evidence = mixer(state.hidden, Positions(state, aligned=True), ("delta",))
    expected = F.softplus(2 * mixer.dt_proj.bias).sum()
    torch.testing.assert_close(evidence["delta"].double(), expected.expand(1, 4, 4))
    mixer.D.zero_()
    mixer.direction_Bs[0] = mixer.direction_Bs[1:].mean(0)
    aligned, plain = (mixer(state.hidden, Positions(state, aligned=aligned))[0] for aligned in (True, False))
    assert aligned.isfinite().all()
    assert plain.isfinite().all()


@pytest.mark.parametrize("merges", [{}, {1: 2, 7: 8}])
@torch.no_grad()
def test_timescales_are_rounded_as_the_authors_are(merges: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias is added to the product, and by the scan once more: twice the bias at once has other bits."""
    mixer, state, scanned = random_mixer().float(), merged(Layout(3, 5), 8, merges), {}
    for scan in (ops.scan_by_step, ops.selective_scan):

        def recorded(*inputs: Any, scan: Any = scan, **options: Any) -> Any:
            scanned.update(u=inputs[0], delta=inputs[1], bias=options["delta_bias"])
            return scan(*inputs, **options)

        monkeypatch.setattr(ops, scan.__name__, recorded)
    mixer(state.hidden.float(), Positions(state))
    u, delta = (x if x.ndim == 3 else x[0] for x in (scanned["u"], scanned["delta"]))
    expected = mixer.dt_proj(mixer.x_proj(u)[..., : mixer.dt_rank])
    pairs = Positions(state).pairs(mixer.paths)[0] if merges else torch.arange(15)[None]
    torch.testing.assert_close(delta, expected[:, pairs[0]], rtol=1e-5, atol=1e-5)
    assert torch.equal(scanned["bias"].expand(4, -1)[0], mixer.dt_proj.bias)


@torch.no_grad()
def test_blocks_may_end_in_a_convolution_anywhere() -> None:
    model = tiny(layers_with_dwconv=[1, 2], drop_path_rate=0.2)
    state = model.embed(images())
    stream = state.hidden
    for block in model.layers:
        normed = F.layer_norm(stream, (24,), block.norm.weight, block.norm.bias, 1e-5)
        stream = stream + block.mamba(normed, Positions(state))[0]
        if block.dw is not None:
            stream = block.dw(stream.transpose(1, 2).unflatten(2, (3, 5))).flatten(2).transpose(1, 2)
    expected = F.layer_norm(stream, (24,), model.ln1.weight, model.ln1.bias, 1e-6)
    torch.testing.assert_close(model.forward_features(images()), expected, rtol=1e-4, atol=1e-5)
    model.train()
    assert not torch.equal(model(images()), model(images()))  # stochastic depth


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (26, 31), (8, 8)])
@torch.no_grad()
def test_any_size_is_embedded(size: tuple[int, int]) -> None:
    """Sides that patches do not divide are padded after the stem."""
    model = tiny()
    rows, columns = (math.ceil(side / 8) for side in size)
    assert model.layouts(size)[0].grid == (rows, columns)
    state = model.embed(images(*size))
    assert state.hidden.shape == (2, rows * columns, 24)
    embed = model.patch_embed
    maps = embed.convs(embed.stem(images(*size)))
    padded = torch.zeros(2, 64, 4 * rows, 4 * columns)
    padded[..., : maps.shape[2], : maps.shape[3]] = maps
    positions = model.pos_embed.transpose(1, 2).unflatten(2, (3, 5))
    positions = positions if (rows, columns) == (3, 5) else F.interpolate(positions, (rows, columns), mode="bicubic")
    expected = (embed.projection(padded) + positions).flatten(2).transpose(1, 2)
    torch.testing.assert_close(state.hidden, expected)
    assert model(images(*size)).shape == (2, 5)


@torch.no_grad()
def test_the_mean_is_weighted_by_size() -> None:
    model = tiny(num_classes=0)
    mtr_lab.patch(model, "tome", schedule=[0, 6, 0])
    state = model.forward_state(images())
    tokens = model.normalise(state)
    assert state.size.max() > 1
    expected = (tokens * state.size[..., None]).sum(1) / 15
    torch.testing.assert_close(model(images()), expected)
    with pytest.raises(UserError, match="weights the tokens by their sizes"):
        model.forward_head(model.forward_features(images()))


def test_images_are_checked_before_a_policy_resizes_them() -> None:
    model = tiny()
    mtr_lab.patch(model, "mtr", ratio=0.01, resolution=16)
    for wrong in (images()[0], images().to(torch.uint8), images()[:, :1]):
        with pytest.raises(UserError, match="expected images"):
            model(wrong)


@torch.no_grad()
def test_timm_interface() -> None:
    model = tiny("plainmamba_l1")
    assert model.num_prefix_tokens == 0
    features, maps = model.forward_intermediates(images(), [0, -1])
    assert torch.equal(features, model.forward_features(images()))
    assert torch.equal(model.forward_head(features), model(images()))
    assert [m.shape for m in maps] == [(2, 24, 3, 5)] * 2
    model.reset_classifier(7, "")
    assert model(images()).shape == (2, 15, 7)
    with pytest.raises(UserError, match="unknown global_pool 'token'.*'avg'"):
        model.reset_classifier(7, "token")
    model.prune_intermediate_layers([1], prune_norm=True)
    assert (len(model.layers), "ln1.weight" in model.state_dict()) == (2, False)
    assert "layers.0.mamba.direction_Bs" in model.no_weight_decay()


@torch.no_grad()
def test_files_of_the_authors_program_are_loaded(tmp_path: Path) -> None:
    """Names of the backbone have a prefix, those of the head have none."""
    model = tiny()
    state = {key if key.startswith("head.") else f"backbone.{key}": value for key, value in model.state_dict().items()}
    torch.save({"meta": {"epoch": 300}, "state_dict": state}, tmp_path / "l2.pth")
    loaded = create_model("plainmamba_l2", checkpoint=tmp_path / "l2.pth", **TINY).eval()
    assert torch.equal(loaded(images()), model(images()))
    none = create_model("plainmamba_l2", checkpoint=tmp_path / "l2.pth", **{**TINY, "num_classes": 0}).eval()
    assert torch.equal(none.forward_features(images()), model.forward_features(images()))
    wide = create_model(
        "plainmamba_l2", checkpoint=tmp_path / "l2.pth", **{**TINY, "img_size": (40, 24)}, checkpoint_grid=(3, 5)
    ).eval()
    assert torch.equal(wide(images(40, 24)), model(images(40, 24)))


def test_the_authors_keywords_are_accepted() -> None:
    mixer = {
        "d_state": 4, "expand": 2, "conv_size": 7, "dt_init": "random", "conv_bias": True, "bias": True,
        "default_hw_shape": (3, 5), "init_layer_scale": None, "dt_rank": "auto",
    }  # fmt: skip
    model = create_model(
        "plainmamba_l1", img_size=(24, 40), patch_size=8, in_channels=1, embed_dims=24, num_layers=2,
        num_convs_patch_embed=2, layers_with_dwconv=[0], layer_cfgs={"use_rms_norm": False, "mamba_cfg": mixer},
        with_pos_embed=True, out_indices=-1, norm_cfg={"type": "LN", "eps": 1e-6}, final_norm=True,
        interpolate_mode="bicubic", init_cfg=None, test_cfg={}, convert_syncbn=False, freeze_patch_embed=False,
        drop_rate=0.1, arch=None,
    )  # fmt: skip
    assert (len(model.layers), model.embed_dim, model.in_chans) == (2, 24, 1)
    assert model.layers[0].mamba.A_log.shape == (48, 4)
    for wrong, message in (
        ({"norm_cfg": {"type": "BN"}}, "norm_cfg=.*the last norm is another one"),
        ({"layer_cfgs": {"mamba_cfg": {"bias": False}}}, "bias=False of plainmamba_l1 .*have no bias"),
        ({"arch": "L3"}, "arch='L3' of plainmamba_l1 .*the model's name"),
        ({"depth": 2, "num_layers": 3}, "num_layers and depth of plainmamba_l1 are the same"),
        ({"conv_size": 4}, "conv_size=4: expected an odd number"),
        ({"patch_size": 9}, "patch_size=9: expected an even number"),
        ({"layers_with_dwconv": [24]}, r"layers_with_dwconv=\[24\]: expected blocks from 0 to 23"),
    ):
        with pytest.raises(UserError, match=message):
            create_model("plainmamba_l1", **wrong)


def test_the_initialisation_is_that_of_the_authors() -> None:
    model = create_model("plainmamba_l1", depth=2)
    mixer = model.layers[1].mamba
    for layer in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not mixer.dt_proj.bias.any()  # Δ starts at softplus(0), about 0.69
    assert mixer.direction_Bs.std().item() == pytest.approx(0.02, rel=0.3)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.head["fc"].weight.std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(("name", "published"), [("plainmamba_l1", 3.0), ("plainmamba_l3", 14.4)])
def test_flops_are_the_published_ones(name: str, published: float) -> None:
    with torch.device("meta"):
        model = create_model(name)
    flops = mtr_lab.measure.flops.model_flops(model, convention="literature") / 1e9
    assert flops == pytest.approx(published, abs=0.06)


@torch.no_grad()
def test_an_object_of_the_authors_class_is_patched() -> None:
    """The object cannot run here; its attributes alone tell its family and its geometry."""
    with safe_open(GOLDEN, framework="pt") as file:
        arguments = {key: json.loads(value) for key, value in file.metadata().items()}
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    settings = arguments.pop("layer_cfgs")["mamba_cfg"]
    model = plainmamba(**arguments, d_state=settings["d_state"], conv_size=settings["conv_size"]).eval()
    model.load_state_dict({key[6:]: value for key, value in golden.items() if key.startswith("param.")}, strict=True)
    with pytest.raises(RuntimeError, match="is_cuda"):
        model(golden["input"])
    mtr_lab.patch(model, "tome", ratio=0)
    tokens, (maps,) = model(golden["input"])
    assert relative_error(tokens, golden["tokens"]) < 1e-5
    assert torch.equal(maps.flatten(2).transpose(1, 2), tokens)
    reduction = mtr_lab.patch(model, "tome", schedule=[0, 12, 12, 0])
    reduced, _ = model(golden["input"])
    assert reduced.shape == tokens.shape
    assert relative_error(reduced, golden["tokens"]) > 1e-3
    torch.testing.assert_close(reduced.mean(1), reduction.model(golden["input"]))  # weighted by size
    mtr_lab.unpatch(model)
    with pytest.raises(RuntimeError, match="is_cuda"):
        model(golden["input"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_indices": [0, 2]}, r"out_indices=\[0, 2\] of PlainMamba is not represented: expected \[2\]"),
        ({"corner": "same"}, "patch_embed of PlainMamba pads by 'same'"),
        ({"drop_rate": 0.1}, "drop_after_pos of PlainMamba drops 0.1"),
        ({"final_norm": False}, "final_norm=False of PlainMamba .*no norm before the head"),
        ({"expand": 1}, "expand=1 of layers.0 of PlainMamba .*another inner width"),
        ({"bias": False}, "bias=False of layers.0 of PlainMamba .*have no bias"),
        ({"init_layer_scale": 0.1}, "init_layer_scale=0.1 of layers.0 of PlainMamba .*scaled by a parameter"),
    ],
)
def test_other_variants_of_the_authors_class_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mtr_lab.patch(plainmamba(**changes), "tome", ratio=0)


@torch.no_grad()
def test_settings_of_an_object_are_followed() -> None:
    model = plainmamba(layers_with_dwconv=[1], drop_path_rate=0.3, eps=1e-3, num_convs_patch_embed=2)
    ours = mtr_lab.patch(model, "tome", schedule=[0, 4, 0]).model
    assert (ours.ln1.eps, ours.layers[1].dw is not None, ours.layers[0].dw) == (1e-3, True, None)
    model.layers[1].norm.eps = 0.1
    model.patch_embed.stem[1].momentum = 0.5
    model.eval()(images(64, 64))
    assert (ours.layers[1].norm.eps, ours.patch_embed.stem[1].momentum, ours.training) == (0.1, 0.5, False)
