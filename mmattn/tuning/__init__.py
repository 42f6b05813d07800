"""Calibration: which sparse setting each layer and step of a pipeline can bear, as a recipe."""

from mmattn.tuning.defaults import default_candidates, default_prompts
from mmattn.tuning.run import Tuned, tune

__all__ = ["Tuned", "default_candidates", "default_prompts", "tune"]
