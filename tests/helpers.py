"""Builders used by several tests."""

import torch
from torch import Tensor

from chai_attention.membership import Membership

# how far a kernel may be from the definition in float64, with numbers of a normal distribution
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random_representatives(heads: int, clusters: int, batch: int = 1) -> Tensor:
    """``[B, H]`` with exactly ``clusters`` distinct representatives in each row."""
    rows = []
    for _ in range(batch):
        chosen = torch.randperm(heads)[:clusters]
        row = chosen[torch.randint(clusters, (heads,))]
        row[chosen] = chosen
        rows.append(row)
    return torch.stack(rows)


def random_membership(
    heads: int, clusters: int, batch: int = 1, kv_heads: int | None = None, streaming: int = 0
) -> Membership:
    """``streaming`` heads stream; at least ``clusters`` others must be left unless that is 0."""
    if not streaming:
        return Membership.from_representatives(
            random_representatives(heads, clusters, batch), kv_heads=kv_heads
        )
    mixed = torch.randperm(heads)
    forget, others = mixed[:streaming].tolist(), mixed[streaming:].sort().values
    rep = torch.arange(heads).repeat(batch, 1)
    if len(others):
        rep[:, others] = others[random_representatives(len(others), clusters, batch)]
    return Membership.from_representatives(rep, kv_heads=kv_heads, streaming=forget)


def definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    representatives: Tensor,
    scale: float,
    valid: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Clustered attention head by head in float64, from full Q, K and V: ``[B, Q, H, Dv]``.

    Independent of the library's tables: query ``[B, H, Q, D]``, key and value ``[B, G, S, D]``.
    """
    batch, heads, queries, _ = query.shape
    groups, size = key.shape[1], key.shape[2]
    out = torch.zeros(batch, queries, heads, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            r = int(representatives[b, h])
            k = key[b, r * groups // heads].double()
            v = value[b, h * groups // heads].double()
            for i in range(queries):
                last = size - queries + i
                seen = [j for j in range(last + 1) if valid is None or bool(valid[b, j])]
                if not seen:
                    continue
                scores = k[seen] @ query[b, r, i].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[b, i, h] = torch.softmax(scores, 0) @ v[seen]
    return out


def recent_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    representatives: Tensor,
    scale: float,
    recent: int,
    sinks: int,
    offsets: Tensor | None = None,
    valid: Tensor | None = None,
    softcap: float | None = None,
    streaming: tuple[int, ...] = (),
) -> Tensor:
    """Attention with an exact recent window, head by head in float64: ``[B, Q, H, Dv]``.

    The two partial attentions are computed by themselves and merged by their log-sum-exps.
    Streaming heads have the local one only.
    """
    batch, heads, queries, _ = query.shape
    groups, size = key.shape[1], key.shape[2]
    out = torch.zeros(batch, queries, heads, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        real = [j for j in range(size) if valid is None or bool(valid[b, j])]
        for h in range(heads):
            r = int(representatives[b, h])
            v = value[b, h * groups // heads].double()
            shift = 0.0 if offsets is None or r == h else float(offsets[h, r])

            def part(i, head, keys, b=b, v=v):
                k = key[b, head * groups // heads, keys].double()
                scores = k @ query[b, head, i].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                return torch.softmax(scores, 0) @ v[keys], torch.logsumexp(scores, 0)

            for i in range(queries):
                last = size - queries + i
                seen = [j for j in real if j <= last]
                local = [j for j in seen if j > last - recent or j in real[:sinks]]
                far = [j for j in seen if j not in local]
                parts = [part(i, h, local)] if local else []
                if far and h not in streaming:
                    result, lse = part(i, r, far)
                    parts.append((result, lse + shift))
                if parts:
                    weights = torch.softmax(torch.stack([lse for _, lse in parts]), 0)
                    out[b, i, h] = sum(w * x for w, (x, _) in zip(weights, parts, strict=True))
    return out


def clustered_inputs(
    member: Membership, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Full Q, K, V to what an op takes: representatives' Q and K, V in the cache's order."""

    def take(states: Tensor, heads: Tensor) -> Tensor:
        return torch.stack([row[index] for row, index in zip(states, heads, strict=True)])

    return (
        take(query, member.slot_heads),
        take(key, member.key_heads),
        take(value, member.value_heads),
    )
