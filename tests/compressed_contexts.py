"""Scoring over a compressed context by the definition: one forward, no cache."""

from __future__ import annotations

import torch

from chai_attention.integrations.transformers.intervene import replaced_attention
from chai_attention.profile import ClusterProfile

ANSWER = 4
STATIC = ClusterProfile(
    (3, 6, 2),
    membership="static",
    representatives=((0, 1, 0, 3, 1, 3), tuple(range(6)), (0, 5, 5, 0, 5, 5)),
)
RECENT = ClusterProfile((3, 6, 2), window=7, recent=5, sinks=2)


def sequence(length=41):
    draw = torch.Generator().manual_seed(8)
    return torch.randint(3, 97, (length,), generator=draw)


@torch.no_grad()
def by_definition(model, tokens, compress, answer=ANSWER, rep=None):
    """Logits ``[answer, vocabulary]``; tokens behind the context's last but one see it compressed.

    ``compress(layer, query, key, value)`` gets what attention gets of the compressed part,
    ``[1, ., S, D]``, and returns (key, value, seen): K and V as a cache would give them back, and
    ``[1, G, 1, S]`` bool, which of them are still there, or None. ``rep[layer]`` are
    representatives of clustered heads.
    """
    split = len(tokens) - answer

    def attend(call):
        heads = call.query.shape[1]
        group = heads // call.key.shape[1]
        causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        own = torch.arange(heads)
        head = own if rep is None else torch.tensor(rep[call.layer])

        def attention(key, value, mask):
            key, value, mask = (x.repeat_interleave(group, dim=1) for x in (key, value, mask))
            scores = (call.query @ key.mT * call.scale)[:, head]
            probs = scores.masked_fill(~mask[:, head], -torch.inf).softmax(-1)
            return (probs @ value).transpose(1, 2)  # [1, S, H, D]

        mask = causal.expand(1, call.key.shape[1], -1, -1)
        whole = attention(call.key, call.value, mask)
        before = slice(0, split)
        key, value, seen = compress(
            call.layer, *(x[:, :, before].clone() for x in (call.query, call.key, call.value))
        )
        if seen is not None:
            mask = mask.clone()
            mask[..., before] &= seen
        behind = attention(
            torch.cat([key, call.key[:, :, split:]], 2),
            torch.cat([value, call.value[:, :, split:]], 2),
            mask,
        )
        return torch.cat([whole[:, :split], behind[:, split:]], 1).contiguous()

    with replaced_attention(model, attend):
        return model(tokens[None]).logits[0, -answer:]
