"""`StaticClusteredCache`: the clustered cache in memory of fixed size, for CUDA graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel, StaticCache

from chai_attention.errors import CacheError
from chai_attention.integrations.transformers.cache import CacheMemory, memory_of
from chai_attention.integrations.transformers.devices import input_device
from chai_attention.integrations.transformers.memory import tokens_kept
from chai_attention.integrations.transformers.modules import decoder_layers
from chai_attention.integrations.transformers.static_layer import StaticClusteredLayer
from chai_attention.integrations.transformers.static_tokens import StaticTokens
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.plan import LayerPlan, layer_plans
from chai_attention.runtime.shape import ModelShape, decoder_config, describe, unwrapped

if TYPE_CHECKING:
    from chai_attention.integrations.transformers.graphs import DecodeGraph


class StaticClusteredCache(Cache):
    """K of representatives, V of all heads, in memory that is allocated once.

    Used like `ClusteredCache`; ``generate(cache_implementation="static")`` makes one by itself
    while clustered heads are enabled. On CUDA, ``generate()`` then replays each decode step as a
    CUDA graph (`graphs`)::

        cache = StaticClusteredCache(model, profile, max_tokens=4096, batch_size=16)
        model.generate(**inputs, past_key_values=cache)

    A layer's K and V take ``B * max_tokens * (kept * D + G * Dv)`` numbers; an exact recent window
    of w tokens and s sinks takes ``B * (G - kept) * (w + s) * D`` more. Padding that an
    ``attention_mask`` told is remembered until `reset`; later tokens without a mask are real.

    Sequences cannot be added or dropped, and with an exact recent window only the last token can
    be cropped once the ring is full: `CacheError`. While an online membership waits for its probe
    window, K of all heads is kept in memory that grows, besides the static one.

    Args:
        model: the model or its config.
        profile: the profile that the model is enabled with.
        max_tokens: tokens a sequence can hold, padding included.
        batch_size: B, to allocate the memory now, where each layer is and in the model's dtype.
            None leaves that to the first forward.

    Raises:
        CacheError: ``batch_size`` for a config alone, or no room for a token.
        ProfileError: the profile does not fit the model.
        UnsupportedModelError: the model cannot be clustered.
    """

    plans: tuple[LayerPlan, ...]
    layers: list[Any]
    tokens: StaticTokens
    graph: DecodeGraph | None  # of generate()
    keeps_padding: bool  # whatever mask a forward brings, while a step is captured

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        profile: ClusterProfile | str | Path,
        max_tokens: int,
        batch_size: int | None = None,
    ) -> None:
        if max_tokens < 1:
            raise CacheError(f"a static cache needs room for a token, not max_tokens={max_tokens}")
        profile = ClusterProfile.resolve(profile)
        if not isinstance(model, PreTrainedConfig):
            model = unwrapped(model)
        shape = describe(model)
        plain = StaticCache(decoder_config(model), max_tokens)
        super().__init__(layers=plain.layers)
        self.take_over(layer_plans(shape, profile), max_tokens)
        if batch_size is None:
            return
        if not isinstance(model, PreTrainedModel):
            raise CacheError("batch_size allocates memory for a model, so a config is not enough")
        self._allocate(model, batch_size, shape)

    def take_over(self, plans: tuple[LayerPlan, ...], max_tokens: int) -> None:
        """Make the full-attention layers of an empty cache clustered ones."""
        window = any(plan.has_recent_window for plan in plans)
        self.plans = plans
        self.tokens = StaticTokens(max_tokens, plans[0].sinks if window else 0)
        self.graph = None
        self.keeps_padding = False
        self.layers = [
            StaticClusteredLayer(plan, self.tokens) if plan.full_attention else sliding
            for plan, sliding in zip(plans, self.layers, strict=True)
        ]

    def _allocate(self, model: PreTrainedModel, batch_size: int, shape: ModelShape) -> None:
        """Make every layer's memory where the layer is."""
        sizes = (batch_size, shape.kv_heads, 0, shape.head_dim)
        for layer, block in zip(self.layers, decoder_layers(model), strict=True):
            weight = next(block.parameters())
            device = input_device(model) if weight.is_meta else weight.device
            states = torch.zeros(sizes, dtype=model.dtype, device=device)
            layer.lazy_initialization(states, states)

    @property
    def is_compileable(self) -> bool:
        """Whether decode steps can be captured in a CUDA graph."""
        return all(isinstance(layer, StaticClusteredLayer) for layer in self.layers)

    @property
    def is_ready(self) -> bool:
        """Whether there are tokens, and every layer has its membership."""
        return self.tokens.count > 0 and not any(layer.is_waiting for layer in self._clustered())

    def whole_mask(self, input_ids: Tensor) -> Tensor:
        """Return a mask ``[B, capacity]`` of a step ``[B, 1]``, the same one for every step.

        The cache knows what is padding. Without any mask some models look for padding on the host,
        or make a mask that grows with every step.
        """
        ones = torch.ones_like(input_ids, dtype=torch.bool)
        return ones.expand(-1, self.tokens.capacity)

    def memory(self) -> CacheMemory:
        """Report the bytes held and what a full cache would hold."""
        tables = sum(tensor.untyped_storage().nbytes() for tensor in self.tokens.tensors())
        return replace(memory_of(self), table_bytes=tables)

    def begin(self, mask: Any, layers: int) -> None:
        """Prepare for a forward through the first ``layers`` with this attention mask."""
        self.tokens.offer(None if self.keeps_padding else self.padding_of(mask))
        for layer in self._clustered():
            layer.expect()

    @staticmethod
    def padding_of(mask: Any) -> Tensor | None:
        """The 2D mask in what ``generate()`` passes, None if there is none."""
        if isinstance(mask, dict):  # of models that could have several kinds of layers
            mask = mask.get("full_attention")
        return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-n`` tokens; a positive n keeps n.

        Raises:
            CacheError: K that is needed is gone, or the model has sliding-window layers.
        """
        length = self.tokens.count
        keep = tokens_kept(tokens_to_remove, length)
        if keep == length:
            return
        if not keep:
            self.reset()
            return
        for layer in self._clustered():
            layer.check_crop(keep)
        self.rewind(keep)

    def rewind(self, keep: int) -> None:
        """Hold the first ``keep`` tokens only, nothing checked but the kinds of layers."""
        if not self.is_compileable:
            raise CacheError(
                "sliding-window layers in a static cache cannot go back: reset the cache and run "
                "the prompt again"
            )
        for layer in self._clustered():
            layer.rewind(keep)
        self.tokens.crop(keep)

    def replayed(self) -> None:
        """Count a token per sequence that a replayed graph has written."""
        self.tokens.replayed()
        for layer in self._clustered():
            layer.rewind(self.tokens.count)

    def reset(self) -> None:
        """Forget all tokens; the memory stays, and so do memberships that are static."""
        super().reset()
        self.tokens.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rearrange the sequences of the batch (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Only once: the room is for a fixed number of sequences.

        Raises:
            CacheError: more often, while there are tokens.
        """
        if self.tokens.count and repeats != 1:
            raise CacheError(
                f"a static cache cannot repeat its {self.tokens.batch} sequences: repeat the "
                "prompts, or use ClusteredCache"
            )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Put the sequences ``indices`` in the place of all; see the class's text."""
        if not self.is_compileable:
            raise CacheError(
                "sliding-window layers in a static cache cannot be rearranged: use ClusteredCache"
            )
        super().batch_select_indices(indices)
        if self.tokens.count:
            self.tokens.select(indices)

    def _clustered(self) -> list[StaticClusteredLayer]:
        return [layer for layer in self.layers if isinstance(layer, StaticClusteredLayer)]
