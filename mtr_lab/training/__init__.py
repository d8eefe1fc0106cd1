"""A training run: its loop's callbacks, its checkpoint, its files."""
