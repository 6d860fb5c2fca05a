"""The offline phase: collect statistics of a model's attention and write a profile."""

from chai_attention.calibration.calibrate import calibrate
from chai_attention.calibration.texts import load_texts, self_text, windows_of

__all__ = ["calibrate", "load_texts", "self_text", "windows_of"]
