"""Checkpoints in the forms in which people have them."""

import argparse
import hashlib
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mtr_lab import UserError, create_model
from mtr_lab.backbones.hub import ASSETS, expected_sha256

TINY = {"img_size": 32, "patch_size": 8, "stride": 8, "depth": 2, "embed_dim": 24, "d_state": 4, "num_classes": 5}


def tiny(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    model = create_model("vim_ti", **{**TINY, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def load(path: Path, **changes: Any) -> Any:
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return create_model("vim_ti", checkpoint=path, **{**TINY, **changes}).eval()


def equal(model: nn.Module, other: nn.Module) -> bool:
    state, expected = model.state_dict(), other.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(value, expected[key]) for key, value in state.items())


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in tiny().state_dict().items()}


class Module(lightning.LightningModule):
    """A user's module, with a metric's state and a loss with weights beside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"lr": 1e-3, "data": OmegaConf.create({"root": "/data"}), "path": Path("x")})
        self.model, self.loss = tiny(), nn.CrossEntropyLoss(torch.ones(5))

    def forward(self, images: torch.Tensor) -> Any:
        return self.model(images)


def lightning_checkpoint() -> dict[str, Any]:
    module = Module()
    return {
        "epoch": 3,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": module.state_dict(),
        "optimizer_states": [torch.optim.AdamW(module.parameters()).state_dict()],
        "hyper_parameters": module.hparams,
    }


FORMS: dict[str, tuple[Callable[[], Any], str | None]] = {
    "plain": (lambda: tiny().state_dict(), None),
    "DDP": (lambda: nn.DataParallel(tiny()).state_dict(), "module.*"),
    "torch.compile": (lambda: torch.compile(tiny()).state_dict(), "_orig_mod.*"),
    "both": (lambda: prefixed("_orig_mod.module."), "_orig_mod.module.*"),
    "deit": (
        lambda: {
            "model": tiny().state_dict(), "optimizer": torch.optim.AdamW(tiny().parameters()).state_dict(), "epoch": 1,
            "args": argparse.Namespace(lr=1e-3, out=Path("out")), "max_accuracy": np.float64(76.1),
        },
        "model",
    ),
    "DeepSpeed": (lambda: {"module": tiny().state_dict(), "ds_config": {"zero": 1}, "dp_world_size": 8}, "module"),
    "Lightning": (lightning_checkpoint, "state_dict: model.*"),
    "averaged model": (lambda: AveragedModel(tiny()).state_dict(), "module.*"),
    "nested": (lambda: {"checkpoint": {"net": prefixed("module.encoder.")}}, "checkpoint.net: module.encoder.*"),
    "half": (lambda: {key: value.half() for key, value in tiny().state_dict().items()}, None),
    "bfloat16": (lambda: {key: value.bfloat16() for key, value in tiny().state_dict().items()}, None),
}  # fmt: skip


@pytest.mark.parametrize(("content", "part"), FORMS.values(), ids=FORMS)
def test_every_form_is_read_and_the_part_is_recorded(tmp_path: Path, content: Callable, part: str | None) -> None:
    torch.save(content(), tmp_path / "w.pth")
    model = load(tmp_path / "w.pth")
    assert model.weights["part"] == part
    for key, value in tiny().state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, atol=0.02 if part is None else 0, rtol=0)


SEVERAL: dict[str, tuple[Callable[[Any, Any], Any], str, str]] = {
    "deit": (lambda raw, ema: {"model_ema": ema, "model": raw}, "model", "model_ema"),
    "timm": (lambda raw, ema: {"state_dict_ema": ema, "state_dict": raw}, "state_dict", "state_dict_ema"),
    "last.ckpt": (
        lambda raw, ema: {
            "current_model_state": {f"model.{key}": value for key, value in ema.items()},
            "state_dict": {f"model.{key}": value for key, value in raw.items()},
        },
        "state_dict: model.*",
        "current_model_state.model",
    ),
    "prefixes of an entry": (
        lambda raw, ema: {
            "state_dict": {
                **{f"model.{key}": value for key, value in raw.items()},
                **{f"model_ema.module.{key}": value for key, value in ema.items()},
            }
        },
        "state_dict: model.*",
        "state_dict.model_ema.module",
    ),
    "prefixes": (
        lambda raw, ema: {
            **{f"ema_model.{key}": value for key, value in ema.items()},
            **{f"model.{key}": value for key, value in raw.items()},
        },
        "model.*",
        "ema_model",
    ),
}


@pytest.mark.parametrize(("content", "taken", "other"), SEVERAL.values(), ids=SEVERAL)
def test_of_several_weights_one_is_taken_and_it_says_so(
    tmp_path: Path, content: Callable, taken: str, other: str
) -> None:
    main, second = tiny(0), tiny(1)
    torch.save(content(main.state_dict(), second.state_dict()), tmp_path / "w.pth")
    said = f"w.pth has several weights: {re.escape(taken)} was taken, not .*checkpoint_key={re.escape(other)} takes"
    with pytest.warns(UserWarning, match=said):
        model = create_model("vim_ti", checkpoint=tmp_path / "w.pth", **TINY)
    assert equal(model, main)
    model = load(tmp_path / "w.pth", checkpoint_key=other)
    assert equal(model, second)
    assert model.weights["part"].replace(": ", ".").removesuffix(".*") == other
    assert equal(load(tmp_path / "w.pth", checkpoint_key=taken.partition(":")[0].removesuffix(".*")), main)


def test_a_key_that_a_file_lacks_is_answered_with_those_it_has(tmp_path: Path) -> None:
    torch.save({"model": tiny().state_dict(), "model_ema": prefixed("module.")}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"checkpoint_key=ema: .*w\.pth has no such weights. It has: model, model_ema"):
        load(tmp_path / "w.pth", checkpoint_key="ema")
    with pytest.raises(UserError, match=r"checkpoint_key=ema is about a file: give it, checkpoint=FILE"):
        create_model("vim_ti", checkpoint_key="ema", **TINY)


def shards(folder: Path, suffix: str = "safetensors") -> Path:
    """The index of a checkpoint in two files."""
    state = tiny().state_dict()
    names = {key: f"model-0000{1 + i % 2}-of-00002.{suffix}" for i, key in enumerate(state)}
    for name in set(names.values()):
        part = {key: value for key, value in state.items() if names[key] == name}
        save_file(part, folder / name) if suffix == "safetensors" else torch.save(part, folder / name)
    index = folder / f"model.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_sharded_checkpoint_is_read_by_its_index(tmp_path: Path, suffix: str) -> None:
    model = load(shards(tmp_path, suffix))
    assert equal(model, tiny())
    first = model.weights["sha256"]
    shard = tmp_path / f"model-00002-of-00002.{suffix}"
    changed = {key: value + 1 for key, value in (torch.load(shard) if suffix == "bin" else _tensors(shard)).items()}
    save_file(changed, shard) if suffix == "safetensors" else torch.save(changed, shard)
    assert load(tmp_path / f"model.{suffix}.index.json").weights["sha256"] != first


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_shards_of_the_hub_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards(tmp_path)
    asked = []
    monkeypatch.setattr(
        "mtr_lab.backbones.hub.download", lambda repo, file, revision: asked.append(file) or tmp_path / Path(file).name
    )
    model = create_model("vim_ti", checkpoint="hf://owner/name/sub/model.safetensors.index.json", **TINY)
    assert equal(model, tiny())
    assert asked[0] == "sub/model.safetensors.index.json"
    assert set(asked[1:]) == {f"sub/model-0000{i}-of-00002.safetensors" for i in (1, 2)}


def test_faulty_indices_and_single_shards_say_what_to_give(tmp_path: Path) -> None:
    index = shards(tmp_path)
    with pytest.raises(UserError, match=r"does not fit Vim; it is one of several files: give their index"):
        load(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"is a folder: give the file in it, such as model\.safetensors"):
        load(tmp_path)
    maps = [{}, [], {"a": None}, {"a": 1, "b": "x"}, *({"a": file} for file in ("", "../../w.safetensors", "/w.bin"))]
    for content in ("[]", "{", "[" * 10**5, *(json.dumps({"weight_map": weight_map}) for weight_map in maps)):
        index.write_text(content)
        with pytest.raises(UserError, match="cannot read checkpoint .* as the index of a sharded one: .*a weight_map"):
            load(index)
    index.write_text('{"weight_map": {"a": "absent.safetensors"}}')
    with pytest.raises(UserError, match=r"absent\.safetensors does not exist"):
        load(index)


def test_a_parameter_in_two_shards_is_refused(tmp_path: Path) -> None:
    index = shards(tmp_path)
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file({**_tensors(second), "cls_token": torch.ones(1, 1, 24)}, second)
    with pytest.raises(UserError, match=r"cls_token is in model-00002-of-00002\.safetensors and in another file"):
        load(index)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.SAFETENSORS", "w"])
def test_the_content_of_a_file_tells_its_format(tmp_path: Path, name: str) -> None:
    torch.save(tiny().state_dict(), tmp_path / name)
    assert equal(load(tmp_path / name), tiny())
    save_file(tiny().state_dict(), tmp_path / name, {"grid_size": "[4, 4]"})
    assert equal(load(tmp_path / name), tiny())


@pytest.mark.parametrize("save", [save_file, torch.save], ids=["safetensors", "PyTorch"])
def test_damaged_files_say_what_to_do(tmp_path: Path, save: Callable) -> None:
    path = tmp_path / "w"
    save(tiny().state_dict(), path)
    content = path.read_bytes()
    for part in (b"", content[:5], content[: len(content) // 2], b"version https://git-lfs.github.com/spec/v1"):
        path.write_bytes(part)
        with pytest.raises(UserError, match=r"cannot read checkpoint .*Download or save it again\.$"):
            load(path)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    state = tiny().state_dict()
    torch.save(state, tmp_path / "w.pth")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    content[content.index(state["cls_token"].numpy().tobytes())] ^= 0x40
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged or incomplete.*checksums.*Download or save it again"):
        load(tmp_path / "w.pth")
    torch.serialization.set_crc32_options(False)  # then there is nothing to compare
    try:
        torch.save(state, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert equal(load(tmp_path / "w.pth"), tiny())


@pytest.mark.parametrize("place", ["bundled", "hub"])
def test_a_file_of_a_known_digest_is_compared_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """safetensors has no checksum: a flipped bit would be another weight."""
    save_file(tiny().state_dict(), tmp_path / "w.safetensors", {"grid_size": "[4, 4]"})
    content = bytearray((tmp_path / "w.safetensors").read_bytes())
    digest = hashlib.sha256(content).hexdigest()
    if place == "bundled":
        monkeypatch.setattr("mtr_lab.backbones.hub.ASSETS", tmp_path)
        (tmp_path / "SHA256SUMS").write_text(f"{digest}  w.safetensors\n")
        file = content_of = tmp_path / "w.safetensors"
    else:  # the hub's cache
        file, content_of = tmp_path / "snapshots" / "commit" / "w.safetensors", tmp_path / "blobs" / digest
        for path in (file, content_of):
            path.parent.mkdir(parents=True)
        content_of.write_bytes(content)
        file.symlink_to(content_of)
    assert load(file).weights["sha256"] == digest
    content[-5] ^= 1
    content_of.write_bytes(content)
    with pytest.raises(UserError, match=f"damaged or incomplete. Its SHA-256 is not {digest}"):
        load(file)


def test_the_digests_of_all_bundled_weights_are_listed() -> None:
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in ASSETS.glob("*.safetensors")}
    assert files
    assert {name: expected_sha256(ASSETS / name) for name in files} == files


def save_pth(model: nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def save_lightning(model: nn.Module, path: Path) -> Path:
    module = lightning.LightningModule()
    module.model = model
    average = {key: value.clone() for key, value in module.state_dict().items()}  # a plain dict
    torch.save({"state_dict": average, "current_model_state": module.state_dict()}, path.with_suffix(".ckpt"))
    return path.with_suffix(".ckpt")


SIZES = [(64, 160), (160, 64), (56, 224), (32, 128)]
"""8 x 20, 20 x 8, 7 x 28 and 4 x 16 patches; the latter two have as many patches as a square."""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("save", [save_pth, save_lightning])
@pytest.mark.filterwarnings("ignore:.*several weights")
def test_a_model_that_is_not_square_survives_a_round_trip(tmp_path: Path, size: tuple, save: Callable) -> None:
    model = tiny(img_size=size)
    path = save(model, tmp_path / "w")
    assert equal(create_model("vim_ti", checkpoint=path, **{**TINY, "img_size": size}), model)
    clone = tiny(1, img_size=size)
    clone.load_state_dict(model.state_dict())
    assert equal(clone, model)


def test_rows_are_never_taken_for_columns(tmp_path: Path) -> None:
    model, turned = tiny(img_size=(64, 160)), {"img_size": (160, 64)}
    ramp = torch.arange(20.0).expand(8, 20).reshape(160, 1).expand(160, 24)  # rises along the columns
    model.pos_embed.data = torch.cat([ramp[:80], torch.zeros(1, 24), ramp[80:]])[None]
    loaded = load(save_pth(model, tmp_path / "w"), **turned)
    grid = torch.cat([loaded.pos_embed[0, :80], loaded.pos_embed[0, 81:]])[:, 0].unflatten(0, (20, 8))
    assert torch.allclose(grid, grid[:1].expand(20, 8), atol=1e-4)
    assert (grid[0].diff() > 1).all()
    with pytest.raises(RuntimeError, match=r"pos_embed is that of 8 x 20 patches, the model has 20 x 8"):
        tiny(**turned).load_state_dict(model.state_dict())
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"look like 8 x 20 ones, not 20 x 8, .*give checkpoint_grid=\[8,20\]"):
        load(tmp_path / "w.safetensors", **turned)
    with pytest.raises(UserError, match=r"neither a square nor the model's number, .*checkpoint_grid=\[ROWS,COLUMNS\]"):
        load(tmp_path / "w.safetensors")
    assert equal(load(tmp_path / "w.safetensors", img_size=(64, 160)), model)
    assert equal(load(tmp_path / "w.safetensors", img_size=(64, 160), checkpoint_grid=[8, 20]), model)
    assert torch.equal(load(tmp_path / "w.safetensors", checkpoint_grid=[8, 20], **turned).pos_embed, loaded.pos_embed)


def test_embeddings_that_do_not_tell_rows_from_columns_are_taken_with_a_warning(tmp_path: Path) -> None:
    model = tiny(img_size=(64, 160))  # random
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    own, turned = ({**TINY, "img_size": size, "checkpoint": tmp_path / "w.safetensors"} for size in SIZES[:2])
    with pytest.warns(UserWarning, match=r"does not tell 8 x 20 .* taken as 8 x 20.*checkpoint_grid=\[20,8\]") as said:
        assert equal(create_model("vim_ti", **own), model)
    assert said[0].filename == __file__
    with pytest.warns(UserWarning, match=r"does not tell 20 x 8 .* taken as 20 x 8.*checkpoint_grid=\[8,20\]"):
        create_model("vim_ti", **turned)


def test_as_many_patches_as_a_square_are_a_square_and_it_says_so(tmp_path: Path) -> None:
    model = tiny(img_size=(56, 224))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    wide = {**TINY, "img_size": (56, 224), "checkpoint": tmp_path / "w.safetensors"}
    with pytest.warns(UserWarning, match=r"does not state its grid: pos_embed is taken .*checkpoint_grid=\[7,28\]"):
        assert not equal(create_model("vim_ti", **wide), model)
    assert equal(create_model("vim_ti", **wide, checkpoint_grid=[7, 28]), model)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([4, 5], r"not the \[4, 5\]"),
        ([4], "expected the rows and columns"),
        ([4, "4"], "an integer"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(tmp_path: Path, grid: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(save_pth(tiny(), tmp_path / "w"), checkpoint_grid=grid)


def test_missing_and_unexpected_names_are_both_listed(tmp_path: Path) -> None:
    other = create_model("vim_ti", **{**TINY, "depth": 8}).state_dict()
    state = {key.replace("mixer.", "ssm."): value for key, value in other.items()}
    torch.save({"model": {f"module.{key}": value for key, value in state.items()} | {"loss.weight": torch.ones(1)}},
               tmp_path / "w.pth")  # fmt: skip
    with pytest.raises(UserError) as error:
        load(tmp_path / "w.pth")
    message = str(error.value)
    assert "w.pth (model: module.*) does not fit Vim:" in message
    assert message.count("\n  missing layers") == 10
    assert message.count("\n  unexpected layers") == 10
    assert "more" in message.splitlines()[-1]


def test_other_modules_beside_a_prefix_are_listed_if_something_is_missing(tmp_path: Path) -> None:
    state = {f"backbone.{key}": value for key, value in tiny().state_dict().items() if not key.startswith("head")}
    torch.save({**state, "decoder.weight": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(UserError) as error:
        load(tmp_path / "w.pth")
    assert "missing head.weight" in str(error.value)
    assert "unexpected decoder.weight, which lacks the prefix" in str(error.value)
    assert load(tmp_path / "w.pth", num_classes=0).weights["part"] == "backbone.*"


def test_another_number_of_classes_and_of_channels(tmp_path: Path) -> None:
    source = tiny(num_classes=7)
    path = save_pth(source, tmp_path / "w")
    with pytest.raises(UserError, match=r"has 7 classes, the model 5: .*num_classes=7.*new_head=True"):
        load(path)
    with pytest.warns(UserWarning, match="7 classes, the model 5: the head is left untrained"):
        model = create_model("vim_ti", checkpoint=path, new_head=True, **TINY)
    assert torch.equal(model.layers[1].mixer.A_log, source.layers[1].mixer.A_log)
    assert equal(load(path, new_head=True, num_classes=7), source)
    grey, many = load(path, num_classes=7, channels=1), load(path, num_classes=7, channels=6)
    kernel = source.patch_embed.proj.weight
    torch.testing.assert_close(grey.patch_embed.proj.weight, kernel.sum(1, keepdim=True))
    torch.testing.assert_close(many.patch_embed.proj.weight, kernel.repeat(1, 2, 1, 1) / 2)


@pytest.mark.parametrize(
    "head",
    [{}, {"head.bias": torch.ones(5)}, {"head.weight": torch.ones(())}, {"head.weight": torch.ones(5, 24, 1)}],
    ids=["none", "bias", "scalar", "kernel"],
)
def test_a_checkpoint_without_a_head_that_fits_gets_a_new_one_if_asked(tmp_path: Path, head: dict) -> None:
    source = tiny(num_classes=0)
    torch.save({**source.state_dict(), **head}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"does not fit Vim; it has no head: .*num_classes=0.*new_head=True|head\."):
        load(tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=r"w\.pth has .*: the head is left untrained"):
        model = create_model("vim_ti", checkpoint=tmp_path / "w.pth", new_head=True, **TINY)
    assert torch.equal(model.layers[1].mixer.A_log, source.layers[1].mixer.A_log)
    assert equal(load(tmp_path / "w.pth", num_classes=0), source)


@pytest.mark.parametrize("changes", [{"depth": 3}, {"d_state": 8}, {"embed_dim": 48}, {"patch_size": 16}])
def test_another_geometry_says_what_to_do(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(UserError, match=r"does not fit Vim: create the model with the arguments .* saved from:\n"):
        load(save_pth(tiny(), tmp_path / "w"), **changes)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((5,), torch.nan), r"head.bias has values that are not numbers \(NaN\)"),
        (torch.full((5,), -torch.inf), r"head.bias has values that are not numbers \(NaN\) or infinite"),
        (torch.full((5,), 1e300, dtype=torch.float64), r"head.bias has values that are .* infinite"),
        (torch.ones(5, dtype=torch.int8), "head.bias has numbers of torch.int8, expected those of torch.float32"),
        (torch.ones(5, dtype=torch.complex64), "head.bias has numbers of torch.complex64"),
        (torch.ones(5).to_sparse(), "head.bias is quantised, nested, sparse or without values"),
        (torch.ones(5).to_sparse().coalesce(), "head.bias is quantised, nested, sparse or without values"),
        (torch.ones(5, 5).to_sparse_csr(), "head.bias is quantised, nested, sparse or without values"),
        (torch.nested.nested_tensor([torch.ones(5)]), "head.bias is quantised, nested, sparse or without values"),
        (torch.quantize_per_tensor(torch.ones(5), 0.1, 0, torch.qint8), "head.bias is quantised"),
        (torch.ones(5, device="meta"), "head.bias is quantised, nested, sparse or without values"),
        (torch.ones(1).expand(10**12), "head.bias has 1000000000000 values, of which the file stores 1"),
    ],
    ids=[
        *("NaN", "infinite", "too large", "int8", "complex"),
        *("sparse", "coalesced", "CSR", "nested", "quantised", "meta", "expanded"),
    ],
)
def test_numbers_that_are_no_weights_are_refused(tmp_path: Path, value: torch.Tensor, message: str) -> None:
    torch.save({**tiny().state_dict(), "head.bias": value}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        create_model("vim_ti", checkpoint=tmp_path / "w.pth", **TINY)


@pytest.mark.parametrize("kind", ["int8", "bool", "complex64", "sparse", "quantised", "meta", "empty"])
@pytest.mark.parametrize("key", ["pos_embed", "patch_embed.proj.weight"])
def test_they_are_refused_before_they_are_adapted(tmp_path: Path, kind: str, key: str) -> None:
    value = tiny().state_dict()[key]
    unusual = {
        "sparse": value.to_sparse(),
        "quantised": torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
        "meta": value.to("meta"),
        "empty": value[:, :, :0] if key == "pos_embed" else value[:0],
    }
    value = unusual[kind] if kind in unusual else value.to(getattr(torch, kind))
    torch.save({**tiny().state_dict(), key: value}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"{key} (is|has)"):
        create_model("vim_ti", checkpoint=tmp_path / "w.pth", **{**TINY, "img_size": 64, "channels": 1})


def test_position_embeddings_of_more_patches_than_any_image(tmp_path: Path) -> None:
    torch.save({**tiny().state_dict(), "pos_embed": torch.zeros(1, 1025**2 + 1, TINY["embed_dim"])}, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match="pos_embed has 1050625 patches, more than any image has: expected at most 1048576"
    ):
        load(tmp_path / "w.pth")


class Payload:
    def __reduce__(self) -> Any:
        return print, ("executed",)


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_no_code_of_a_file_is_executed(tmp_path: Path, place: str, capsys: pytest.CaptureFixture) -> None:
    state = tiny().state_dict()
    content = {"model": state, "extra": Payload()} if place == "beside" else {**state, "extra": Payload()}
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"holds objects of builtins.print, which would run code: save"):
        load(tmp_path / "w.pth")
    assert capsys.readouterr().out == ""


def test_a_file_without_weights_says_what_it_expects(tmp_path: Path) -> None:
    for content in ({"epoch": 3, "args": argparse.Namespace()}, [1, 2], torch.ones(2)):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(UserError, match="contains no state dict: expected parameter names and tensors"):
            load(tmp_path / "w.pth")
