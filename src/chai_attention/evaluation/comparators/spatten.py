"""SpAtten: tokens and heads with little attention are pruned from all deeper layers.

Importance, as published: of a token, the attention probabilities that it has received, summed over
heads, queries and layers so far; of a head, the absolute values of its outputs, summed over tokens
and layers so far. (The method takes head 3 of one layer and head 3 of the next for
related.) Before every layer the least important go, and what has gone does not come back in a
deeper layer. The first layers keep all, later ones less and less, linearly in depth.

How that acts in one forward over a whole item. A server would process the prompt, prune by what it
saw, and generate; an item's answer has to be scored at every one of its tokens. So every position t
prunes by itself, with what queries up to t have seen: its layer l keeps the top
``ceil(keep_l * (t + 1))`` of the tokens up to t that its layer l - 1 kept, t itself always, and the
top ``ceil(keep_l * G)`` of the heads. No position knows anything of later ones. What the last
token of a prompt keeps is what a server keeps there, by importances in which every earlier query
counts with what it saw itself. One thing is kinder than a server: a token that one position has
pruned may be seen again by a later one, where a server has freed it.

The sum over queries has a flaw in causal attention: few queries have seen a late token, so that the
sum drops the very last ones first. "spatten" does as published; "spatten-mean" divides a token's
sum by the number of queries that could see it, and is by far the stronger of the two where it was
tried. A table should not have the weaker alone.

A grouped-query model frees bytes only by whole K/V heads: there a head is a K/V head, with the
outputs of all query heads that read it. Not here: progressive quantisation, which is another
method's (see "quant8"), pruning of single V rows, which saves reads and no bytes, and fine-tuning,
after which the paper prunes more than the defaults here do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.errors import UnsupportedModelError
from chai_attention.evaluation.comparators.base import Comparator, shape_of
from chai_attention.evaluation.comparators.spatten_schedule import Schedule, schedule
from chai_attention.integrations.transformers.intervene import MaskedCall, replaced_attention
from chai_attention.runtime.shape import ModelShape

MAPS = 1 << 27  # probabilities that exist at a time
Tokens = Literal["sum", "mean"]
# name -> how tokens are pruned
VARIANTS: dict[str, Tokens | None] = {
    "spatten": "sum",
    "spatten-mean": "mean",
    "spatten-heads": None,
}


class SpAtten(Comparator):
    """Cascade pruning of heads, and of tokens unless that is switched off.

    Args:
        name: "spatten" prunes tokens by the sum of what they have received, "spatten-mean" by the
            mean over the queries that could see them; "spatten-heads" prunes no tokens.
        save: share of the K,V bytes to save in long sequences; None for the default schedule.

    Raises (from `attached` and `kv_share`):
        UnsupportedModelError: a model with sliding-window layers.
        EvaluationError: a saving that head pruning cannot reach.
    """

    source = "Wang et al., HPCA 2021 (SpAtten), cascade token pruning and cascade head pruning"

    def __init__(self, name: str = "spatten", save: float | None = None):
        self.name = name
        self._tokens, self._save = VARIANTS[name], save

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Prune until the context ends; whole sequences only, no cache of earlier tokens."""
        with replaced_attention(model, _Pruning(*self._plan(model), self._tokens == "mean")):
            yield

    def kv_share(self, model: PreTrainedModel, length: int) -> float:
        """Share that a server keeps after a prompt of ``length`` tokens."""
        plan, shape = self._plan(model)
        return plan.kv_share(length, shape.kv_heads)

    def _plan(self, model: PreTrainedModel) -> tuple[Schedule, ModelShape]:
        shape = shape_of(model, "SpAtten")
        return schedule(shape, self._tokens is not None, self._save), shape

    def settings(self) -> Mapping[str, Any]:
        """What decides who goes, and when."""
        return {"tokens": self._tokens, "save": self._save}


@dataclass
class _Left:
    """What is left of one batch, and what is known of it, by position.

    Attributes:
        context: ``[B, Q]`` int64, real tokens up to each position.
        seen: ``[B, Q, S]`` bool, tokens that are left.
        heads: ``[B, Q, G]`` bool, K/V heads that are left.
        received: ``[B, Q, S]`` float32, probabilities that a position's query has given so far.
        put_out: ``[B, Q, G]`` float32, absolute outputs of heads at a position so far.
    """

    context: Tensor
    seen: Tensor
    heads: Tensor
    received: Tensor
    put_out: Tensor

    def to(self, device: torch.device) -> _Left:
        """Follow a model that is spread over several devices."""
        return _Left(*(getattr(self, field.name).to(device) for field in fields(self)))


class _Pruning:
    """Attention of one layer after the other; the first layer of a forward starts anew."""

    def __init__(self, plan: Schedule, shape: ModelShape, mean: bool):
        self._plan = plan
        self._shape = shape
        self._mean = mean
        self._left: _Left | None = None

    def __call__(self, call: MaskedCall) -> Tensor:
        last = self._shape.layers - 1
        if call.layer == 0 or self._left is None:
            self._left = self._begin(call)
        left = self._left = self._left.to(call.query.device)
        self._prune(left, call.layer)
        out = None
        if call.layer < last or self._plan.prunes(last):
            out, received = _attend(call, left.seen, left.heads)
            left.received = left.received + received
            left.put_out = left.put_out + _sizes(out, left.heads)
        if call.layer == last:
            self._left = None
        # with all there, attention is the model's own to the last bit
        return out if out is not None and self._plan.prunes(call.layer) else call.plain()

    def _prune(self, left: _Left, layer: int) -> None:
        """Take out what is least important to each position, of queries and tokens up to it."""
        if self._plan.prunes_tokens(layer):
            count = keep_count(self._plan.tokens[layer], left.context)
            itself = torch.eye(left.seen.shape[1], dtype=torch.bool, device=left.seen.device)
            known = left.received.cumsum(1)
            if self._mean:
                # queries from a token's own up to each position: [B, Q, S]
                asked = left.context[:, :, None] - left.context[:, None] + 1
                known = known / asked.clamp_min(1)
            left.seen = most_important(known.masked_fill(itself, torch.inf), left.seen, count)
        if self._plan.prunes_heads(layer):
            kept = self._plan.heads_kept(layer, self._shape.kv_heads)
            count = torch.full_like(left.context, kept)
            left.heads = most_important(left.put_out.cumsum(1), left.heads, count)

    def _begin(self, call: MaskedCall) -> _Left:
        batch, _, queries, _ = call.query.shape
        device = call.query.device
        if call.key.shape[2] != queries:
            raise UnsupportedModelError(
                "SpAtten is scored over whole sequences here: run the model without a cache of "
                "earlier tokens"
            )
        if call.mask is None:
            seen = torch.ones(queries, queries, dtype=torch.bool, device=device).tril()
            seen = seen.expand(batch, queries, queries)
        else:
            seen = call.mask[:, 0].expand(batch, queries, queries)
        heads = seen.new_ones(batch, queries, self._shape.kv_heads)
        return _Left(
            context=seen.sum(-1),
            seen=seen,
            heads=heads,
            received=torch.zeros(seen.shape, device=device),
            put_out=torch.zeros(heads.shape, device=device),
        )


def keep_count(share: float, context: Tensor) -> Tensor:
    """``ceil(share * context)``, at least 1; the share's rounding error adds no token."""
    return (share * context.double() - 1e-9).ceil().long().clamp_min(1)


def most_important(importance: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """Keep the most important of those that are left; of equal ones, the first.

    Args:
        importance: ``[B, Q, N]``.
        among: ``[B, Q, N]`` bool, those left.
        count: ``[B, Q]``, how many to keep.

    Returns:
        ``[B, Q, N]`` bool.
    """
    order = importance.masked_fill(~among, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(order.shape[-1], device=order.device)
    taken = (place < count[..., None]).expand_as(among)
    return torch.zeros_like(among).scatter(-1, order, taken) & among


def _attend(call: MaskedCall, seen: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
    """Heads' outputs ``[B, Q, H, Dv]`` and, by query, what tokens receive ``[B, Q, S]``.

    Args:
        call: queries, keys and values.
        seen: ``[B, Q, S]`` bool, tokens that are left.
        heads: ``[B, Q, G]`` bool, K/V heads that are left; the others put out zeros.
    """
    batch, count, queries, _ = call.query.shape
    group = count // call.key.shape[1]
    rows = max(1, MAPS // (count * queries * queries))
    outs, received = [], []
    for start in range(0, batch, rows):
        part = slice(start, start + rows)
        query = call.query[part].float()
        key, value = (
            x[part].float().repeat_interleave(group, dim=1) for x in (call.key, call.value)
        )
        scores = query @ key.mT * call.scale  # [B, H, Q, S]
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        scores = scores.masked_fill(~seen[part, None], -torch.inf)
        # a query of padding sees nothing
        probs = torch.softmax(scores, -1).nan_to_num(0.0)
        left = (
            heads[part].repeat_interleave(group, dim=2).transpose(1, 2)[..., None]
        )  # [B, H, Q, 1]
        probs = probs * left
        received.append(probs.sum(1))
        outs.append((probs @ value).transpose(1, 2))
    return torch.cat(outs).to(call.value.dtype).contiguous(), torch.cat(received)


def _sizes(out: Tensor, heads: Tensor) -> Tensor:
    """Sum of absolute outputs of each K/V head's query heads, ``[B, Q, G]``."""
    return out.float().abs().sum(-1).unflatten(-1, (heads.shape[-1], -1)).sum(-1)
