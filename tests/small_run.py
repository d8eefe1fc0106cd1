"""The smallest run of the default program."""

SMALL = [
    "backbone.pretrained=false",
    "backbone.depth=6",
    "backbone.embed_dim=16",
    "dataset.batch_size=4",
    "trainer.limit_test_batches=2",
    "trainer.enable_progress_bar=false",
    "timing.batch_size=0",
]
"""Overrides that make the default program finish in a second."""
