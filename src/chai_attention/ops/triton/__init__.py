"""Clustered attention on NVIDIA GPUs, in Triton."""
