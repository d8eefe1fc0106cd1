"""Small geometries of the library's models: the arguments of ``create_model`` that differ between families."""

from typing import Any


def geometry(name: str, depth: int, width: int) -> dict[str, Any]:
    """Of a model by its name: few blocks and channels; a pyramid has at least one block a stage."""
    if name.startswith("vmamba"):
        return {"depths": (1, 1, max(depth - 3, 1), 1), "dims": width // 2}
    if name.startswith("mambavision"):
        return {"depths": (1, 1, max(depth - 3, 1), 1), "dim": width // 2, "in_dim": 8, "num_heads": (1, 1, 2, 2)}
    return {"depth": depth, "embed_dim": width}
