"""Clustered heads for Hugging Face transformers."""

from chai_attention.integrations.transformers.cache import CacheMemory, ClusteredCache
from chai_attention.integrations.transformers.enable import (
    disable,
    enable,
    enabled,
)
from chai_attention.integrations.transformers.graphs import DecodeGraph
from chai_attention.integrations.transformers.static_cache import StaticClusteredCache

__all__ = [
    "CacheMemory",
    "ClusteredCache",
    "DecodeGraph",
    "StaticClusteredCache",
    "disable",
    "enable",
    "enabled",
]
