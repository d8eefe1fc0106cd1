"""Classification data: images in class folders, or datasets that timm opens."""
