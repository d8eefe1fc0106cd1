"""Segmentation data: images with label maps."""
