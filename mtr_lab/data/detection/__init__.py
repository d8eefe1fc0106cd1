"""Detection data: images with boxes and masks of objects."""
