"""Results on disk: what every program writes and reads."""
