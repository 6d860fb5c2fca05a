"""ThinK and SnapKV, as NVIDIA's kvpress implements them, at the K,V bytes that are asked for.

What is kvpress's: which channels of K, or which tokens of the prompt, are the least important, and
their removal from the cache (the presses' ``compress``). What is ours: when that happens. kvpress's
own hook asks for ``cache_position``, which the transformers releases that we support do not hand to
attention any more; from 0.5.3 on kvpress's metadata therefore asks for transformers before 5.3.
Importing kvpress also wraps every attention function of transformers, for other methods than these
two; so only the modules of these two are imported, which need nothing but torch and transformers.

Both compress the prompt once, after it has been read in full, and keep what is generated after it
whole. SnapKV's window never is more than half of what is kept: kvpress refuses a prompt that is
shorter than the window, and items of a quality table often are.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from math import ceil
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chai_attention.errors import EvaluationError, UnsupportedModelError
from chai_attention.evaluation.comparators.base import Comparator
from chai_attention.integrations.transformers.modules import attention_modules
from chai_attention.progress import Progress, quiet
from chai_attention.runtime.shape import describe

THINK_CHANNELS = 0.4  # share of K's channels that ThinK's paper removes
SNAPKV_TOKENS = 0.5  # share of the prompt that SnapKV removes, without a budget
SNAPKV_WINDOW = 32  # queries at the prompt's end that choose; the paper's evaluation of LongBench
THINK_WINDOW = 32


class Press(Comparator):
    """A press of kvpress in the model's own cache.

    Args:
        save: share of the K,V bytes to save; None for the method's default.

    Raises (from `prepare` and `attached`):
        UnsupportedModelError: kvpress does not support the model, or it has sliding windows.
    """

    needs_cache = True
    rows_apart = True

    def __init__(self, save: float | None = None):
        if save is not None and not 0 < save < 1:
            raise EvaluationError(f"save is a share above 0 and below 1, not {save:g}")
        self._save = save
        load_presses()  # raises now where it is missing

    def prepare(
        self, model: PreTrainedModel, tokens: Sequence[Tensor], progress: Progress = quiet
    ) -> None:
        """Learn nothing; refuse a model that the method cannot run."""
        self._check(model)

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Compress the cache after every forward that fills an empty one."""
        self._check(model)
        with ExitStack() as hooks:
            for layer, module in attention_modules(model).items():
                hook = module.register_forward_hook(
                    partial(self._compress, layer), with_kwargs=True
                )
                hooks.callback(hook.remove)
            yield

    @abstractmethod
    def press_for(self, tokens: int, channels: int) -> Any:
        """Return kvpress's press for a prompt of ``tokens`` and heads of size ``channels``."""

    def settings(self) -> Mapping[str, Any]:
        """The budget."""
        return {"save": self._save}

    def _check(self, model: PreTrainedModel) -> None:
        supported = load_presses().SUPPORTED_MODELS
        if not isinstance(model, supported) or not all(describe(model).clusterable):
            names = ", ".join(kind.__name__ for kind in supported)
            raise UnsupportedModelError(
                f"kvpress supports {names}, and here those without sliding windows, not this "
                f"{type(model).__name__}: leave {self.name} out of the comparison"
            )

    def _compress(
        self,
        layer: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
    ) -> None:
        filled = kwargs.get("past_key_values")
        if filled is None:
            return
        held = filled.layers[layer]
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        tokens = held.keys.shape[2]
        if tokens != hidden.shape[1]:  # the prompt has been compressed before
            return
        press = self.press_for(tokens, held.keys.shape[3])
        seen = {"hidden_states": hidden, "position_embeddings": kwargs["position_embeddings"]}
        held.keys, held.values = press.compress(module, hidden, held.keys, held.values, None, seen)


class Think(Press):
    """Channels of K are left out, chosen per request and head by the last queries.

    kvpress zeroes them, which is what leaving them out computes; the share counts them as gone.
    Where the paper spares the last 32 tokens of the prompt, kvpress prunes these as well.
    """

    name = "think"
    source = "Xu et al., ICLR 2025 (ThinK), section 3; kvpress's ThinKPress"

    def press_for(self, tokens: int, channels: int) -> Any:
        """ThinKPress for the budget."""
        share = (pruned_channels(channels, self._save) + 0.5) / channels  # it rounds down
        return load_presses().ThinKPress(
            key_channel_compression_ratio=share, window_size=THINK_WINDOW
        )

    def kv_share(self, model: PreTrainedModel, length: int) -> float:
        """V whole, and K without the channels that are gone."""
        channels = describe(model).head_dim
        return 1 - pruned_channels(channels, self._save) / (2 * channels)


class SnapKV(Press):
    """Tokens of the prompt are left out, per K/V head, by the attention of its last queries."""

    name = "snapkv"
    source = "Li et al., NeurIPS 2024 (SnapKV), section 4; kvpress's SnapKVPress"

    def press_for(self, tokens: int, channels: int) -> Any:
        """SnapKVPress for the budget and a prompt of this length."""
        kept = kept_tokens(tokens, self._save)
        share = 0.0 if kept == tokens else 1 - (kept + 0.5) / tokens  # it rounds what is kept down
        return load_presses().SnapKVPress(
            compression_ratio=share, window_size=max(1, min(SNAPKV_WINDOW, kept // 2))
        )

    def kv_share(self, model: PreTrainedModel, length: int) -> float:
        """Share of a prompt of ``length`` tokens that is kept."""
        return kept_tokens(length, self._save) / length


def pruned_channels(channels: int, save: float | None) -> int:
    """How many of a head's K channels ThinK removes: V stays, so twice the share of the bytes.

    Raises:
        EvaluationError: more than K has.
    """
    if save is None:
        return int(THINK_CHANNELS * channels)
    pruned = ceil(2 * save * channels - 1e-9)
    if pruned >= channels:
        raise EvaluationError(
            f"ThinK leaves V whole and saves less than half of the K,V bytes, not {save:.1%}"
        )
    return pruned


def kept_tokens(tokens: int, save: float | None) -> int:
    """How many tokens of a prompt SnapKV keeps, at least one."""
    share = 1 - (SNAPKV_TOKENS if save is None else save)
    return max(1, ceil(share * tokens - 1e-9))


def kvpress_comparator(name: str, save: float | None) -> Press:
    """Make "think" or "snapkv".

    Raises:
        ImportError: kvpress is not installed.
        EvaluationError: a saving that is no share.
    """
    return {"think": Think, "snapkv": SnapKV}[name](save)


@cache
def load_presses() -> Any:
    """Import kvpress's ThinK and SnapKV, and nothing that only its other methods need.

    Returns:
        ``ThinKPress``, ``SnapKVPress`` and ``SUPPORTED_MODELS``.

    Raises:
        ImportError: kvpress is not installed.
    """
    name = "kvpress"
    whole = sys.modules.get(name)
    if whole is None:
        spec = find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        part = ModuleType(name)  # a package whose own code is not run
        part.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = part
    try:
        presses = [
            import_module(f"{name}.presses.{module}")
            for module in ("base_press", "think_press", "snapkv_press")
        ]
    finally:
        if whole is None:
            del sys.modules[name]  # whoever imports it gets all of it
    return SimpleNamespace(
        SUPPORTED_MODELS=presses[0].SUPPORTED_MODELS,
        ThinKPress=presses[1].ThinKPress,
        SnapKVPress=presses[2].SnapKVPress,
    )


def load_kvpress() -> Any:
    """Import all of kvpress, without what it does to transformers' attention functions."""
    table = ALL_ATTENTION_FUNCTIONS._local_mapping
    before = dict(table)
    try:
        return import_module("kvpress")
    finally:
        table.clear()
        table.update(before)
