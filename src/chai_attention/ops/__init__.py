"""Clustered attention itself: one signature, several implementations, picked by device."""

from chai_attention.ops.choice import cpu_attention
from chai_attention.ops.dispatch import attention
from chai_attention.ops.probe import window_gram, window_output_distances

__all__ = ["attention", "cpu_attention", "window_gram", "window_output_distances"]
