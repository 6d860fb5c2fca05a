"""`calibrate`: from a model and text to a `ClusterProfile` (CHAI, section 3.2, and beyond)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.calibration.candidates import Candidates
from chai_attention.calibration.checks import require_tokens
from chai_attention.calibration.data import CalibrationData, read_data, stretches
from chai_attention.calibration.evidence import EvidenceStore
from chai_attention.calibration.finish import Finish
from chai_attention.calibration.recall_check import recall_check
from chai_attention.calibration.recall_source import use_recall
from chai_attention.calibration.settings import Resolved, Settings
from chai_attention.calibration.sizes import (
    BATCH_SIZE,
    HELD_OUT,
    check_numbers,
    sequence_length,
    usual_samples,
)
from chai_attention.calibration.split_candidates import candidates_of
from chai_attention.calibration.steps import Steps, steps_of
from chai_attention.calibration.texts import as_tokens, beginning, windows_of
from chai_attention.errors import CalibrationError
from chai_attention.integrations.transformers.corrections import plain_projection
from chai_attention.integrations.transformers.modules import attention_modules
from chai_attention.profile import ClusterProfile
from chai_attention.progress import Progress, quiet
from chai_attention.runtime.shape import describe, unwrapped


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: str | Sequence[str] | Tensor,
    *,
    samples: int | None = None,
    length: int | None = None,
    held_out: Tensor | Sequence[Tensor] | int = HELD_OUT,
    batch_size: int = BATCH_SIZE,
    source: str = "given text",
    store: EvidenceStore | None = None,
    progress: Progress = quiet,
    **settings: Any,
) -> ClusterProfile:
    """Find which heads of each layer can share their scores.

    By default: the smallest K,V cache whose perplexity rise on held-out text is at most 1%. What
    it costs that a head uses another's scores of far keys, or sees none of them, is found by one
    backward pass per sequence of text, a dynamic program deals the savings out to the layers, and
    the loss of what it chose is measured, at the length of the sequences and at a longer one.

    Args:
        model: a supported causal language model, or a PEFT model around one.
        tokenizer: its tokenizer; None for sequences that are tokens already, which then hide no
            facts to recall.
        texts: sample text, documents, or ready sequences of tokens ``[N, S]`` int64.
        samples: sequences to learn from; None for 256 with gradient costs (64 with streaming
            heads, whose sequences are longer), else 1024.
        length: tokens per sequence; None for 256 (1,024 with streaming heads), or the model's
            maximum if that is less.
        held_out: sequences ``[N, S]`` on which loss is measured, or such and longer ones ``[M, T]``
            in a pair, or how many further sequences of the text to hold out for that; with
            streaming heads pieces of text four (or two) times as long, if text and model allow,
            measured whole and in sequences. If the text has not enough for ``samples`` and these,
            at most a third are held out, which a `ChaiWarning` says. None are held out if there is
            nothing to measure: with given ``clusters`` or the elbow, and without a refit.
        batch_size: sequences per forward.
        source: what to call the text in the profile.
        store: evidence of earlier calibrations of this model on the same sequences, to be used
            again and added to; one of other sequences is left alone.
        progress: called with (which step of how many is going on, done, in all of that step).
        settings: fields of `Settings`: recipe, cost, membership, target, window, recent, sinks,
            context, refit, a budget (max_loss, save, removed, clusters or max_error), measure,
            recall, tensor_parallel, seed, ...

    Returns:
        A profile with error curves and head similarities; the same arguments give the same one.

    Raises:
        CalibrationError: options that contradict each other, too little text, tokens that the
            model does not have, a loss that is no number, or a budget that cannot be met.
        UnsupportedModelError: the model cannot be clustered.
    """
    unknown = sorted(set(settings) - {field.name for field in fields(Settings)})
    if unknown:
        raise TypeError(f"calibrate() has no option {', '.join(unknown)}")
    model = unwrapped(model)
    chosen = Settings(**settings).resolve(describe(model))
    data = _data(model, tokenizer, texts, chosen, samples, length, held_out)
    return calibrate_data(
        model, tokenizer, data, chosen, recall_asked=settings.get("recall") is not None,
        source=source, batch_size=batch_size, store=store, progress=progress,
    )  # fmt: skip


def _data(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: str | Sequence[str] | Tensor,
    chosen: Resolved,
    samples: int | None,
    length: int | None,
    held_out: Tensor | Sequence[Tensor] | int,
) -> CalibrationData:
    """Cut text to sequences, and hold some of them out if there is something to measure."""
    if tokenizer is None and not isinstance(texts, Tensor):
        raise CalibrationError("without a tokenizer, text is ready sequences of tokens")
    samples = usual_samples(chosen) if samples is None else samples
    check_numbers(samples, chosen.seed)
    if length is None and isinstance(texts, Tensor) and texts.ndim == 2:
        length = min(texts.shape[1], sequence_length(model, chosen))
    length = sequence_length(model, chosen, length)
    tokens = texts if isinstance(texts, Tensor) else as_tokens(texts, tokenizer)

    def read(samples: int, length: int) -> tuple[Tensor, None]:
        return windows_of(tokens, tokenizer, samples, length, chosen.seed), None

    if not chosen.holds_out:
        return CalibrationData(read(samples, length)[0])
    if isinstance(held_out, int):
        before = [] if tokenizer is None else beginning(tokenizer)
        times = stretches(model, chosen, length)
        return read_data(read, samples, held_out, length, times, before)
    pair = [held_out] if isinstance(held_out, Tensor) else list(held_out)
    if len(pair) not in (1, 2) or not all(
        text.ndim == 2 and min(text.shape) > 1 and text.dtype == torch.long for text in pair
    ):
        raise CalibrationError(
            "held_out is how many sequences to hold out, or at least 2 sequences of tokens "
            "[N, S], int64, and perhaps longer ones"
        )
    return CalibrationData(read(samples, length)[0], *pair)


@torch.inference_mode(False)  # gradients are needed, whatever the caller is in
def calibrate_data(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: CalibrationData,
    chosen: Resolved,
    *,
    recall_asked: bool,
    source: str,
    batch_size: int = BATCH_SIZE,
    store: EvidenceStore | None = None,
    progress: Progress = quiet,
) -> ClusterProfile:
    """Collect evidence, and make the profile that was asked for of it.

    Args:
        model: a supported causal language model.
        tokenizer: its tokenizer; None for no facts to recall.
        data: tokens to learn from and to measure on.
        chosen: the settings, resolved for this model.
        recall_asked: whether it is an error if the text has no room for facts to recall.
        source: what to call the text in the profile.
        batch_size: sequences per forward.
        store: as `calibrate`.
        progress: as `calibrate`.

    Raises:
        CalibrationError: as `calibrate`.
    """
    shape = describe(model)
    if chosen.refits:  # found now, not after the evidence
        for layer, module in attention_modules(model).items():
            plain_projection(layer, module)
    wanted = chosen.given_clusters(shape)
    for tokens in (data.sequences, *data.measured):
        require_tokens(model, tokens)
    if data.sequences.is_inference():  # such a tensor cannot be part of a backward pass
        data = replace(data, sequences=data.sequences.clone())
    sequences = data.sequences
    if store is None or store.model is not model or not torch.equal(store.sequences, sequences):
        store = EvidenceStore(model, sequences, batch_size)
    provenance = _provenance(chosen, source, sequences)
    provenance |= use_recall(store, tokenizer, chosen, required=recall_asked)
    asks = chosen.measures and chosen.asks_recall
    recall = recall_check(tokenizer, data.measured, chosen.seed) if asks else None
    steps = Steps(progress, *steps_of(len(store.missing(chosen)), chosen, shape))
    candidates = candidates_of(shape, chosen, store.get_all(chosen, steps=steps), provenance)
    finish = Finish(model, chosen, data, recall, batch_size, steps)
    if isinstance(candidates, Candidates):
        if wanted is not None:
            return finish.unmeasured(candidates.profile(wanted))
        if chosen.clusters == "elbow":
            assert chosen.max_error is not None
            return finish.unmeasured(candidates.at_elbow(chosen.max_error))
    if chosen.max_loss is not None:
        return finish.within_loss(candidates)
    profile = candidates.remove(candidates.units_asked())
    if not chosen.measures:
        return finish.unmeasured(profile)
    save, removed = chosen.save, chosen.removed
    return finish.measured(profile, {"removed": removed} if save is None else {"save": save})


def _provenance(settings: Resolved, source: str, sequences: Tensor) -> dict[str, Any]:
    """What a profile remembers of its making."""
    if settings.streams:
        method, features = "splits of heads", f"{settings.cost} costs"
    elif settings.cost == "scores":
        method = "k-means" if settings.target == "scores" else "best K/V heads"
        features = "causal attention probabilities"
    else:
        method, features = "k-medoids", f"{settings.cost} costs"
    elbow = settings.clusters == "elbow"
    chosen = "elbow" if elbow else "given counts" if settings.clusters is not None else "budget"
    found = {
        "recipe": settings.recipe,
        "method": f"{method}, {chosen}",
        "features": features,
        "cost": settings.cost,
        "max_error": settings.max_error if elbow else None,
        "save": settings.save,
        "removed": settings.removed,
        "context": settings.context,
        "text": source,
        "samples": sequences.shape[0],
        "length": sequences.shape[1],
        "seed": settings.seed,
        "chai_attention": version("chai-attention"),
    }
    return {name: value for name, value in found.items() if value is not None}
