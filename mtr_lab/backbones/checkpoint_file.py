"""Read the parameters of a checkpoint in the forms in which people have them; nothing in a file is executed.

A file is a state dict, or a training program's dictionary with several of them (the weights, their moving average),
perhaps with a prefix to all names (``module.`` of data parallelism, ``_orig_mod.`` of ``torch.compile``, ``model.`` of
Lightning). The names that the model expects tell which of its mappings are weights.
"""

import json
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mtr_lab.backbones.hub import fetch, first_line
from mtr_lab.errors import UserError

INDEX = ".index.json"
"""The suffix of the file that lists the files of a sharded checkpoint."""
_ENTRIES = ("", "model", "state_dict", "model_state_dict", "module", "net", "network", "weights", "params")
"""Names of entries with weights, in the order of preference; moving averages come last."""
_DEPTH = 4  # of the mappings that are looked at
_DATA = {"argparse", "collections", "numpy", "omegaconf", "pathlib", "typing"}
_DATA |= {"lightning", "lightning_fabric", "pytorch_lightning"}
"""Packages whose objects training programs save with the weights. They are never made: see :class:`_Inert`."""
_PLAIN = {f"builtins.{kind.__name__}" for kind in (bool, bytes, dict, float, frozenset, int, list, set, str, tuple)}


@dataclass(frozen=True)
class StateDict:
    """One state dict of a file."""

    entry: str
    """Where it is in the file, keys joined by dots; empty for the file itself."""
    prefix: str
    """The prefix of its names, which ``state`` lacks."""
    state: dict[str, Tensor]
    others: tuple[str, ...]
    """Names without the prefix, which belong to other modules."""
    matches: int
    """The number of expected names among its names."""
    grid: tuple[int, ...] | None
    """(rows, columns) of the patches, if the state dict was made by a model that states them."""

    @property
    def averaged(self) -> bool:
        """Whether its name says that it is a moving average."""
        return "ema" in f"{self.entry}.{self.prefix}".lower()

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.entry, self.prefix and f"{self.prefix}*"))) or "the file itself"

    @property
    def key(self) -> str:
        """The key that means this state dict alone."""
        return f"{self.entry}.{self.prefix}".strip(".")

    def is_called(self, key: str) -> bool:
        """Whether a user who gives this key means it."""
        return key.removesuffix(".") in (self.entry, self.prefix[:-1], self.key)


def files_of(checkpoint: str, revision: str) -> tuple[list[Path], str | None]:
    """The local files of a path or an ``hf://`` address: of a sharded checkpoint its index, then the shards.

    Returns:
        The files, and their commit on the hub.

    Raises:
        UserError: an absent file, or an invalid index.
    """
    path, commit = fetch(checkpoint, revision)
    if not path.name.endswith(INDEX):
        return [path], commit
    try:
        weights = dict(json.loads(path.read_text(encoding="utf-8"))).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(shard, str) for shard in weights.values()):
            raise ValueError("it has no weight_map of names")
        shards = sorted(set(weights.values()))
        if not shards or any(not (p := Path(shard)).name or p.is_absolute() or ".." in p.parts for shard in shards):
            raise ValueError("it lists no file, or a file in another folder")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"cannot read checkpoint {path} as the index of a sharded one: {first_line(error).rstrip('.')}. Expected "
            "a weight_map from the names of parameters to files in its folder."
        ) from error
    folder = checkpoint.rpartition("/")[0]
    return [path, *(fetch(f"{folder}/{shard}" if folder else shard, revision)[0] for shard in shards)], commit


def read(files: list[Path]) -> Any:
    """The content of the files of a checkpoint.

    Raises:
        UserError: a file that is damaged, or that holds objects other than tensors and plain values; a parameter in
            several files.
    """
    if len(files) == 1:
        return _read(files[0])
    content: dict[str, Any] = {}
    for file in files[1:]:
        shard = _read(file)
        shard = shard if isinstance(shard, dict) else {}
        if twice := [name for name in shard if name in content]:
            raise UserError(
                f"checkpoint {files[0]}: {twice[0]} is in {file.name} and in another file, expected in one."
            )
        content |= shard
    return content


def is_safetensors(path: Path) -> bool:
    """Whether a file is one, by its content: the length of a JSON header, then the header."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _read(path: Path) -> Any:
    try:
        if is_safetensors(path):
            return load_file(path)
        check_sums(path)
        inert: list[Any] = [(_stand_in(name), name) for name in _globals(path) if _is_data(name)]
        with torch.serialization.safe_globals(inert), path.open("rb") as file:  # by the path it would go by the suffix
            return torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"cannot read checkpoint {path}: {first_line(error)}") from error
    except (SafetensorError, zipfile.BadZipFile) as error:
        raise damaged(path, error) from error
    except Exception as error:  # damaged bytes make the unpickler raise anything from KeyError to struct.error
        # PyTorch's own message advises to execute the file, or quotes an error inside the unpickler.
        reason, advice = "it is neither a safetensors file nor a PyTorch checkpoint that contains tensors alone.", ""
        if classes := _foreign_classes(path):
            advice = f" It holds objects of {', '.join(classes[:3])}, which would run code: save the weights alone, "
            advice += "torch.save(model.state_dict(), FILE)."
        raise UserError(f"cannot read checkpoint {path}: {reason}{advice or _AGAIN}") from error


_FOLDER = 0x10  # of the attributes that MS-DOS gives files


def check_sums(path: Path) -> None:
    """Raise ``BadZipFile`` if the content of a zip file does not have the checksums in it, which PyTorch ignores."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if any(entry.external_attr & _FOLDER for entry in file.infolist()):
                raise zipfile.BadZipFile("Values are marked as a folder, which PyTorch reads as no values.")
            has_sums = any(entry.CRC for entry in file.infolist())  # PyTorch can be told to write none
            if has_sums and file.testzip() is not None:
                raise zipfile.BadZipFile("Its content does not have its checksums.")


_AGAIN = " Download or save it again."


def damaged(path: Path, error: Exception) -> UserError:
    """The error about a file of a known format with other bytes than it was saved with."""
    return UserError(
        f"cannot read checkpoint {path}: it is damaged or incomplete. {first_line(error).rstrip('.')}.{_AGAIN}"
    )


def _stand_in(name: str) -> type:
    return _Inert if name.partition(".")[0] in ("numpy", "pathlib") else _InertMapping


def _foreign_classes(path: Path) -> list[str]:
    return [name for name in _globals(path) if not _is_data(name)]


def _is_data(name: str) -> bool:
    return name in _PLAIN or name.partition(".")[0] in _DATA


def _globals(path: Path) -> list[str]:
    """The full names of classes and functions in a PyTorch file that its reader does not know."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a zip file; damaged
        return ["argparse.Namespace"]


class _Inert:
    """Stands for a class or a function of another package in a file, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _InertMapping:
    """The same for classes of mappings: PyTorch's restricted unpickler sets the items of an ``OrderedDict`` alone."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def choose(content: Any, expected: Collection[str], key: str | None, label: str) -> tuple[StateDict, list[StateDict]]:
    """The state dict to load out of a file's content, and all that have as many of the expected names.

    Args:
        content: of the file.
        expected: names of the model's parameters.
        key: the entry or the prefix that the user wants, by default the weights rather than their moving average.
        label: of the file, for errors.

    Raises:
        UserError: no state dict, or none of that key.
    """
    candidates = list(_candidates(content, "", expected, _DEPTH))
    if not candidates:
        raise UserError(f"{label} contains no state dict: expected parameter names and tensors.")
    if key is not None:
        called = [state for state in candidates if state.is_called(key)]
        if not called:
            names = ", ".join(dict.fromkeys(map(str, candidates)))
            raise UserError(f"checkpoint_key={key}: {label} has no such weights. It has: {names}.")
        candidates = called
    most = max(state.matches for state in candidates)
    best = sorted((state for state in candidates if state.matches == most), key=_preference)
    return best[0], best


def _preference(state: StateDict) -> tuple[bool, int, int]:
    known = _ENTRIES.index(state.entry) if state.entry in _ENTRIES else len(_ENTRIES)
    return state.averaged, known, len(state.prefix)


def _candidates(content: Any, entry: str, expected: Collection[str], depth: int) -> Iterator[StateDict]:
    """The mappings in a content with tensors under names, once for each prefix that their names may have."""
    if not isinstance(content, Mapping):
        return
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    for prefix in _prefixes(tensors, expected) if tensors else ():
        state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        beside = {name: value for name, value in tensors.items() if name in expected and name not in state}
        state |= {name: value for name, value in beside.items() if not name.startswith(prefix)}  # a head without it
        others = tuple(name for name in tensors if not name.startswith(prefix) and name not in beside)
        matches = len(state.keys() & set(expected))
        yield StateDict(entry, prefix, state, others, matches, _stated_grid(content, prefix))
    for name, value in named.items() if depth else ():
        yield from _candidates(value, f"{entry}.{name}".removeprefix("."), expected, depth - 1)


def _prefixes(names: Collection[str], expected: Collection[str]) -> list[str]:
    """What stands before some of the expected names, ``""`` if nothing does."""
    ordered = sorted(expected)
    anchors = {ordered[len(ordered) * i // 8] for i in range(8)} if ordered else set()
    prefixes = {
        name.removesuffix(anchor)
        for anchor in anchors
        for name in names
        if name == anchor or name.endswith(f".{anchor}")
    }
    return sorted(prefixes) or [""]


def _stated_grid(content: Any, prefix: str) -> tuple[int, ...] | None:
    """As ``torch.nn.Module.state_dict`` of our models notes it, beside the tensors."""
    metadata = getattr(content, "_metadata", None)
    module = metadata.get(prefix.removesuffix("."), {}) if isinstance(metadata, Mapping) else {}
    grid = module.get("grid_size") if isinstance(module, Mapping) else None
    return tuple(grid) if isinstance(grid, list | tuple) and all(isinstance(side, int) for side in grid) else None
