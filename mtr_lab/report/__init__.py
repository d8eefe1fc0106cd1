"""Results and their views: ``result`` and ``predictions`` on disk, ``table`` in a terminal, ``loggers`` elsewhere."""
