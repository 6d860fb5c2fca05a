"""Clustered attention itself: one signature, several implementations, picked by device."""

from chai_attention.ops.call import AttentionCall, DenseKV, PackedKV, PackedQueries, PagedKV, Probe
from chai_attention.ops.choice import cpu_attention
from chai_attention.ops.dispatch import (
    attention,
    decode_recent,
    paged_decode,
    paged_prefill,
    varlen_prefill,
    windowed_attention,
)
from chai_attention.ops.probe import window_gram, window_output_distances

__all__ = [
    "AttentionCall",
    "DenseKV",
    "PackedKV",
    "PackedQueries",
    "PagedKV",
    "Probe",
    "attention",
    "cpu_attention",
    "decode_recent",
    "paged_decode",
    "paged_prefill",
    "varlen_prefill",
    "window_gram",
    "window_output_distances",
    "windowed_attention",
]
