"""Images in class folders, or from a library of datasets."""
