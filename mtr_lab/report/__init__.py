"""Views of results: tables in a terminal, the HTML dashboard, Lightning loggers, Weights & Biases."""
