"""Clustered heads for Hugging Face transformers."""

from chai_attention.integrations.transformers.cache import CacheMemory, ClusteredCache
from chai_attention.integrations.transformers.enable import (
    disable,
    enable,
    enabled,
    saved_weight_bytes,
)

__all__ = ["CacheMemory", "ClusteredCache", "disable", "enable", "enabled", "saved_weight_bytes"]
