"""The operations of attention with flat arguments, as tests give them, by any backend."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from chai_attention import ops
from chai_attention.ops.backend import AttentionBackend
from chai_attention.ops.call import AttentionCall, DenseKV, PackedKV, PackedQueries, PagedKV


def attend_by(attend, query, key, value, member, *, lengths=None, valid=None, **options):
    """Call what takes the arguments of `AttentionBackend.attend`."""
    return attend(query, DenseKV(key, value, lengths, valid), AttentionCall(member, **options))


@dataclass(frozen=True)
class Operations:
    """Each call checked and dispatched by its device; or as it is, to ``backend``."""

    backend: AttentionBackend | None = None

    def attention(self, *states, **options):
        if self.backend is None:
            return ops.attention(*states, **options)
        return attend_by(self.backend.attend, *states, **options)

    def decode_recent(
        self, query, key, value, member, local, *, lengths=None, valid=None, **options
    ):
        run = ops.decode_recent if self.backend is None else self.backend.decode_recent
        kv = DenseKV(key, value, lengths, valid)
        return run(query, kv, local, AttentionCall(member, **options))

    def windowed(self, query, key, value, member, local, tables, **options):
        run = ops.windowed_attention if self.backend is None else self.backend.attend_window
        return run(query, DenseKV(key, value), local, tables, AttentionCall(member, **options))

    def paged_decode(
        self, query, keys, values, table, member, *, lengths, local=None, ids=None, out=None,
        most_keys=None, **options,
    ):  # fmt: skip
        pages = PagedKV(keys, values, table, lengths, local, most_keys)
        call = AttentionCall(member, membership_ids=ids, **options)
        if self.backend is None:
            return ops.paged_decode(query, pages, call, out)
        if out is None:
            out = query.new_empty(query.shape[0], member.heads, values.shape[3])
        return out, self.backend.paged_decode(query, pages, call, out)

    def paged_prefill(
        self, query, keys, values, table, member, out=None, *, query_starts, lengths,
        most_queries, ids=None, local=None, probe=None, **options,
    ):  # fmt: skip
        pages = PagedKV(keys, values, table, lengths, local)
        queries = PackedQueries(query, query_starts, most_queries)
        call = AttentionCall(member, membership_ids=ids, **options)
        if self.backend is None:
            return ops.paged_prefill(queries, pages, call, out, probe)
        return out, self.backend.packed_prefill(queries, pages, call, out, probe)

    def varlen_prefill(
        self, query, key, value, member, out=None, *, query_starts, most_queries, ids=None,
        probe=None, natural_order=False, recent=0, sinks=0, **options,
    ):  # fmt: skip
        new = PackedKV(key, value, natural_order, recent, sinks)
        queries = PackedQueries(query, query_starts, most_queries)
        call = AttentionCall(member, membership_ids=ids, **options)
        if self.backend is None:
            return ops.varlen_prefill(queries, new, call, out, probe)
        return out, self.backend.packed_prefill(queries, new, call, out, probe)


dispatched = Operations()
if find_spec("triton") is not None:
    from chai_attention.ops.triton.backend import of_device

    kernels = Operations(of_device(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
