"""The bytes and FLOPs that a whole model needs at least, from which its ideal times follow."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chai_attention.benchmarking.cases import AttentionShape, Case
from chai_attention.benchmarking.ceilings import Work, attention_work
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import ModelShape


def weight_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Return the bytes of all matrices a token is multiplied with, and of the last of them."""
    head = model.get_output_embeddings()
    last = 0 if head is None else head.weight.nbytes
    matrices = {
        id(module.weight): module.weight.nbytes
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    return sum(matrices.values()), last


def model_work(
    case: Case,
    shape: ModelShape,
    weights: tuple[int, int],
    element_size: int,
    profile: ClusterProfile | None,
) -> Work:
    """Least work of a forward: one token per sequence over ``case.tokens``, or a whole prompt.

    Args:
        case: kind and size.
        shape: of the model.
        weights: as `weight_bytes` counts them, without those that are not computed.
        element_size: bytes of a number.
        profile: clusters and streaming heads; None for the plain model.
    """
    total, last = weights
    tokens = case.batch * case.queries
    # only the last token of a prompt needs logits
    flops = 2 * (tokens * (total - last) + case.batch * last) / element_size
    moved = float(total)
    one = AttentionShape("", shape.heads, shape.kv_heads, shape.head_dim)
    for layer, full in enumerate(shape.clusterable):
        clusters, kept, local = shape.heads, shape.kv_heads, 0
        streaming, values = 0, shape.kv_heads
        if profile is not None:
            clusters, kept = profile.clusters[layer], profile.kept_keys(layer, shape)
            local = profile.recent + profile.sinks if profile.recent else 0
            streaming = len(profile.streaming_heads(layer))
            values = profile.kept_values(layer, shape)
        part = attention_work(
            case, one, clusters, kept, element_size, local, streaming=streaming, kept_values=values,
            sliding=None if full else shape.sliding_window,
        )  # fmt: skip
        flops, moved = flops + part.flops, moved + part.bytes
    return Work(moved, flops)
