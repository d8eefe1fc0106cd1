"""``predictions.npz``: the predictions of a run on disk.

Paired comparisons read it, and the jobs of a sweep share the unreduced model's.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np

from mtr_lab.errors import UserError
from mtr_lab.results.atomic import replace_file
from mtr_lab.results.classifications import Classifications, VideoClassifications
from mtr_lab.results.detections import Detections
from mtr_lab.results.predictions import Predictions
from mtr_lab.results.segmentations import Segmentations

FILE_NAME = "predictions.npz"
_KINDS: dict[str, type[Predictions]] = {
    kind.task: kind for kind in (Classifications, Detections, Segmentations, VideoClassifications)
}
_OLD_KINDS = {"log_probs": Classifications, "figures": Detections, "confusion": Segmentations}
"""By a field that no other kind has: older files do not name their task."""
_OLD_NAMES = {"hits": "found"}  # of arrays in older files


def save_predictions(predictions: Predictions, directory: str | Path) -> Path:
    """Write ``directory/predictions.npz``, complete or not at all, and return its path."""
    path = Path(directory) / FILE_NAME
    arrays = {field.name: getattr(predictions, field.name) for field in fields(predictions)}
    arrays["task"] = np.array(predictions.task)
    plain = {name: array.astype(np.str_) if array.dtype == object else array for name, array in arrays.items()}
    with replace_file(path) as stream:
        # Log-probabilities hardly shrink; confusion matrices are mostly zeros.
        (np.savez_compressed if isinstance(predictions, Segmentations) else np.savez)(stream, **plain)
    return path


def load_predictions(path: str | Path) -> Predictions:
    """Read predictions from their file or from the folder that holds it; runs no pickled code.

    Raises:
        UserError: there is no such file, or it does not hold predictions.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        if path.exists() and not (path.is_file() and zipfile.is_zipfile(path)):
            raise ValueError("it is not an archive of arrays")  # NumPy would advise to unpickle it
        with np.load(path, allow_pickle=False) as arrays:
            kind = _kind(arrays)
            names = [field.name for field in fields(kind)]
            stored = {name: _OLD_NAMES[name] if _OLD_NAMES.get(name) in arrays else name for name in names}
            return kind(**{name: arrays[stored[name]] for name in names})
    except OSError as error:
        raise UserError(
            f"cannot read the predictions {path}: {error.strerror or error}. Give a {FILE_NAME} or its folder."
        ) from error
    except Exception as error:  # of damaged bytes zipfile and NumPy raise anything from MemoryError to TokenError
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{path} does not hold predictions: {reason}. Expected the {FILE_NAME} of an evaluation."
        ) from error


def _kind(arrays: Mapping[str, np.ndarray]) -> type[Predictions]:
    """The kind of predictions that a file holds; raises a ``ValueError`` if it holds none."""
    if "task" in arrays:
        task = str(arrays["task"])
        if task not in _KINDS:
            raise ValueError(f"its task is {task!r}, not one of {', '.join(_KINDS)}")
        return _KINDS[task]
    for field, kind in _OLD_KINDS.items():
        if field in arrays:
            return kind
    raise ValueError(f"it has neither a task nor one of the arrays {', '.join(_OLD_KINDS)}")
