"""Images annotated with objects."""
