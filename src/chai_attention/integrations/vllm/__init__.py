"""Clustered heads in vLLM: an attention backend with smaller pages of K and V.

vLLM finds `register` by its entry point, in each of its processes. Nothing of vLLM is imported
before that.
"""

from chai_attention.integrations.vllm.plugin import register

__all__ = ["register"]
