"""Builders used by several tests."""

import torch
from torch import Tensor

from chai_attention.membership import Membership


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
    heads: int, clusters: int, batch: int = 1, kv_heads: int | None = None
) -> Membership:
    return Membership.from_representatives(
        random_representatives(heads, clusters, batch), kv_heads=kv_heads
    )


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
