"""Clustered Head Attention: cheaper inference by sharing attention between heads that agree.

>>> from chai_attention import calibrate, enable
>>> profile = calibrate(model, tokenizer, texts)  # doctest: +SKIP
>>> enable(model, profile)  # doctest: +SKIP
>>> model.generate(**inputs)  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chai_attention.calibration import calibrate
    from chai_attention.errors import (
        CacheError,
        CalibrationError,
        ChaiError,
        ProfileError,
        UnsupportedModelError,
    )
    from chai_attention.integrations.transformers import ClusteredCache, disable, enable, enabled
    from chai_attention.membership import Membership
    from chai_attention.profile import ClusterProfile

__all__ = [
    "CacheError",
    "CalibrationError",
    "ChaiError",
    "ClusterProfile",
    "ClusteredCache",
    "Membership",
    "ProfileError",
    "UnsupportedModelError",
    "calibrate",
    "disable",
    "enable",
    "enabled",
]

_HOMES = {
    "calibration": ("calibrate",),
    "errors": (
        "CacheError",
        "CalibrationError",
        "ChaiError",
        "ProfileError",
        "UnsupportedModelError",
    ),
    "integrations.transformers": ("ClusteredCache", "disable", "enable", "enabled"),
    "membership": ("Membership",),
    "profile": ("ClusterProfile",),
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when something that needs them is used."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"chai_attention.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
