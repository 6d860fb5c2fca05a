"""What attention is called with: these types go from a runtime's layer to the kernels' launchers.

An operation takes queries, the K and V that they attend to, which lie in one of three ways
(`DenseKV`, `PagedKV`, `PackedKV`), and an `AttentionCall`, which says how. What an exact recent
window needs beside them stands in `local_pages.LocalPages`, `RollingBuffer` or `local.LocalKeys`.

Nothing changes them once they are made. They are not frozen, because every layer makes some in
every step, and a frozen one takes 15 times as long to make.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.local_pages import LocalPages

Made = TypeVar("Made")


@dataclass(slots=True, eq=False)
class AttentionCall:
    """How to attend, wherever K and V lie.

    Attributes:
        membership: whom each head follows: tables of one row for all sequences, of one for each,
            or of any number with ``membership_ids``.
        scale: factor on the scores, usually ``D ** -0.5``.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2); None for as they are.
        membership_ids: ``[B]`` int32, each sequence's row of the membership's tables; of pages and
            packed sequences.
        offset: ``[B, H]`` float32, with an exact window: added to the log-sum-exp of each head's
            far keys (`windowed.head_offsets`). None for zeros, which is for memberships without
            streaming heads.
        return_lse: also return the log-sum-exp of each cluster's scores; without a window.
    """

    membership: Membership
    scale: float
    softcap: float | None = None
    membership_ids: Tensor | None = None
    offset: Tensor | None = None
    return_lse: bool = False

    def new_output(self, query: Tensor, value: Tensor) -> Tensor:
        """Return room for outputs of ``query [N, ..., D]``: ``[N, H, Dv]``, of its dtype."""
        shape = (query.shape[0], self.membership.heads, value.shape[-1])
        return torch.empty(shape, dtype=query.dtype, device=query.device)


@dataclass(slots=True, eq=False)
class DenseKV:
    """K and V of a batch, each sequence in a row of its own.

    Attributes:
        key: ``[B, kept_keys, S, D]`` in the order of ``membership.key_heads``.
        value: ``[B, kept_values, S, Dv]`` in the order of ``membership.value_heads``.
        lengths: ``[B]`` integer, keys in use of each row (the rest of S is unused capacity); None
            when all S are.
        valid: ``[B, S]`` bool, False where a key must not be seen (padding).
    """

    key: Tensor
    value: Tensor
    lengths: Tensor | None = None
    valid: Tensor | None = None


@dataclass(slots=True, eq=False)
class PagedKV:
    """K and V in pages of N tokens, as servers keep them; those of new tokens are written.

    Pages may be views into one buffer in which a page is a run of memory.

    Attributes:
        key: ``[P, N, kept_keys, D]`` in the order of ``membership.key_heads``; any strides but the
            last; of the query's dtype or float8_e4m3fn (`ops.fp8`).
        value: ``[P, N, kept_values, Dv]`` in the order of ``membership.value_heads``, the same.
        block_table: ``[B, max_pages]`` int32, the pages of each sequence.
        seq_lens: ``[B]`` int32, keys of each sequence, new ones included; 0 gives zeros.
        window: the exact recent window, which needs the query of all heads; None for none. A
            membership with streaming heads needs one.
        max_seqlen_k: bound of ``seq_lens`` that splits of the context are chosen for; None for what
            the block table can hold.
        shared: what kernels need to know of the pages alone, the window's too, and which membership
            they were found to fit; made once for all calls with this dictionary: those of one
            layer. None to make it anew.
    """

    key: Tensor
    value: Tensor
    block_table: Tensor
    seq_lens: Tensor
    window: LocalPages | None = None
    max_seqlen_k: int | None = None
    shared: dict[Any, Any] | None = None

    @property
    def most_keys(self) -> int:
        """No sequence has more keys."""
        return self.max_seqlen_k or self.block_table.shape[1] * self.key.shape[1]

    def once(self, make: Callable[[PagedKV], Made]) -> Made:
        """Return what a function of a module makes of the pages alone, made once if `shared`."""
        if self.shared is None:
            return make(self)
        made: Made | None = self.shared.get(make)
        if made is None:
            made = self.shared[make] = make(self)
        return made


@dataclass(slots=True, eq=False)
class PackedKV:
    """K and V of packed sequences without context: their own tokens'.

    Attributes:
        key: ``[T, kept_keys, D]`` in the order of ``membership.key_heads``; any strides but the
            last.
        value: ``[T, kept_values, Dv]`` in the order of ``membership.value_heads``, the same.
        natural_order: K and V hold all G heads in their natural order, as projections leave them,
            so that nothing has to be gathered.
        recent: w of the exact window, which needs ``natural_order`` and the query of all heads; 0
            for none.
        sinks: s, the first tokens that are always local.
    """

    key: Tensor
    value: Tensor
    natural_order: bool = False
    recent: int = 0
    sinks: int = 0


@dataclass(slots=True, eq=False)
class PackedQueries:
    """New tokens of all sequences of a step, one sequence behind the other.

    Attributes:
        query: ``[T, k, D]`` of the representatives in slot order, or ``[T, H, D]`` of all heads in
            theirs, of which the representatives' are read in place.
        query_start_loc: ``[B + 1]`` int32, where each sequence begins, and the end.
        max_seqlen_q: no sequence has more new tokens.
        shared: what kernels need to know of ``query_start_loc`` alone, and memory that calls use
            one after the other: made once for all calls with this dictionary, those of a model's
            layers in one step. None to make it anew.
    """

    query: Tensor
    query_start_loc: Tensor
    max_seqlen_q: int
    shared: dict[Any, Any] | None = None


class Probe(NamedTuple):
    """Tokens that attend with every head's own scores: those of the probe window and before.

    They stand at the start of sequences that have no context. Paper, 3.3: clusters are found in
    the first tokens' scores and used from then on.

    Attributes:
        query: ``[T, H, D]``, all heads, packed like the clustered queries.
        key: ``[T, G, D]``, in the natural order of K/V heads.
        value: ``[T, G, Dv]``, the same.
        end: first position that uses clusters.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    end: int
