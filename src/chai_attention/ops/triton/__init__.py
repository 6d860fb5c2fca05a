"""Clustered attention on NVIDIA GPUs, in Triton."""

from chai_attention.ops.triton.launch import attention

__all__ = ["attention"]
