"""Steps that make a layer compile its kernels before any request waits for them.

Kernels are compiled for tile sizes, which depend on how many tokens and requests a step has. These
steps have every kind of it. They read page 0, which is nobody's, and write to no page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chai_attention.integrations.vllm.step import NearTables, Step
from chai_attention.integrations.vllm.step_rows import Rows

if TYPE_CHECKING:
    from chai_attention.integrations.vllm.served import ServedModel

# tokens of a prompt's first chunk, and of further chunks: one for each size of the kernels' tiles
FRESH = (128,)
CONTINUED = (16, 64, 128)
BESIDE = 16  # tokens of a short prompt's first chunk that goes together with a further one


def steps(served: ServedModel, cache: Tensor) -> Iterator[Step]:
    """All kinds of steps for a layer with this cache, pages ``[P, 1, N, numbers]``."""
    batches = [*range(1, 9), *(b << n for n in range(2, 12) for b in (3, 4))]
    yield from decodes(served, cache, [b for b in batches if b < served.rows] + [served.rows])
    page, longest = cache.shape[2], served.config.model_config.max_model_len
    for tokens in FRESH:
        yield _prefill(served, cache, min(tokens, longest), 0)
    for tokens in CONTINUED:
        if tokens + page <= longest:
            yield _prefill(served, cache, tokens, page)
    if BESIDE + page <= longest:
        yield _prefill(served, cache, BESIDE, page, BESIDE)


def decodes(served: ServedModel, cache: Tensor, batches: Sequence[int]) -> Iterator[Step]:
    """Steps of so many requests with one token each, and of all lengths for each number."""
    longest = served.config.model_config.max_model_len
    lengths = [1 << n for n in range(6, 32) if 1 << n < longest] + [longest]
    for batch in batches:
        rows = Rows(range(batch + 1), [1] * batch)
        ones = torch.ones(batch, dtype=torch.int32, device=cache.device)
        for most in lengths:
            # a capture's, as requests of one token would else count as new ones
            yield _step(served, cache, rows, ones, decodes=batch, most_keys=most, is_capture=True)


def _prefill(
    served: ServedModel, cache: Tensor, tokens: int, context: int, beside: int = 0
) -> Step:
    """A prompt's chunk, and the first chunk of another one beside it."""
    starts, lengths = [0, tokens], [tokens + context]
    if beside:
        starts.append(tokens + beside)
        lengths.append(beside)
    return _step(
        served, cache, Rows(starts, lengths),
        torch.tensor(lengths, dtype=torch.int32, device=cache.device),
        decodes=0, most_keys=tokens + context, is_capture=False,
    )  # fmt: skip


def _step(
    served: ServedModel,
    cache: Tensor,
    rows: Rows,
    lengths: Tensor,
    *,
    decodes: int,
    most_keys: int,
    is_capture: bool,
) -> Step:
    tokens, device = rows[len(rows) - 1].stop, cache.device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int32, device=device)

    near = None
    if served.near is not None:
        page = served.near.kv_cache.shape[2]
        near = NearTables(zeros(len(rows), -(-most_keys // page)), zeros(tokens).long() - 1)
    starts = torch.tensor([row.start for row in rows] + [tokens], dtype=torch.int32)
    return Step(
        rows=rows,
        tokens=tokens,
        decodes=decodes,
        query_starts=starts.to(device),
        lengths=lengths,
        block_table=zeros(len(rows), -(-most_keys // cache.shape[2])),
        slot_mapping=zeros(tokens).long() - 1,
        pages=zeros(len(rows)),
        token_pages=zeros(tokens),
        most_queries=max(row.tokens for row in rows),
        most_keys=most_keys,
        is_capture=is_capture,
        near=near,
    )
