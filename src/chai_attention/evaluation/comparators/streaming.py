"""Streaming heads chosen at random or by attention mass: controls at a profile's K,V bytes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.calibration.pairs import maps_of
from chai_attention.calibration.statistics import observe
from chai_attention.errors import EvaluationError
from chai_attention.evaluation.comparators.chai import stacked
from chai_attention.evaluation.profiled import Profiled, profile_digest
from chai_attention.integrations.transformers.intervene import LayerCall
from chai_attention.profile import STATIC, ClusterProfile
from chai_attention.progress import Progress, quiet
from chai_attention.runtime.shape import ModelShape, describe

RECENT, SINKS = 128, 4  # without a profile that has an exact window


class StreamingHeads(Profiled):
    """K/V heads whose query heads see local keys only; all others stay as they are.

    Run by the library itself, as a profile. K and V of a streaming K/V head go together, so that
    up to one head more than asked for is saved.

    Args:
        save: share of the K,V bytes per token to save.
        local: last and first keys that streaming heads see; None for those of the method.
    """

    def __init__(self, save: float, local: tuple[int, int] | None = None):
        if not 0 < save <= 1:
            raise EvaluationError(f"save is a share above 0 and at most 1, not {save:g}")
        super().__init__()
        self._save, self._local = save, local

    def prepare(
        self, model: PreTrainedModel, tokens: Sequence[Tensor], progress: Progress = quiet
    ) -> None:
        """Choose the heads.

        Raises:
            EvaluationError: fewer heads than are to go can stream, or no text to learn from.
        """
        needs, local = self.needs(model, tokens, progress)
        self._profile = streaming_profile(describe(model), needs, self._save, local, self.name)

    @abstractmethod
    def needs(
        self, model: PreTrainedModel, tokens: Sequence[Tensor], progress: Progress
    ) -> tuple[Tensor, tuple[int, int]]:
        """Say how much each K/V head needs its far keys.

        Returns:
            ``[L, G]``, of which the smallest stream, and the last and first keys that those see.
        """

    def settings(self) -> Mapping[str, Any]:
        """The budget, the window, and the profile that came of them."""
        local = [self.profile.recent, self.profile.sinks]
        return {"save": self._save, "near": local, "profile": profile_digest(self.profile)}


class RandomStream(StreamingHeads):
    """Streaming heads at random.

    Args:
        save: share of the K,V bytes per token to save.
        local: last and first keys that streaming heads see.
        seed: of the choice.
    """

    name = "random-stream"
    source = "control for Xiao et al., ICLR 2025 (DuoAttention): a random choice of streaming heads"

    def __init__(self, save: float, local: tuple[int, int] | None = None, seed: int = 0):
        super().__init__(save, local)
        self._seed = seed

    def needs(
        self, model: PreTrainedModel, tokens: Sequence[Tensor], progress: Progress
    ) -> tuple[Tensor, tuple[int, int]]:
        """Random numbers."""
        shape = describe(model)
        draw = torch.Generator().manual_seed(self._seed)
        needs = torch.rand(shape.layers, shape.kv_heads, generator=draw)
        return needs, self._local or (RECENT, SINKS)

    def settings(self) -> Mapping[str, Any]:
        """The seed too."""
        return {**super().settings(), "seed": self._seed}


class MassStream(StreamingHeads):
    """The heads that give least of their attention to far keys stream.

    Its mean over the queries of calibration text that have far keys, and over the query heads of a
    K/V head. Without a window of a profile's the last 128 keys are local, or half of a calibration
    window if that is less.
    """

    name = "mass-stream"
    source = "control for Xiao et al., ICLR 2025 (DuoAttention), section 3.1: attention mass alone"

    def needs(
        self, model: PreTrainedModel, tokens: Sequence[Tensor], progress: Progress
    ) -> tuple[Tensor, tuple[int, int]]:
        """Mean probability on far keys."""
        windows, shape = stacked(tokens), describe(model)
        length = windows.shape[1]
        recent, sinks = self._local or (max(1, min(RECENT, length // 2)), SINKS)
        if length <= recent + sinks:
            raise EvaluationError(
                f"{self.name} needs calibration windows of more than {recent + sinks} tokens, "
                f"which have far keys, not {length} (--length)"
            )
        mass = torch.zeros(shape.layers, shape.heads, dtype=torch.float64)

        def watch(call: LayerCall, out: Tensor) -> None:
            for query, key in zip(call.query, call.key, strict=True):
                for maps in maps_of(query, key, call.scale, call.softcap):
                    mass[call.layer] += far_mass(maps.whole, maps.rows, recent, sinks).cpu()

        told = partial(progress, "attention on far keys")
        observe(model, windows, [watch], batch_size=4, progress=told)
        return mass.view(shape.layers, shape.kv_heads, -1).sum(-1), (recent, sinks)


def far_mass(maps: Tensor, rows: slice, recent: int, sinks: int) -> Tensor:
    """``[H]``, float64: attention of all queries to far keys together.

    Args:
        maps: ``[H, R, S]`` probabilities of the queries ``rows`` over the first S keys.
        rows: which queries.
        recent: last keys of a query that are local.
        sinks: first keys that are local.
    """
    queries = torch.arange(rows.start, rows.start + maps.shape[1], device=maps.device)[:, None]
    keys = torch.arange(maps.shape[2], device=maps.device)
    far = (keys >= sinks) & (keys <= queries - recent)  # [R, S]
    return (maps * far).sum((1, 2), dtype=torch.float64)


def streaming_profile(
    shape: ModelShape, needs: Tensor, save: float, local: tuple[int, int], method: str
) -> ClusterProfile:
    """A static profile in which the K/V heads with the smallest ``needs [L, G]`` stream.

    Equal ones go by layer and head. Layers with sliding windows keep all of theirs, and hold no
    more with every token.

    Args:
        shape: of the model.
        needs: how much each K/V head needs its far keys.
        save: share of the K,V bytes per token, above 0 and at most 1.
        local: last and first keys that streaming heads see.
        method: what the profile is called.
    """
    group = shape.heads // shape.kv_heads
    count = ceil(save * sum(shape.clusterable) * shape.kv_heads - 1e-9)
    needs = needs.double().clone()
    needs[~torch.tensor(shape.clusterable)] = torch.inf
    chosen = torch.zeros(needs.numel(), dtype=torch.bool)
    chosen[torch.argsort(needs.flatten(), stable=True)[:count]] = True
    streams = chosen.view(shape.layers, shape.kv_heads).repeat_interleave(group, 1)  # [L, H]
    everyone = tuple(range(shape.heads))
    return ClusterProfile(
        tuple((~streams).sum(1).tolist()),
        membership=STATIC,
        representatives=(everyone,) * shape.layers,
        streaming=tuple(tuple(row.nonzero().flatten().tolist()) for row in streams),
        recent=local[0],
        sinks=local[1],
        provenance={"method": method},
    )
