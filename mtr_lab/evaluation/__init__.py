"""Evaluation of a model unreduced and reduced: operating points, passes over the images, timing, pictures, results."""

from mtr_lab.evaluation.user_model import evaluate_model

__all__ = ["evaluate_model"]
