"""Memberships that the attention benchmarks measure with."""

from __future__ import annotations

import torch

from chai_attention.membership import Membership


def even_membership(heads: int, clusters: int, batch: int) -> Membership:
    """Clusters of equal size over shuffled heads, different for every sequence."""
    rows = []
    for _ in range(batch):
        row = torch.empty(heads, dtype=torch.long)
        for members in torch.randperm(heads).view(clusters, -1):
            row[members] = members.min()
        rows.append(row)
    return Membership.from_representatives(torch.stack(rows))
