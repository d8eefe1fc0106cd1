"""Exported models: files that run without this library, each verified against the model before it gets its name."""
