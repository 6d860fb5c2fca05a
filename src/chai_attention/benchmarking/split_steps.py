"""Decode steps of a model on several devices: a CUDA graph for each device's run of layers.

One graph cannot hold a step that goes from device to device. What is outside of the layers (the
embedding, the last norm, the vocabulary) and the copies between devices run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from chai_attention.benchmarking.plain_steps import moved, rewind, step_mask
from chai_attention.benchmarking.static_runner import StaticRunner
from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers import StaticClusteredCache
from chai_attention.integrations.transformers.graphs import capturing
from chai_attention.integrations.transformers.modules import decoder_layers, replaced_forwards

Forward = Callable[..., Any]


class SplitRunner(StaticRunner):
    """`StaticRunner` for a model on several devices."""

    steps = (
        "mean of further tokens, each a replay of a CUDA graph per device over a cache of fixed "
        "size; what is outside of the layers is launched by Python"
    )

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """Read ``token [B, 1]``; logits ``[B, V]``."""
        if self._step is None:
            if self._profile is None:
                count = self._cache.get_seq_length()
                self._cache = moved(self._model, self._cache, self._most)
            else:
                count = self._cache.tokens.count
            runs = runs_of(self._model)
            self._step = SplitStep(self._model, self._cache, count, runs)
        return self._step.step(token)[:, -1]

    def _renew(self) -> None:
        """The graphs of a prompt before are of other memory, or of another length."""
        self._step = None


def runs_of(model: PreTrainedModel) -> list[list[nn.Module]]:
    """The decoder's layers, cut where the next one is on another device."""
    layers = decoder_layers(model)
    return [list(run) for _, run in groupby(layers, lambda layer: next(layer.parameters()).device)]


class SplitStep:
    """A step of a model over a static cache that holds a prompt without padding.

    Args:
        model: with ``profile`` enabled, if the cache is a clustered one.
        cache: a static cache.
        count: tokens that it holds.
        runs: layers that are captured together, each run on one device.
    """

    def __init__(
        self, model: PreTrainedModel, cache: Any, count: int, runs: Sequence[Sequence[nn.Module]]
    ):
        self._model = model
        self._cache = cache
        self._count = count
        self._runs = [_Run(layers) for layers in runs]
        self._captured = False

    def step(self, token: Tensor) -> Tensor:
        """Read ``token [B, 1]``; logits ``[B, 1, V]``."""
        if not self._captured:
            self._capture(token)
        logits = self._with_layers(token, [run.replay for run in self._runs])
        self._count += 1
        if self._is_clustered:
            self._cache.replayed()
        return logits

    @property
    def _is_clustered(self) -> bool:
        return isinstance(self._cache, StaticClusteredCache)

    def _capture(self, token: Tensor) -> None:
        """Record every run; what is written on the way is overwritten by the real step."""
        self._with_layers(token, [run.observe for run in self._runs])  # compiles kernels, too
        self._rewind()
        if self._is_clustered:
            self._cache.begin(None, len(self._cache.layers))
        with capturing(f"layers of {type(self._model).__name__}"):
            for run in self._runs:
                run.capture()
        self._rewind()
        self._captured = True

    def _rewind(self) -> None:
        """Stand behind the tokens that count."""
        if self._is_clustered:
            self._cache.rewind(self._count)
        else:
            rewind(self._cache, self._count)

    def _with_layers(self, token: Tensor, forwards: Sequence[Callable[..., Any]]) -> Tensor:
        """A step in which ``forwards[r](place, *args)`` stand for the layers of run r."""
        replaced = {
            layer: partial(forward, place)
            for run, forward in zip(self._runs, forwards, strict=True)
            for place, layer in enumerate(run.layers)
        }
        positions = torch.full_like(token, self._count)
        if self._is_clustered:
            mask = self._cache.whole_mask(token)  # there is no padding
            self._cache.keeps_padding = True
        else:
            mask = step_mask(self._model, positions, self._cache.layers[0].keys.shape[2])
        try:
            with replaced_forwards(replaced):
                out: Any = self._model(
                    token, attention_mask=mask, position_ids=positions,
                    past_key_values=self._cache, use_cache=True,
                )  # fmt: skip
        finally:
            if self._is_clustered:
                self._cache.keeps_padding = False
        logits: Tensor = out.logits
        return logits


class _Run:
    """Layers on one device that follow each other, and the graph of a step through them."""

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers = layers
        self._forwards: list[Forward] = [layer.forward for layer in layers]
        self._device = next(layers[0].parameters()).device
        self._inputs: Any = None  # args and keywords of the first layer, in memory that stays
        self._given: list[Any] = []  # those of all layers but the hidden states
        self._out: Any = None

    def observe(self, place: int, *args: Any, **options: Any) -> Any:
        """Run a layer as it is, and keep what the first one is called with.

        Raises:
            UnsupportedModelError: a later layer is called with something else.
        """
        given = tree_leaves((args[1:], options))
        if not place:
            self._inputs, self._given = tree_map(self._held, (args, options)), given
        same = len(given) == len(self._given)
        if not (same and all(_same(x, y) for x, y in zip(given, self._given, strict=True))):
            raise UnsupportedModelError(
                "the layers of this model are called with different masks or positions, so that "
                "they cannot be captured together"
            )
        return self._forwards[place](*args, **options)

    def capture(self) -> None:
        """Record the graph."""
        self._graph = torch.cuda.CUDAGraph()
        with self._on_device(), torch.cuda.graph(self._graph, stream=torch.cuda.Stream()):
            (hidden, *rest), options = self._inputs
            for forward in self._forwards:
                out = forward(hidden, *rest, **options)
                hidden = out[0] if isinstance(out, tuple) else out
        self._out = out

    def replay(self, place: int, hidden: Tensor, *rest: Any, **options: Any) -> Any:
        """The whole run in the place of its first layer, nothing in that of the others."""
        if place:
            return (hidden, *self._out[1:]) if isinstance(self._out, tuple) else hidden
        given = tree_leaves(((hidden, *rest), options))
        for held, new in zip(tree_leaves(self._inputs), given, strict=True):
            if isinstance(held, Tensor):
                held.copy_(new)
        with self._on_device():
            self._graph.replay()
        return self._out

    def _held(self, value: Any) -> Any:
        """A copy of a tensor on the run's device; others as they are."""
        return value.to(self._device, copy=True) if isinstance(value, Tensor) else value

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()


def _same(one: Any, other: Any) -> bool:
    return one is other or (not isinstance(one, Tensor) and one == other)
