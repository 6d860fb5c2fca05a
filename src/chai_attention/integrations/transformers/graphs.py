"""Decode steps of a whole model as CUDA graphs, over a `StaticClusteredCache`.

``generate()`` asks a model for a compiled call when its cache is static and its device can do it.
An enabled model answers with a `GraphedCall`, so ``generate(cache_implementation="static")`` or a
`StaticClusteredCache` in ``past_key_values`` are all it takes; ``disable_compile=True`` turns it
off. ``torch.compile`` itself is not used: it would have to look into attention, whose kernels are
launched by Python, and takes minutes where a capture takes two decode steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from chai_attention.errors import CacheError, UnsupportedModelError
from chai_attention.integrations.transformers.devices import devices_of, on_several_devices
from chai_attention.integrations.transformers.forwards import ModelAttribute
from chai_attention.integrations.transformers.modes import autocast_state, lasting
from chai_attention.integrations.transformers.static_cache import StaticClusteredCache

DEVICE = "cuda"
# what a decode step may be called with, besides options that are off
_KNOWN = frozenset((
    "input_ids", "position_ids", "attention_mask", "past_key_values", "use_cache", "return_dict",
    "logits_to_keep", "cache_position",
))  # fmt: skip


@contextmanager
def capturing(what: str, advice: str = "") -> Iterator[None]:
    """Capture something inside the block.

    Raises:
        UnsupportedModelError: it cannot be captured in a CUDA graph.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"{what} cannot be captured in a CUDA graph ({error}){advice}"
        ) from error


def captured(
    step: Callable[[], Tensor], rewind: Callable[[], None]
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Run ``step`` once, which compiles kernels and makes tables, ``rewind`` and capture it."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        rewind()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        made = step()
    return graph, made


class DecodeGraph:
    """One decode step of an enabled model, captured once and replayed for every token.

    ::

        cache = StaticClusteredCache(model, profile, max_tokens=4096)
        logits = model(prompt, past_key_values=cache).logits
        graph = DecodeGraph(model, cache)
        for _ in range(100):
            logits = graph.step(logits[:, -1:].argmax(-1))

    It is captured again when what it has recorded is no longer what holds: another membership,
    padding for the first time, weights that were moved or replaced, a profile enabled anew,
    another autocast.

    Args:
        model: the model, on a CUDA device, with clustered heads enabled.
        cache: its cache.

    Raises:
        UnsupportedModelError: no CUDA device, or a model whose steps cannot be captured.
    """

    def __init__(self, model: PreTrainedModel, cache: StaticClusteredCache):
        reason = None
        if model.device.type != DEVICE:
            reason = f"decode steps are captured in CUDA graphs, which {model.device} does not have"
        elif on_several_devices(model):
            reason = (
                f"this model is on {len(devices_of(model))} devices, and a decode step across "
                "them cannot be captured in a CUDA graph"
            )
        elif not cache.is_compileable:
            reason = (
                "sliding-window layers decide on the host what a step does, so that it cannot be "
                "captured"
            )
        elif "position_ids" not in inspect.signature(model.forward).parameters:
            reason = (
                f"{type(model).__name__} takes no position_ids, so a captured step would stand at "
                "one position for ever"
            )
        if reason is not None:
            raise UnsupportedModelError(f"{reason}: call the model itself")
        self.model = model
        self.cache = cache
        self._graph: torch.cuda.CUDAGraph | None = None
        self._state: tuple[Any, ...] = ()
        self._parameters: list[nn.Parameter] = []

    @torch.no_grad()
    def step(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Decode one token of every sequence.

        Args:
            input_ids: ``[B, 1]``.
            position_ids: ``[B, 1]`` or ``[1, 1]``; None for the position in the cache, which is
                not the right one behind padding.
            attention_mask: ``[B, S]`` over all tokens, the new one included; None keeps the
                padding that the cache knows.

        Returns:
            ``[B, 1, vocabulary]`` logits, in memory that the next step overwrites.

        Raises:
            CacheError: the cache has no token or no room, waits for its probe window, or has
                padding but no ``position_ids``.
            UnsupportedModelError: the model's step cannot be captured.
        """
        tokens = self.cache.tokens
        if not self.cache.is_ready:
            raise CacheError(
                "a graph needs a cache with a prompt that fills the probe window: call the model "
                "itself until then"
            )
        if input_ids.shape != (tokens.batch, 1):
            raise CacheError(
                f"a graph decodes one token of each of {tokens.batch} sequences, not input_ids of "
                f"shape {list(input_ids.shape)}"
            )
        if self._enabled() is None:
            raise CacheError(
                "the model's clustered heads are off: call chai_attention.enable(model, profile)"
            )
        tokens.require(1)
        if attention_mask is not None:
            tokens.take(attention_mask, 1)
        if position_ids is None and tokens.valid is not None:
            raise CacheError("behind padding a step needs position_ids")
        if self._graph is None or not self._holds():
            self._capture(input_ids)
            if attention_mask is not None:  # a capture forgets what the new token is
                tokens.take(attention_mask, 1)
        assert self._graph is not None
        self._ids.copy_(input_ids)
        if position_ids is None:
            self._positions.fill_(tokens.count)
        else:
            self._positions.copy_(position_ids)
        self._graph.replay()
        self.cache.replayed()
        return self._logits

    def _capture(self, input_ids: Tensor) -> None:
        """Record a step. What it writes on the way is overwritten by the real one."""
        self._graph = None
        count = self.cache.tokens.count
        with lasting():
            self._ids = input_ids.clone()
            self._positions = torch.full_like(self._ids, count)
        self._mask = self.cache.whole_mask(self._ids)
        self.cache.keeps_padding = True
        advice = ": pass disable_compile=True to generate(), or call the model itself"
        try:
            with capturing(f"a decode step of {type(self.model).__name__}", advice):
                graph, self._logits = captured(self._forward, lambda: self.cache.rewind(count))
        finally:
            self.cache.keeps_padding = False
            self.cache.rewind(count)
        self._parameters = list(self.model.parameters())
        self._state = self._now()
        self._graph = graph

    def _forward(self) -> Tensor:
        kind, low = self.model.device.type, autocast_state(self.model.device.type)
        # weights that autocast remembers are gone when its region ends, the graph is not
        region = torch.autocast(kind, low, cache_enabled=False) if low else nullcontext()
        with region:
            out = self.model(
                input_ids=self._ids,
                attention_mask=self._mask,
                position_ids=self._positions,
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
            )
        logits: Tensor = out.logits
        return logits

    def _now(self) -> tuple[Any, ...]:
        """What a captured step depends on, besides the memory of the cache."""
        valid = self.cache.tokens.valid
        return (
            *(layer.membership for layer in self.cache.layers),
            self._enabled(),
            autocast_state(self.model.device.type),
            None if valid is None else valid.data_ptr(),
            [parameter.data_ptr() for parameter in self._parameters],
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Not copied with a cache, whose copy captures steps of its own."""

    def _enabled(self) -> Any:
        """What `enable` put there: another object each time, None after `disable`."""
        return vars(self.model).get("get_compiled_call")

    def _holds(self) -> bool:
        *objects, valid, weights = self._state
        *objects_now, valid_now, weights_now = self._now()
        same = all(one is other for one, other in zip(objects, objects_now, strict=True))
        return same and valid == valid_now and weights == weights_now


class GraphedCall(ModelAttribute):
    """What an enabled model answers with when ``generate()`` asks for a compiled call.

    It stands in the model's attributes under the name ``get_compiled_call``.
    """

    def __call__(self, compile_config: Any = None) -> Callable[..., Any]:
        """Return a forward that replays decode steps.

        Args:
            compile_config: options for ``torch.compile``, which is not used.

        Raises:
            UnsupportedModelError: there are such options.
        """
        if compile_config is not None:
            raise UnsupportedModelError(
                "clustered heads are not run through torch.compile, so compile_config cannot be "
                "honoured: leave it out, decode steps are replayed as CUDA graphs on their own"
            )
        return partial(_call, self.model)


def _call(model: PreTrainedModel, *args: Any, **inputs: Any) -> Any:
    """Forward of ``model``: replayed if it is a decode step that can be, else as it is."""
    if args:  # generate() passes everything by name
        return model(*args, **inputs)
    cache, ids = inputs.get("past_key_values"), inputs.get("input_ids")
    plain = all(name in _KNOWN or given in (None, False) for name, given in inputs.items())
    if (
        not plain
        or not isinstance(cache, StaticClusteredCache)
        or not (cache.is_compileable and cache.is_ready)
        or cache.tokens.devices > 1  # a step across devices runs as it is
        or not isinstance(ids, Tensor)
        or ids.shape[1] != 1
        or inputs.get("position_ids") is None
    ):
        return model(**inputs)
    if cache.graph is None or cache.graph.model is not model:
        cache.graph = DecodeGraph(model, cache)
    mask = cache.padding_of(inputs.get("attention_mask"))
    logits = cache.graph.step(ids, inputs["position_ids"], mask)
    return CausalLMOutputWithPast(logits=logits, past_key_values=cache)
