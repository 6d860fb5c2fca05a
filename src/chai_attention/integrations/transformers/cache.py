"""`ClusteredCache`: a transformers cache that keeps K of representative heads only."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from chai_attention.errors import CacheError
from chai_attention.integrations.transformers.layer import ClusteredLayer
from chai_attention.integrations.transformers.memory import STOPPED, tokens_kept
from chai_attention.integrations.transformers.recent import LOCAL
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.plan import LayerPlan, layer_plans
from chai_attention.runtime.shape import decoder_config, describe


@dataclass(frozen=True)
class CacheMemory:
    """What a cache holds, in bytes of allocated memory.

    Attributes:
        key_bytes: K tensors, spare room for new tokens included.
        value_bytes: V tensors, spare room included.
        probe_bytes: queries remembered while a probe window fills up; of a static cache also K
            and V until then.
        recent_bytes: K and V of removed heads, last and first tokens (the exact recent window).
        full_key_bytes: what the K of all heads would take for the same room.
        full_value_bytes: what the V would take in a full cache, for the same room.
        tokens: tokens held per sequence, padding included.
        sequences: sequences held, or that there is room for in a static cache.
        table_bytes: lengths and padding of a static cache.
    """

    key_bytes: int
    value_bytes: int
    probe_bytes: int
    recent_bytes: int
    full_key_bytes: int
    full_value_bytes: int
    tokens: int
    sequences: int
    table_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All bytes held."""
        held = self.key_bytes + self.value_bytes + self.probe_bytes + self.recent_bytes
        return held + self.table_bytes

    @property
    def full_bytes(self) -> int:
        """What K and V of all heads would take."""
        return self.full_key_bytes + self.full_value_bytes

    @property
    def saved(self) -> float:
        """Share of the full cache's bytes that is not held, 0 to 1."""
        return 1 - self.total_bytes / self.full_bytes if self.full_bytes else 0.0


class ClusteredCache(DynamicCache):
    """K of representatives, V of heads that see far keys; used like transformers' `DynamicCache`.

    ``generate()`` and ``model(...)`` make one by themselves while clustered heads are enabled;
    make one yourself to keep it over several calls (a continued chat):

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from chai_attention import ClusteredCache, ClusterProfile, enabled
    >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, intermediate_size=64, **sizes)).eval()
    >>> members = ((0, 0, 0, 0), (0, 0, 2, 2))
    >>> profile = ClusterProfile((1, 2), membership="static", representatives=members)
    >>> prompt = torch.randint(3, 64, (2, 16))
    >>> with enabled(model, profile):
    ...     cache = ClusteredCache(model, profile)
    ...     ids = model.generate(
    ...         prompt, past_key_values=cache, max_new_tokens=4, min_new_tokens=4
    ...     )
    >>> ids.shape, cache.get_seq_length()
    (torch.Size([2, 20]), 19)
    >>> cache.layers[0].keys.shape, cache.layers[0].values.shape  # K of 1 head, V of 4
    (torch.Size([2, 1, 19, 8]), torch.Size([2, 4, 19, 8]))
    >>> cache.memory().saved > 0.25  # 1 + 2 of 8 K heads are held
    True

    A prompt shorter than the probe window keeps K of all heads until its window is full. Sliding
    window layers are held as `DynamicCache` holds them.

    To take tokens back, call `activate_past_recording` before the forward that brings them, as
    assisted decoding does and sliding windows need too; K that they need is kept until the `crop`.
    Without it, `crop` raises `CacheError` where it would go back into the probe window of a
    clustered layer, or further than an exact recent window remembers.

    Args:
        model: the model or its config.
        profile: the profile that the model is enabled with.

    Raises:
        ProfileError: the profile does not fit the model.
        UnsupportedModelError: the model cannot be clustered.
    """

    plans: tuple[LayerPlan, ...]
    layers: list[Any]

    def __init__(
        self, model: PreTrainedModel | PreTrainedConfig, profile: ClusterProfile | str | Path
    ) -> None:
        shape = describe(model)
        profile = ClusterProfile.resolve(profile)
        super().__init__(config=decoder_config(model))
        self.take_over(layer_plans(shape, profile))

    def take_over(self, plans: tuple[LayerPlan, ...]) -> None:
        """Put clustered layers in the place of full-attention layers, which are empty."""
        self.layers = [
            ClusteredLayer(plan) if plan.full_attention else self.layers[plan.layer]
            for plan in plans
        ]
        self.layer_class_to_replicate = None
        self.plans = plans

    def memory(self) -> CacheMemory:
        """Report the bytes held and what a full cache would hold."""
        return memory_of(self)

    def begin(self, mask: Any, layers: int) -> None:
        """Prepare for a forward through the first ``layers``; attention itself looks at its mask.

        Raises:
            CacheError: these layers hold different tokens. Later ones, which a draft that exits
                early leaves out, do not matter.
        """
        holding = [x for x in self.layers[:layers] if isinstance(x, CacheLayerMixin)]
        if len({layer.get_seq_length() for layer in holding}) > 1:
            raise CacheError(STOPPED)
        for layer in self._clustered():
            layer.expect()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-n`` tokens; a positive n keeps n.

        Raises:
            CacheError: K that is needed is gone; nothing has been removed then.
        """
        length = self.get_seq_length()
        keep = tokens_kept(tokens_to_remove, length)
        if not keep:
            self.reset()
            return
        clustered = self._clustered()
        for layer in clustered:
            layer.check_crop(keep)
        others = [layer for layer in self.layers if layer not in clustered]
        for layer in (*others, *clustered):  # sliding layers may refuse, before anything is done
            layer.crop(keep - length)

    def _clustered(self) -> list[ClusteredLayer]:
        return [layer for layer in self.layers if isinstance(layer, ClusteredLayer)]


def memory_of(cache: Cache) -> CacheMemory:
    """Report what any cache holds; one without clusters is a full cache itself."""
    total: Counter[str] = Counter()
    sequences = 0
    for layer in cache.layers:
        clustered = isinstance(layer, ClusteredLayer)
        pair = {"key": layer.keys, "value": layer.values}
        tensors = layer.tensors() if clustered else {k: x for k, x in pair.items() if x is not None}
        if not tensors:
            continue
        held = {name: tensor.untyped_storage().nbytes() for name, tensor in tensors.items()}
        key, value = held.pop("key", 0), held.pop("value", 0)
        full_key, full_value = layer.full_bytes() if clustered else (key, value)
        total.update(key=key, value=value, full_key=full_key, full_value=full_value)
        total.update(recent=sum(held.pop(name, 0) for name in LOCAL))
        total.update(probe=sum(held.values()))
        sequences = max(sequences, *(tensor.shape[0] for tensor in tensors.values()))
    kinds = ("key", "value", "probe", "recent", "full_key", "full_value")
    counted = {f"{kind}_bytes": total[kind] for kind in kinds}
    return CacheMemory(tokens=cache.get_seq_length(), sequences=sequences, **counted)
