"""Creating models: names, geometry, weights from files, and errors."""

import argparse
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from small_models import geometry
from timm.data import resolve_model_data_config

import mtr_lab
from mtr_lab import UserError, create_model
from mtr_lab.backbones import MODELS
from mtr_lab.backbones.factory import build
from mtr_lab.backbones.pretrained import complete

TINY = {"img_size": 32, "patch_size": 8, "stride": 8, "depth": 2, "embed_dim": 24, "d_state": 4, "num_classes": 5}


def tiny(name: str = "vim_ti", **changes):
    torch.manual_seed(0)
    return create_model(name, **{**TINY, **changes}).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vim_ti", 7),
        ("vim_s", 26),
        ("vim_b", 98),
        ("videomamba_m", 74),
        ("vim_nano", 2),
        ("plainmamba_l1", 7.5),
        ("plainmamba_l2", 26),
        ("plainmamba_l3", 51),
        ("mambareg_s", 28),
        ("mambareg_b", 99),
        ("mambareg_l", 341),
        ("vmamba_t", 30),
        ("vmamba_s", 50),
        ("vmamba_b", 89),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, parameters: float) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.5)


@pytest.mark.parametrize("name", MODELS)
def test_registered_with_timm(name: str) -> None:
    model = timm.create_model(name, num_classes=5, **geometry(name, depth=2, width=24))
    assert type(model) is type(create_model(name, num_classes=5, **geometry(name, depth=2, width=24)))


def test_geometry_overrides_keep_the_upstream_names() -> None:
    model = create_model(
        "vim_ti", img_size=112, patch_size=16, stride=16, depth=7, embed_dim=96, d_state=16, num_classes=13
    )
    assert model(torch.zeros(1, 3, 112, 112)).shape == (1, 13)
    assert model.pretrained_cfg["input_size"] == (3, 112, 112)


@pytest.mark.parametrize("name", ["vim_ti", "videomamba_ti"])
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (64, 32)])
def test_any_size_that_fits_the_grid(name: str, size: tuple[int, int]) -> None:
    model = tiny(name)
    with torch.no_grad():
        state = model.forward_state(torch.randn(1, 3, *size))
    patches = size[0] // 8 * (size[1] // 8)
    assert state.hidden.shape == (1, patches + 1, 24)
    assert state.special.tolist() == [[patches // 2 if name == "vim_ti" else 0]]


@pytest.mark.parametrize("name", ["vim_ti", "videomamba_ti"])
def test_interpolated_positions_keep_a_linear_ramp(name: str) -> None:
    """Enlarging a ramp along x gives a finer ramp along x; the class token's entry stays where the class token is."""
    model = tiny(name, img_size=64)
    place, new_place = model.class_position(64), model.class_position(16 * 8)
    ramp = torch.arange(8.0).expand(8, 8).reshape(64, 1).expand(64, 24)
    entry = torch.full((1, 24), 100.0)
    model.pos_embed.data = torch.cat([ramp[:place], entry, ramp[place:]])[None]
    model.cls_token.data.zero_()
    torch.nn.init.zeros_(model.patch_embed.proj.weight)
    torch.nn.init.zeros_(model.patch_embed.proj.bias)
    with torch.no_grad():
        hidden = model.embed(torch.zeros(1, 3, 128, 64)).hidden[0]
    assert hidden[new_place].tolist() == [100.0] * 24
    grid = torch.cat([hidden[:new_place], hidden[new_place + 1 :]])[:, 0].reshape(16, 8)
    assert torch.allclose(grid, torch.arange(8.0).expand(16, 8), atol=0.05)


def test_a_missing_batch_dimension_is_named() -> None:
    with pytest.raises(UserError, match=r"expected images \(B, channels, H, W\), got shape \(3, 32, 32\)"):
        tiny()(torch.zeros(3, 32, 32))


def test_an_image_off_the_grid_is_refused_with_the_sizes_that_fit() -> None:
    with pytest.raises(
        UserError, match=re.escape("height 37 does not fit patches of 8 at stride 8: resize to 32 or 40")
    ):
        tiny()(torch.zeros(1, 3, 37, 32))


@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
def test_checkpoints_load_strictly_from_pytorch_files(tmp_path: Path, images: torch.Tensor, wrap: str | None) -> None:
    model = tiny()
    state = model.state_dict()
    path = tmp_path / "weights.pth"
    torch.save({wrap: state, "args": argparse.Namespace(lr=1.0)} if wrap else state, path)
    torch.manual_seed(7)
    loaded = create_model("vim_ti", checkpoint=str(path), **TINY).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert loaded.weights["source"] == "weights.pth"
    assert len(loaded.weights["sha256"]) == 64


def test_safetensors_may_name_their_classes(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "e"]
    save_file(tiny().state_dict(), tmp_path / "w.safetensors", metadata={"label_names": json.dumps(names)})
    loaded = create_model("vim_ti", checkpoint=tmp_path / "w.safetensors", **TINY)
    assert list(loaded.pretrained_cfg["label_names"]) == names


def test_positions_of_another_grid_are_interpolated_on_load(tmp_path: Path) -> None:
    torch.save(tiny(img_size=64).state_dict(), tmp_path / "w.pth")
    loaded = create_model("vim_ti", checkpoint=tmp_path / "w.pth", **TINY)
    assert loaded.pos_embed.shape == (1, 17, 24)


@pytest.mark.parametrize("stated", [False, True])
def test_positions_of_a_grid_with_as_many_patches_are_interpolated(tmp_path: Path, stated: bool) -> None:
    """64 patches are a square of 8 x 8 unless the file states that they are 4 x 16."""
    square, wide = tiny(img_size=64), tiny(img_size=(32, 128))
    state = {**wide.state_dict(), "pos_embed": square.pos_embed.data}
    save_file(state, tmp_path / "w.safetensors", metadata={"grid_size": "[4, 16]"} if stated else None)
    arguments = {**TINY, "checkpoint": tmp_path / "w.safetensors"}
    loaded = create_model("vim_ti", **{**arguments, "img_size": (32, 128)})
    assert torch.equal(loaded.pos_embed, square.pos_embed) == stated
    back = create_model("vim_ti", **{**arguments, "img_size": 64})
    assert torch.equal(back.pos_embed, square.pos_embed) == (not stated)


def test_positions_that_fit_no_grid_are_refused(tmp_path: Path) -> None:
    state = tiny().state_dict()
    for shape, message in (((1, 8, 24), "7 patches"), ((1, 1, 24), "pos_embed has shape"), ((17,), "pos_embed has")):
        torch.save({**state, "pos_embed": torch.zeros(shape)}, tmp_path / "w.pth")
        with pytest.raises(UserError, match=message):
            create_model("vim_ti", checkpoint=tmp_path / "w.pth", **TINY)


@pytest.mark.parametrize("name", ["vim_ti", "vim_s", "vim_s_plus", "videomamba_s"])
def test_preprocessing_is_the_authors(name: str) -> None:
    with torch.device("meta"):
        config = resolve_model_data_config(create_model(name))
    assert config["input_size"] == (3, 224, 224)
    assert config["interpolation"] == "bicubic"
    assert config["crop_pct"] == 0.875
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["std"] == (0.229, 0.224, 0.225)


def test_without_classes_the_model_gives_features(images: torch.Tensor) -> None:
    assert tiny(num_classes=0)(images).shape == (2, 24)


def test_stochastic_depth_reaches_the_last_output(images: torch.Tensor) -> None:
    """The rate grows from 0 to the given one at the output of the last block; in evaluation it is 0."""
    model = tiny(depth=3, drop_path_rate=0.5)
    rates = [getattr(module.drop_path, "drop_prob", 0.0) for module in (*model.blocks, model)]
    assert rates == [0, 0, 0.25, 0.5]
    with torch.no_grad():
        assert torch.equal(model(images), tiny(depth=3)(images))
        model.train()
        dropped = torch.stack([model.forward_state(images).hidden.abs().sum((1, 2)) == 0 for _ in range(20)])
    assert 5 < dropped.sum() < 35


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"stride": True}, "stride of vim_ti=True: expected an integer from 1 to 65536"),
        ({"drop_path_rate": 2}, "drop_path_rate of vim_ti=2: expected a number from 0 to 0.99"),
        ({"img_size": "big"}, "img_size of vim_ti=big: expected an integer"),
        ({"img_size": (32, 0)}, "img_size of vim_ti=0: expected an integer from 1 to 65536"),
        ({"num_classes": -1}, "num_classes of vim_ti=-1: expected an integer from 0 to 16777216"),
        ({"pretrained": "maybe"}, "pretrained of vim_ti=maybe: expected true or false"),
    ],
)
def test_arguments_out_of_range_are_refused(argument: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        create_model("vim_ti", **argument)


AUTHORS = {
    "vim_ti": {
        "ssm_cfg": {"d_conv": 4, "expand": 2, "dt_rank": "auto", "dt_init": "constant", "use_fast_path": True},
        "norm_epsilon": 1e-5, "rms_norm": True, "initializer_cfg": None, "fused_add_norm": False,
        "residual_in_fp32": False, "device": None, "dtype": None, "ft_seq_len": None, "pt_hw_seq_len": 14,
        "if_bidirectional": False, "final_pool_type": "mean", "if_abs_pos_embed": True, "if_rope": False,
        "if_rope_residual": False, "flip_img_sequences_ratio": -1.0, "if_bimamba": False, "bimamba_type": "v2",
        "if_cls_token": True, "if_divide_out": True, "if_devide_out": True, "init_layer_scale": None,
        "use_double_cls_token": False, "use_middle_cls_token": True, "drop_rate": 0.0,
    },
    "videomamba_ti": {
        "ssm_cfg": None, "norm_epsilon": 1e-5, "initializer_cfg": {}, "fused_add_norm": True, "rms_norm": True,
        "residual_in_fp32": True, "bimamba": True, "kernel_size": 1, "fc_drop_rate": 0.0, "device": "cpu",
        "dtype": torch.float32, "use_checkpoint": False, "checkpoint_num": 0, "drop_rate": 0.0,
    },
    "mambareg_s": {
        "num_cls_tokens": 12, "cls_reduce": 2, "ssm_cfg": None, "norm_epsilon": 1e-5, "initializer_cfg": None,
        "fused_add_norm": True, "rms_norm": True, "residual_in_fp32": True, "device": None, "dtype": None,
        "drop_rate": 0.0,
    },
}  # fmt: skip
"""The keywords of the authors' constructors besides those of TINY, with values that published models have."""


@pytest.mark.parametrize("name", AUTHORS)
@torch.no_grad()
def test_the_authors_keywords_are_accepted(name: str, images: torch.Tensor) -> None:
    assert torch.equal(tiny(name, **AUTHORS[name])(images), tiny(name)(images))


def test_authors_keywords_act(images: torch.Tensor) -> None:
    model = create_model("videomamba_ti", fc_drop_rate=0.3, use_checkpoint=True, dtype=torch.bfloat16, **TINY)
    assert (model.head_drop.p, model.grad_checkpointing) == (0.3, True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    geometry = {key: value for key, value in TINY.items() if key != "d_state"}
    model = create_model("videomamba_ti", ssm_cfg={"d_state": 6}, **geometry)
    assert model.layers[0].mixer.A_log.shape == (48, 6)
    for changes in ({"if_divide_out": False}, {"use_middle_cls_token": False}, {"norm_epsilon": 1e-2}):
        assert not torch.equal(tiny(**changes)(images), tiny()(images))


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("vim_ti", {"bimamba_type": "v1"}, "bimamba_type='v1' of vim_ti is not represented: the directions share"),
        ("vim_ti", {"if_bidirectional": True}, "if_bidirectional=True of vim_ti is not represented"),
        ("vim_ti", {"flip_img_sequences_ratio": 0.5}, "flip_img_sequences_ratio=0.5 .*flipped at random"),
        ("vim_ti", {"final_pool_type": "max"}, "final_pool_type='max' .*the largest of the classes"),
        ("vim_ti", {"if_rope": True}, "if_rope=True .*rotary"),
        ("vim_ti", {"if_cls_token": False}, "if_cls_token=False .*no class token. Leave it out"),
        ("vim_ti", {"use_double_cls_token": True}, "use_double_cls_token=True .*two class tokens"),
        ("vim_ti", {"if_abs_pos_embed": False}, "if_abs_pos_embed=False .*no position embeddings"),
        ("vim_ti", {"init_layer_scale": 0.1}, "init_layer_scale=0.1 .*scaled by a parameter"),
        ("vim_ti", {"rms_norm": False}, "rms_norm=False .*layer norms"),
        ("vim_ti", {"if_devide_out": False}, "if_devide_out=False .*the name is if_divide_out"),
        ("vim_ti", {"ssm_cfg": {"use_fast_path": False}}, "use_fast_path=False .*scans forward only"),
        ("vim_ti", {"ssm_cfg": {"expand": 1}}, "expand=1 .*another inner width"),
        ("vim_ti", {"ssm_cfg": [4]}, r"ssm_cfg=\[4\] of vim_ti: expected a dict"),
        ("vim_ti", {"d_state": 4, "ssm_cfg": {"d_state": 8}}, "d_state of vim_ti is given twice"),
        ("vim_ti", {"ssm_cfg": {"headdim": 64}}, "unknown argument of vim_ti 'headdim'"),
        ("vim_ti", {"flip_img_sequences_ratio": "often"}, "flip_img_sequences_ratio='often' of vim_ti is not"),
        ("vim_ti", {"rms_norm": torch.ones(2)}, "rms_norm=tensor.* of vim_ti is not represented"),
        ("vim_ti", {"dtype": "half"}, "dtype of vim_ti='half': expected a floating-point torch.dtype"),
        ("vim_ti", {"dtype": torch.int8}, "dtype of vim_ti=torch.int8: expected a floating-point torch.dtype"),
        ("vim_ti", {"device": "gpu"}, "device of vim_ti='gpu': expected a torch.device"),
        ("vim_ti", {"device": 1.5}, "device of vim_ti=1.5: expected a torch.device"),
        ("vim_ti", {"new_head": "yes"}, "new_head of vim_ti='yes': expected true or false"),
        ("videomamba_ti", {"bimamba": False}, "bimamba=False of videomamba_ti is not represented"),
        ("videomamba_ti", {"if_divide_out": False}, "unknown argument of videomamba_ti 'if_divide_out'"),
    ],
)
def test_variants_that_are_not_represented_are_refused_by_name(name: str, argument: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(name, **argument)


@pytest.mark.parametrize("name", ["vim_ti", "videomamba_ti", "mambareg_s"])
def test_the_initialisation_is_that_of_the_authors(name: str) -> None:
    """As their code: in Vim and Mamba-Reg forward scans keep Mamba's Δ, VideoMamba initialises all layers alike."""
    torch.manual_seed(0)
    model = create_model(name, img_size=224, depth=4, embed_dim=192)
    mixer, vim = model.layers[1].mixer, name != "videomamba_ti"
    std = {key: value.std().item() for key, value in model.state_dict().items()}
    forward, backward = (torch.nn.functional.softplus(p.bias) for p in (mixer.dt_proj, mixer.dt_proj_b))
    assert backward.tolist() == pytest.approx([0.6931] * 384, abs=1e-4)
    assert (forward.min() > 1e-4 and forward.max() < 0.11) if vim else torch.equal(forward, backward)
    linear = {"in_proj": 192, "x_proj": 384, "x_proj_b": 384, "dt_proj": 12, "dt_proj_b": 12}  # inputs
    for module, inputs in linear.items():
        expected = (3 * inputs) ** -0.5 if vim else 0.02  # of a uniform distribution; of a normal one
        assert std[f"layers.1.mixer.{module}.weight"] == pytest.approx(expected, rel=0.05)
    assert std["layers.1.mixer.out_proj.weight"] == pytest.approx((3 * 384 * 4) ** -0.5, rel=0.05)
    assert std["head.weight"] == pytest.approx(0.02, rel=0.05)
    assert std["pos_embed"] == pytest.approx(0.02, rel=0.05)
    assert std["patch_embed.proj.weight"] == pytest.approx(768**-0.5 if vim else (3 * 768) ** -0.5, rel=0.05)
    assert (model.cls_token == 0).all() != vim
    assert (model.patch_embed.proj.bias == 0).all() == vim
    assert (model.head.bias == 0).all()
    for key in ("neck.weight", "pos_embed_cls"):
        assert std.get(key, 0.02) == pytest.approx(0.02, rel=0.1)


class Pyramid(torch.nn.Module):
    """A family with arguments of other types, whose head has another name."""

    def __init__(
        self, depths: tuple[int, ...] = (1,), mlp_ratio: float = 4.0, gated: bool = False, num_classes: int = 1000
    ) -> None:
        super().__init__()
        self.depths, self.mlp_ratio, self.gated, self.num_classes = depths, mlp_ratio, gated, num_classes
        self.stem = torch.nn.Conv2d(3, 2, 2)
        self.classifier = torch.nn.Linear(2, num_classes) if num_classes else torch.nn.Identity()
        self.input_shape = (3, 8, 8)

    def fit_weights(self, state: dict[str, torch.Tensor], grid: object, label: str) -> bool:
        return False


def pyramid(**kwargs):
    config = complete({"pyramid.in1k": {}}, first_conv="stem", classifier="classifier")["pyramid"]
    return build(Pyramid, config, False, {}, kwargs)


def test_a_family_declares_its_arguments_by_their_annotations() -> None:
    model = pyramid(depths=[2, 3], mlp_ratio=2.5, gated=True)
    assert (model.depths, model.mlp_ratio, model.gated) == ([2, 3], 2.5, True)
    assert (model.pretrained_cfg["first_conv"], model.pretrained_cfg["classifier"]) == ("stem", "classifier")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"depths": [2, 0]}, "depths of pyramid=0: expected an integer from 1 to 65536"),
        ({"depths": [2, "3"]}, "depths of pyramid=3: expected an integer"),
        ({"mlp_ratio": -1}, "mlp_ratio of pyramid=-1: expected a number from 0 to 65536"),
        ({"gated": 1}, "gated of pyramid=1: expected true or false"),
        ({"depth": 2}, "unknown argument of pyramid 'depth'"),
    ],
)
def test_arguments_that_do_not_fit_their_annotations_are_refused(argument: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        pyramid(**argument)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_local_safetensors_file_gives_the_number_of_classes(prefix: str, tmp_path: Path) -> None:
    state = {prefix + key: value for key, value in pyramid(num_classes=5).state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    assert pyramid(checkpoint=tmp_path / "w.safetensors").num_classes == 5
    assert pyramid(checkpoint=tmp_path / "w.safetensors", new_head=True).num_classes == pyramid().num_classes != 5
    with pytest.raises(UserError, match=r"has 5 classes, the model 7: create the model with num_classes=5"):
        pyramid(num_classes=7, checkpoint=tmp_path / "w.safetensors")


def test_the_head_has_the_name_that_the_family_declares(tmp_path: Path) -> None:
    torch.save(pyramid(num_classes=5).state_dict(), tmp_path / "w.pth")
    assert pyramid(num_classes=0, checkpoint=tmp_path / "w.pth").state_dict().keys() == {"stem.weight", "stem.bias"}
    with pytest.raises(UserError, match=r"has 5 classes, the model 7: create the model with num_classes=5"):
        pyramid(num_classes=7, checkpoint=tmp_path / "w.pth")


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"model": Payload()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="cannot read checkpoint"):
        create_model("vim_ti", checkpoint=tmp_path / "w.pth", **TINY)


@pytest.mark.parametrize("file", ["w.pth", "w.safetensors"])
def test_a_corrupt_checkpoint_is_refused(tmp_path: Path, file: str) -> None:
    for content in (b"", b"not a checkpoint", b"\x80\x02}q\x01.junk", b"\x80\x02h\x05."):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(UserError, match=f"cannot read checkpoint .*{file}.*: ."):
            create_model("vim_ti", checkpoint=tmp_path / file, **TINY)


@pytest.mark.parametrize("names", ["{not json", '"abcde"', "[1, 2, 3, 4, 5]"])
def test_class_names_that_are_not_a_list_of_names_are_refused(tmp_path: Path, names: str) -> None:
    save_file(tiny().state_dict(), tmp_path / "w.safetensors", metadata={"label_names": names})
    with pytest.raises(UserError, match="metadata label_names"):
        create_model("vim_ti", checkpoint=tmp_path / "w.safetensors", **TINY)


def test_wrong_keys_and_shapes_are_listed(tmp_path: Path) -> None:
    state = tiny().state_dict()
    del state["norm_f.weight"]
    state["layers.0.mixer.D"] = torch.zeros(3)
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError) as error:
        create_model("vim_ti", checkpoint=tmp_path / "w.pth", **TINY)
    for line in ("missing norm_f.weight", "unexpected extra", "layers.0.mixer.D has shape (3,), expected (48,)"):
        assert line in str(error.value)


def test_another_number_of_classes_says_what_to_set(tmp_path: Path) -> None:
    torch.save(tiny(num_classes=7).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="has 7 classes, the model 5: .*num_classes=7"):
        create_model("vim_ti", checkpoint=tmp_path / "w.pth", **TINY)


def test_an_absent_checkpoint_and_a_malformed_address_are_refused() -> None:
    with pytest.raises(UserError, match=r"checkpoint nowhere\.pth does not exist"):
        create_model("vim_ti", checkpoint="nowhere.pth", **TINY)
    with pytest.raises(UserError, match="hf://OWNER/REPOSITORY/FILE"):
        create_model("vim_ti", checkpoint="hf://owner/file", **TINY)


@pytest.fixture(params=["refused", "timed out", "HF_HUB_OFFLINE"])
def no_network(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The empty cache of the hub, on a machine that cannot reach the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", request.param == "HF_HUB_OFFLINE")
    monkeypatch.setattr("mtr_lab.backbones.hub.TIMEOUT", 0.5)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "timed out":
            server.listen()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield tmp_path


def test_without_a_network_one_error_says_at_once_what_to_download(
    no_network: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    start = time.monotonic()
    with pytest.raises(
        UserError, match=r"vim_s_midclstok_80p5acc\.pth from hustvl/Vim-small-midclstok(.|\n)*checkpoint="
    ) as error:
        create_model("vim_s", pretrained=True)
    assert re.search(f"the Hub cannot be reached .*{request.node.callspec.params['no_network']}", str(error.value))
    assert time.monotonic() - start < 5
    assert caplog.messages == []


def test_without_a_network_files_downloaded_before_are_used(no_network: Path, images: torch.Tensor) -> None:
    folder, commit = no_network / "models--owner--name", "0123456789abcdef0123456789abcdef01234567"
    for path in (folder / "refs", folder / "snapshots" / commit):
        path.mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    torch.save(tiny().state_dict(), folder / "snapshots" / commit / "w.pth")
    loaded = tiny(checkpoint="hf://owner/name/w.pth")
    assert torch.equal(loaded(images), tiny()(images))
    assert loaded.weights["revision"] == commit


def test_hub_weights_record_the_commit_they_resolved_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--owner--name" / "snapshots" / commit / "w.pth"
    cached.parent.mkdir(parents=True)
    torch.save({"model": tiny().state_dict()}, cached)
    asked = {}

    def download(repository: str, file: str, revision: str) -> Path:
        asked.update(repository=repository, file=file, revision=revision)
        return cached

    monkeypatch.setattr("mtr_lab.backbones.hub.download", download)
    model = create_model("vim_ti", checkpoint="hf://owner/name/w.pth", revision="v1.0", **TINY)
    assert asked == {"repository": "owner/name", "file": "w.pth", "revision": "v1.0"}
    assert model.weights["revision"] == commit


@pytest.mark.parametrize(
    ("name", "address", "top1"),
    [
        ("vim_ti", "hustvl/Vim-tiny-midclstok/vim_t_midclstok_76p1acc.pth", 0.761),
        ("vim_ti_plus", "hustvl/Vim-tiny-midclstok/vim_t_midclstok_ft_78p3acc.pth", 0.783),
        ("vim_s", "hustvl/Vim-small-midclstok/vim_s_midclstok_80p5acc.pth", 0.805),
        ("vim_s_plus", "hustvl/Vim-small-midclstok/vim_s_midclstok_ft_81p6acc.pth", 0.816),
        ("vim_b", "hustvl/Vim-base-midclstok/vim_b_midclstok_81p9acc.pth", 0.819),
        ("videomamba_ti", "OpenGVLab/VideoMamba/videomamba_t16_in1k_res224.pth", 0.769),
        ("videomamba_s", "OpenGVLab/VideoMamba/videomamba_s16_in1k_res224.pth", 0.812),
        ("videomamba_m", "OpenGVLab/VideoMamba/videomamba_m16_in1k_res224.pth", 0.828),
        ("videomamba_b", "OpenGVLab/VideoMamba/videomamba_b16_in1k_res224.pth", 0.827),
        ("plainmamba_l1", "ChenhongyiYang/PlainMamba/l1.pth", 0.779),
        ("plainmamba_l2", "ChenhongyiYang/PlainMamba/l2.pth", 0.816),
        ("plainmamba_l3", "ChenhongyiYang/PlainMamba/l3.pth", 0.823),
        ("mambareg_s", "Wangf3014/Mamba-Reg/mambar_small_patch16_224.pth", 0.814),
        ("mambareg_b", "Wangf3014/Mamba-Reg/mambar_base_patch16_224.pth", 0.830),
        ("mambareg_l", "Wangf3014/Mamba-Reg/mambar_large_patch16_224.pth", 0.836),
    ],
)
def test_published_weights_load_strictly_from_the_hub_and_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: torch.Tensor, name: str, address: str, top1: float
) -> None:
    """Files with the parameters of a tiny model: fewer and narrower blocks, with the same names."""
    repository, file = address.rsplit("/", 1)
    model = tiny(name)
    torch.save({"model": model.state_dict(), "epoch": 299, "args": argparse.Namespace(lr=1e-3)}, tmp_path / file)
    asked = []

    def download(repository: str, file: str, revision: str) -> Path:
        asked.append((repository, file, revision))
        return tmp_path / file

    monkeypatch.setattr("mtr_lab.backbones.hub.download", download)
    for loaded in (tiny(name, pretrained=True), tiny(name, checkpoint=str(tmp_path / file))):
        with torch.no_grad():
            assert torch.equal(loaded(images), model(images))
        assert loaded.weights["published_top1"] == top1
    assert asked == [(repository, file, "main")]


def test_only_the_authors_files_have_a_published_figure(tmp_path: Path) -> None:
    torch.save(tiny().state_dict(), tmp_path / "mine.pth")
    assert tiny(checkpoint=tmp_path / "mine.pth").weights["published_top1"] is None


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown backbone 'vim_small'.*'vim_s'"):
        create_model("vim_small")
    with pytest.raises(UserError, match="unknown backbone 'None'"):
        create_model(None)
    with pytest.raises(UserError, match="unknown argument of vim_ti 'embed_dims'.*'embed_dim'"):
        create_model("vim_ti", embed_dims=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_follow_float32(images: torch.Tensor, dtype: torch.dtype) -> None:
    model = tiny()
    with torch.no_grad():
        expected = model(images)
        actual = model.to(dtype)(images.to(dtype))
    assert actual.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 5e-2
    assert (actual.float() - expected).norm() / expected.norm() < tolerance


def test_gradients_reach_every_parameter(images: torch.Tensor) -> None:
    model = tiny().train()
    model(images).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_version_is_stated() -> None:
    assert re.match(r"\d", mtr_lab.__version__)
