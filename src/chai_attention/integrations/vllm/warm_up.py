"""Steps that make a layer compile its kernels before any request waits for them.

Kernels are compiled for tile sizes, which depend on how many tokens and requests a step has. These
steps cover all sizes. They read page 0, which no request holds, and write to no page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chai_attention.integrations.vllm.decode_graphs import growing
from chai_attention.integrations.vllm.metadata import ChaiMetadata, LocalTables
from chai_attention.integrations.vllm.request_spans import RequestSpans

if TYPE_CHECKING:
    from chai_attention.integrations.vllm.model_state import ModelState

# tokens of a prompt's first chunk, and of further chunks: one for each size of the kernels' tiles
FIRST_CHUNK = (128,)
FURTHER_CHUNKS = (16, 64, 128)
FEW = 8  # requests up to which each number of them is tried
LONG_CONTEXT = 1024
BESIDE = 16  # tokens of a short prompt's first chunk that goes together with a further one


def steps(model: ModelState, cache: Tensor) -> Iterator[ChaiMetadata]:
    """All kinds of steps for a layer with this cache, pages ``[P, 1, N, numbers]``."""
    most = model.max_requests
    few = range(1, min(most, FEW) + 1)
    yield from decodes(model, cache, [*few, *(size for size in growing(most) if size > FEW)])
    page, longest = cache.shape[2], model.config.model_config.max_model_len
    for tokens in FIRST_CHUNK:
        yield _prefill(model, cache, min(tokens, longest), 0)
    for tokens in FURTHER_CHUNKS:
        # behind a long context several programs share it, if there are few queries
        for context in (page, min(LONG_CONTEXT, longest - tokens)):
            if page <= context <= longest - tokens:
                yield _prefill(model, cache, tokens, context)
    if BESIDE + page <= longest:
        yield _prefill(model, cache, BESIDE, page, BESIDE)


def decodes(model: ModelState, cache: Tensor, batches: Sequence[int]) -> Iterator[ChaiMetadata]:
    """Steps of so many requests with one token each, and of all lengths for each number."""
    longest = model.config.model_config.max_model_len
    lengths = [1 << n for n in range(6, 32) if 1 << n < longest] + [longest]
    for batch in batches:
        for most in lengths:
            # a capture's, as requests of one token would else count as new ones
            yield _step(model, cache, [1] * batch, [1] * batch, batch, most, is_capture=True)


def _prefill(
    model: ModelState, cache: Tensor, tokens: int, context: int, beside: int = 0
) -> ChaiMetadata:
    """A prompt's chunk, and the first chunk of another one beside it."""
    query_lens, seq_lens = [tokens], [tokens + context]
    if beside:
        query_lens.append(beside)
        seq_lens.append(beside)
    return _step(model, cache, query_lens, seq_lens, 0, tokens + context)


def _step(
    model: ModelState,
    cache: Tensor,
    query_lens: list[int],
    seq_lens: list[int],
    num_decodes: int,
    max_seq_len: int,
    is_capture: bool = False,
) -> ChaiMetadata:
    count, tokens, device = len(query_lens), sum(query_lens), cache.device
    starts = [0, *accumulate(query_lens)]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int32, device=device)

    local = None
    if model.local is not None:
        page = model.local.kv_cache.shape[2]
        local = LocalTables(zeros(count, -(-max_seq_len // page)), zeros(tokens).long() - 1)
    return ChaiMetadata(
        requests=RequestSpans(starts, seq_lens),
        num_actual_tokens=tokens,
        num_decodes=num_decodes,
        query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        block_table=zeros(count, -(-max_seq_len // cache.shape[2])),
        slot_mapping=zeros(tokens).long() - 1,
        first_pages=zeros(count),
        token_pages=zeros(tokens),
        max_query_len=max(query_lens),
        max_seq_len=max_seq_len,
        is_capture=is_capture,
        local=local,
        is_warm_up=True,
    )
