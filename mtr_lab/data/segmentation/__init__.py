"""Images annotated with label maps."""
