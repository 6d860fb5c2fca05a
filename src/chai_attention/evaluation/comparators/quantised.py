"""K and V in 8 or 4 bits, by transformers' `QuantizedCache`, alone and beside clustered heads.

The quantiser is HQQ: integers with a scale and a zero of 16 bits per group of neighbouring values
of one head and token. (Of transformers' two other quantisers, Quanto has no 8 bits and fp8 no 4.)
Like all of transformers' quantised caches it reads the prompt in full precision, then quantises
it, and keeps up to 128 later tokens whole before they join.

A server holds K and V in 16 bits, so shares of bytes are of these, whatever the model was loaded
in, and of a prompt, all of which is quantised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, QuantizedCache
from transformers.cache_utils import Cache

from chai_attention.errors import UnsupportedModelError
from chai_attention.evaluation.comparators.base import shape_of
from chai_attention.evaluation.comparators.quantised_layer import RESIDUAL, QuantisedClusteredLayer
from chai_attention.evaluation.profiled import LowBitCache
from chai_attention.integrations.transformers import ClusteredCache
from chai_attention.profile import ClusterProfile
from chai_attention.progress import Progress, quiet

FULL_BITS = 16  # of a number in a server's K,V cache, and of a scale or zero
LARGEST_GROUP = 64


class Quantised(LowBitCache):
    """K and V in ``bits`` bits.

    With clusters, what their cache holds: the same quantiser, groups and residual. K of removed
    heads that an exact recent window needs stays in 16 bits: it is a residual itself.

    Args:
        bits: 8 or 4.
        profile: of clustered heads; None for all heads.

    Raises (from `prepare` and what it makes):
        UnsupportedModelError: sliding-window layers, or a head size that is odd.
    """

    def __init__(self, bits: int, profile: ClusterProfile | None = None):
        super().__init__(f"quant{bits}", profile)
        self._bits = bits
        self.source = (
            "transformers' QuantizedCache with HQQ (Badri and Shaji 2023), after KIVI, ICML 2024"
            if profile is None
            else "Agarwal et al., ICML 2024 (CHAI), with its K,V quantised as by transformers' "
            "QuantizedCache with HQQ"
        )

    def prepare(
        self, model: PreTrainedModel, tokens: Sequence[Tensor], progress: Progress = quiet
    ) -> None:
        """Learn nothing; refuse a model that the method cannot run."""
        _group(model)

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Enable the profile, if there is one: the cache does the rest."""
        with _memory_kept(), super().attached(model):
            yield

    def new_cache(self, model: PreTrainedModel) -> Cache:
        """Return an empty quantised cache."""
        group = _group(model)
        if self._profile is not None:
            cache = ClusteredCache(model, self._profile)
            cache.layers = [
                QuantisedClusteredLayer(plan, self._bits, group) for plan in cache.plans
            ]
            return cache
        return QuantizedCache(
            backend="hqq",
            config=model.config,
            nbits=self._bits,
            axis_key=1,  # groups of neighbouring values, as transformers advises for HQQ
            axis_value=1,
            q_group_size=group,
            residual_length=RESIDUAL,
        )

    def number_share(self, model: PreTrainedModel) -> float:
        """Bits per value, scales and zeros included, of 16."""
        return bits_per_value(self._bits, _group(model)) / FULL_BITS

    def settings(self) -> Mapping[str, Any]:
        """The quantiser's settings, and the profile."""
        told = {"bits": self._bits, "largest_group": LARGEST_GROUP, "residual": RESIDUAL}
        return {**told, **super().settings()}


def bits_per_value(bits: int, group: int) -> float:
    """Bits of a quantised value, with its part in the scale and the zero of its group."""
    return bits + 2 * FULL_BITS / group


def group_size(head_dim: int) -> int:
    """The largest group of at most 64 values that fits a head an even number of times.

    No group then reaches over two heads or tokens, and there is an even number of groups, two of
    which the library packs into one row of bytes.

    Raises:
        UnsupportedModelError: an odd head size.
    """
    for group in range(min(LARGEST_GROUP, head_dim // 2), 0, -1):
        if head_dim % (2 * group) == 0:
            return group
    raise UnsupportedModelError(
        f"quantised caches need heads of even size, not {head_dim}: leave them out of the "
        "comparison"
    )


def _group(model: PreTrainedModel) -> int:
    """Group size for a model."""
    return group_size(shape_of(model, "a quantised cache").head_dim)


@contextmanager
def _memory_kept() -> Iterator[None]:
    """Let hqq not hand back free GPU memory: it does so three times per tensor, and each waits."""
    empty = torch.cuda.empty_cache
    torch.cuda.empty_cache = lambda: None
    try:
        yield
    finally:
        torch.cuda.empty_cache = empty
