"""What a clustered layer's cache holds, and how transformers treats a layer of a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from chai_attention.errors import CacheError
from chai_attention.integrations.transformers.buffers import TokenBuffer, pick_heads
from chai_attention.integrations.transformers.modes import as_attended, eager
from chai_attention.integrations.transformers.padding import Padding
from chai_attention.integrations.transformers.recent import RecentWindow
from chai_attention.membership import Membership
from chai_attention.ops import windowed
from chai_attention.runtime.plan import LayerPlan

LAYER_TAG = "_chai_layer"
STOPPED = (
    "an earlier forward with this cache stopped midway, so its layers hold different tokens: call "
    "cache.reset() and run the prompt again"
)


class Probe(NamedTuple):
    """What a clustered layer needs to wait for its probe window again.

    Attributes:
        query: ``[B, H, W, D]`` of the window.
        key: ``[B, G, E, D]`` of all heads, up to the window's end.
        value: ``[B, G - kept_values, E, Dv]`` of the V heads that the cache does not hold.
    """

    query: Tensor
    key: Tensor
    value: Tensor


class LayerMemory(CacheLayerMixin):
    """Cache layer of a full-attention layer, without its attention: see `layer` for its states."""

    is_sliding = False
    is_croppable = True
    is_compileable = False
    value_axis = 2  # of the heads of "value" in `tensors`

    def __init__(self, plan: LayerPlan):
        self.plan = plan
        self.is_initialized = False
        self.record_past = False  # transformers itself writes it, too
        self.keeps_past = False  # while it records: whether a crop leaves K of earlier tokens
        self._is_expected = False
        self._incoming: tuple[Tensor, Tensor] | None = None
        self.reset()

    def expect(self) -> None:
        """Allow one `update`: a forward of an enabled model begins, whose attention calls `attend`.

        An earlier forward that stopped midway leaves nothing behind but what it stored.
        """
        self._is_expected = True
        self._incoming = None
        self._repair()

    def _repair(self) -> None:
        """Forget what a forward left that stopped before it had stored K and V."""
        held = self._values.length
        if held:
            self._keys.length = min(self._keys.length, held)
        else:  # a membership may be there, of other sequences than the next
            self._reset_tokens()

    def activate_past_recording(self) -> None:
        """Keep what a `crop` needs that takes back tokens of the next forwards."""
        self.record_past = True

    # ---- what transformers asks of a cache layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and device; memory is allocated with the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @eager
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new K and V, ``[B, G, Q, D]``; `attend`, which sees the queries, stores them.

        Returns them, K marked so that the attention function finds this layer.

        Raises:
            CacheError: no forward of an enabled model is running, so that the caller would take the
                new tokens for all there are.
        """
        if not self._is_expected:
            raise CacheError(
                "this cache holds K of representatives only: use it with the model it was made "
                "for, while chai_attention.enable(model, profile) is in force"
            )
        self._is_expected = False
        key_states, value_states = as_attended(key_states), as_attended(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._incoming = (key_states, value_states)
        tagged = key_states.view(key_states.shape)
        setattr(tagged, LAYER_TAG, self)
        return tagged, value_states

    def get_seq_length(self) -> int:
        """Tokens held, padding included."""
        return self._values.length

    def get_max_length(self) -> int:
        """-1: the cache grows without bound."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask of the next forward."""
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Forget all tokens, memberships included."""
        self._reset_tokens()
        self._incoming = None

    def _reset_tokens(self) -> None:
        self.membership: Membership | None = None
        self._offset: Tensor | None = None  # [B, H], of the membership
        self._recent = RecentWindow(self.plan.recent, self.plan.sinks)
        self._keys = TokenBuffer(token_axis=2)  # [B, kept or G, S, D]
        self._values = TokenBuffer(token_axis=1)  # [B, S, kept or G, Dv]
        self._window_query: Tensor | None = None  # [B, H, W, D], while waiting
        self._window_end = 0  # tokens up to the end of the last window, once clustered
        self._probe: Probe | None = None  # of a clustered layer that records its past
        self._beginning: Tensor | None = None  # padding up to the first tokens that matter
        self._whole_beginning = 0  # how many of those are there, in every sequence

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-n`` tokens; a positive n keeps n, as older transformers meant it.

        Raises:
            CacheError: K that is needed is gone, see `check_crop`.
        """
        length = self.get_seq_length()
        keep = tokens_kept(tokens_to_remove, length)
        if not length:
            return
        if not keep:
            self.reset()
            return
        self.check_crop(keep)
        if self.membership is not None and keep < self._window_end:
            self._wait_again(keep)
            return
        self._recent.crop(length, keep, trim=not (self.record_past and self.keeps_past))
        self._keys.length = self._values.length = keep
        self._crop_padding(keep)

    def check_crop(self, keep: int) -> None:
        """Refuse to go back to ``keep`` tokens, more than none, if K that is needed is gone.

        Raises:
            CacheError: they end in the probe window of a clustered layer, or before what an exact
                recent window remembers.
        """
        length = self.get_seq_length()
        if self.membership is None or keep >= length:
            return
        if keep >= self._window_end:
            self._recent.check_crop(length, keep)
        elif self._probe is None:
            raise CacheError(
                f"cannot crop to {keep} tokens: the heads were clustered on the first "
                f"{self._window_end}, and K of the other heads has been freed. Call "
                "cache.activate_past_recording() before the forward, reset the cache and run the "
                "prompt again, or use a static membership"
            )

    def _wait_again(self, keep: int) -> None:
        """Go back into the probe window: K of all heads up to ``keep``, no membership."""
        assert self.membership is not None
        assert self._probe is not None
        values, probe, beginning = self.values, self._probe, self._beginning
        assert values is not None
        values = torch.cat([values[:, :, :keep], probe.value[:, :, :keep]], 1)
        values = pick_heads(values, self.membership.value_place)
        self._reset_tokens()
        self._beginning = beginning
        self._crop_padding(keep)
        self._window_query = probe.query
        self._keys.append(probe.key[:, :, :keep])
        self._values.append(values.transpose(1, 2))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rearrange the sequences of the batch (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        if self.get_seq_length():
            rows = torch.arange(self.batch_size, device=self.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` (integers or a mask)."""
        if not self.get_seq_length():
            return
        rows = indices.to(self.device)
        self._change(lambda states: states[rows])
        self._select_padding(rows)
        if self.membership is not None:
            self._use(self.membership.select(rows))

    # ---- which of the first tokens are padding, which must not change

    def _first_tokens(self) -> int:
        """Real tokens whose places must stay: K, or queries, are kept for these places."""
        kept = self.plan.sinks if self._keeps_sinks else 0
        waits = self.plan.needs_probe and self.membership is None
        return max(kept, self.plan.probe_end) if waits else kept

    @property
    def _keeps_sinks(self) -> bool:
        """Whether the first tokens of removed heads are held."""
        return any(recent.first is not None for recent in self._recent.kinds)

    def _reads_mask(self, queries: int) -> bool:
        """Whether a forward of so many tokens may read its mask on the host."""
        return True

    def _check_padding(self, padding: Padding, queries: int) -> None:
        """Refuse a forward that says otherwise what is padding.

        Raises:
            CacheError: see `Padding.require_same`.
        """
        count = self._first_tokens() if self._reads_mask(queries) else 0
        if count and padding.length > queries:
            padding.require_same(self._beginning, min(count, padding.length - queries))

    def _remember_padding(self, padding: Padding, queries: int) -> None:
        """Remember it for later forwards."""
        count = self._first_tokens()
        if count == self._whole_beginning or not self._reads_mask(queries):
            return
        self._beginning = padding.beginning(count) if count else None
        self._whole_beginning = count if min(padding.counts) >= count else 0

    def _crop_padding(self, keep: int) -> None:
        if self._beginning is not None and keep < self._beginning.shape[1]:
            self._beginning = self._beginning[:, :keep]
        self._whole_beginning = 0

    def _select_padding(self, rows: Tensor) -> None:
        if self._beginning is not None:
            self._beginning = self._beginning[rows]

    @property
    def batch_size(self) -> int:
        """Sequences held."""
        return 0 if self._keys.data is None else self._keys.data.shape[0]

    @property
    def keys(self) -> Tensor | None:
        """``[B, kept, S, D]``: K in the order of ``membership.key_heads``."""
        return self._keys.view

    @property
    def values(self) -> Tensor | None:
        """``[B, kept_values, S, Dv]``: V in the order of ``membership.value_heads``."""
        view = self._values.view
        return None if view is None else view.transpose(1, 2)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor this layer holds, by what it is: its whole memory."""
        held = {
            "key": self._keys.data,
            "value": self._values.data,
            "probe": self._window_query,
            **self._recent.tensors(),
        }
        if self._probe is not None:
            held |= {"past probe": self._probe.query, "past key": self._probe.key}
            held |= {"past value": self._probe.value} if self._probe.value.shape[1] else {}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def full_bytes(self) -> tuple[int, int]:
        """Bytes of the K, and of the V, that a cache of all heads would hold in their place.

        Spare room is counted as the layer has it.
        """
        held, groups = self.tensors(), self.plan.kv_heads
        counted = []
        for name, axis in (("key", 1), ("value", self.value_axis)):
            cache, local = held.get(name), held.get("recent" if name == "key" else "recent value")
            if cache is not None and cache.shape[axis]:
                counted.append(cache.untyped_storage().nbytes() // cache.shape[axis] * groups)
            elif local is not None:  # all heads stream
                head = local.shape[0] * local.shape[3] * local.element_size()
                counted.append(groups * head * self.get_seq_length())
            else:
                counted.append(0)
        return counted[0], counted[1]

    @property
    def _memory(self) -> Tensor | None:
        """What K and V are held in."""
        return self._values.data

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Hold ``change(states)`` of everything: some sequences of the batch, or another dtype."""
        for held in (self._keys, self._values, self._recent):
            held.change(change)
        if self._window_query is not None:
            self._window_query = change(self._window_query)
        if self._probe is not None:
            self._probe = Probe(*map(change, self._probe))

    def _use(self, membership: Membership) -> None:
        """Set the membership and what follows from it."""
        self.membership = membership
        self._offset = self._offset_of(membership)

    def _offset_of(self, membership: Membership) -> Tensor | None:
        """``[B, H]`` offsets of the far keys' log-sum-exp, None for zeros."""
        if not self.plan.has_recent_window:
            return None
        table = self.plan.offset_table(membership.representatives.device)
        return windowed.head_offsets(table, membership)


def tokens_kept(tokens_to_remove: int, length: int) -> int:
    """How many of ``length`` tokens a `crop` leaves: all but the last -n, or the first n."""
    count = int(tokens_to_remove)  # a tensor, in older transformers
    return min(count, length) if count > 0 else max(0, length + count)
