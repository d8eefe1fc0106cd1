"""Exported models: files that run without this library, each verified against the model before it gets its name."""

from mtr_lab.export.model import FORMATS, Exported, export_model, read_exported

__all__ = ["FORMATS", "Exported", "export_model", "read_exported"]
