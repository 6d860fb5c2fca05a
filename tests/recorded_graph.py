"""CUDA graphs played on the CPU: a step's operations are recorded and run again as they are.

As in a real graph, what Python decided while recording stays decided, every operation reads and
writes the memory it had then, and reading a tensor on the host is an error.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chai_attention.integrations.transformers import graphs, static_layer
from chai_attention.ops import reference

READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")


class RecordedGraph(TorchDispatchMode):
    """Stands for ``torch.cuda.CUDAGraph``."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in READS, f"the step read a tensor on the host: {name}"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, recorded in self.calls:
            out = func(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(out), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def write_one(key, value, keys, values, membership, start, local=None):
    """`ops.cache_write.write_dense` of one token, without a look at the host."""
    batch = key.shape[0]
    row = torch.arange(batch)
    at = start.long()

    def pick(states, heads):
        return states[row[:, None], heads.expand(batch, -1), 0]

    keys[row, :, at] = pick(key, membership.key_heads)
    values[row, :, at] = pick(value, membership.value_heads)
    if local is None:
        return
    heads_of = (key, membership.removed_key_heads), (value, membership.removed_value_heads)
    for (states, heads), (ring, sinks) in zip(heads_of, local.memories, strict=False):
        removed = pick(states, heads)
        ring[row, :, at % ring.shape[2]] = removed
        for column in range(sinks.shape[2]):
            here = local.sink_positions[:, column].long() == at
            old = sinks[:, :, column]
            sinks[:, :, column] = torch.where(here[:, None, None], removed, old)


def attend(query, key, value, membership, *, lengths, **options):
    """`ops.attention` by its definition; unused capacity may hold anything."""
    spare = torch.arange(value.shape[2]) >= lengths[:, None]
    value = value.masked_fill(spare[:, None, :, None], 0.0)
    return reference.clustered_attention(query, key, value, membership, lengths=lengths, **options)


@contextmanager
def played(monkeypatch):
    """Let `DecodeGraph` work on the CPU, with ops that are plain tensor operations."""

    class Stream:
        def wait_stream(self, other):
            pass

    @contextmanager
    def capture(graph, stream=None):
        with graph:
            yield

    plain = {
        "attention": attend,
        "decode_recent": reference.decode_recent,
        "write_dense": write_one,
    }
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "DEVICE", "cpu")
        patch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
        patch.setattr(torch.cuda, "graph", capture)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "current_stream", Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        for name, fast in ((name, getattr(static_layer, name)) for name in plain):
            # prompts run as always: only steps are recorded
            def chosen(*args, slow=plain[name], fast=fast, name=name, **kwargs):
                one = args[0].shape[2] == 1
                return (slow if one else fast)(*args, **kwargs)

            patch.setattr(static_layer, name, chosen)
        yield
