"""Estimate of a calibration's time and memory (``--dry-run``), from one batch of each step."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.calibration.evidence import RECALL_COSTS, EvidenceStore
from chai_attention.calibration.perplexity import token_loss
from chai_attention.calibration.recall_check import recall_check
from chai_attention.calibration.recall_source import recall_count, use_recall
from chai_attention.calibration.refit import PASSES, sequences_needed
from chai_attention.calibration.request import TextRequest
from chai_attention.calibration.settings import Settings
from chai_attention.calibration.sizes import BATCH_SIZE, sequence_length
from chai_attention.calibration.split_candidates import candidates_of
from chai_attention.calibration.steps import Steps, steps_of
from chai_attention.calibration.texts import SELF, self_text
from chai_attention.integrations.transformers.devices import devices_of
from chai_attention.integrations.transformers.enable import enabled
from chai_attention.integrations.transformers.logits import rows_at_once
from chai_attention.progress import Progress, quiet
from chai_attention.runtime.shape import describe

WRITTEN = 16  # tokens that the model writes to see how fast it does
WRITTEN_AT_ONCE = 32


@dataclass(frozen=True)
class Estimate:
    """What a calibration will take, on this machine.

    Attributes:
        windows: sequences of text to learn from.
        held_out: sequences to measure on.
        length: tokens per sequence.
        seconds: that each step takes, by its name.
        tries: profiles that are measured at most; 0 without a budget to measure.
        seconds_per_try: of one of them.
        memory: bytes at the peak: of the GPU (of several, the sum), else of this process.
        weights: bytes of the model's weights.
    """

    windows: int
    held_out: int
    length: int
    seconds: dict[str, float]
    tries: int
    seconds_per_try: float
    memory: int
    weights: int

    @property
    def at_most(self) -> float:
        """Seconds in all, if every try is needed."""
        return sum(self.seconds.values()) + self.tries * self.seconds_per_try


def estimate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: TextRequest,
    settings: Settings,
    progress: Progress = quiet,
) -> Estimate:
    """Run one batch of every step, and reckon from that.

    Files of text are read, so that what is wrong with them is found; the model writes a few
    tokens where it is to write its own text.

    Raises:
        CalibrationError: what `calibrate_on` would raise before its work begins.
    """
    shape, seconds = describe(model), dict[str, float]()
    chosen = request.settle(settings, model, tokenizer)
    samples, length = request.samples_for(chosen), sequence_length(model, chosen, request.length)
    measured = chosen.holds_out
    held_out, longer = request.held_out if measured else 0, None
    if any(source.name == SELF for source in request.sources):
        seconds["text that the model writes"] = _writing(
            model, request, samples + held_out, length, chosen.seed
        )
        sequences = _stand_in(model, length)
        if files := [source for source in request.sources if source.name != SELF]:
            replace(request, sources=files).read(model, tokenizer, chosen, progress)
    else:
        data = request.read(model, tokenizer, chosen, progress)
        sequences, samples = data.sequences[:BATCH_SIZE], len(data.sequences)
        held_out = 0 if data.held_out is None else len(data.held_out)
        longer = data.longer
    for device in devices_of(model):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
    clock = _Clock(progress)
    for part in (sequences[:1], sequences):  # the first pays for one-time set-up
        clock.reset()
        store = EvidenceStore(model, part, BATCH_SIZE)
        use_recall(store, tokenizer, chosen, required=settings.recall is not None)
        evidence = store.get_all(chosen, steps=Steps(clock, 2))
    for name, spent in clock.seconds.items():
        seconds[name] = spent * samples / len(sequences)
        if name == RECALL_COSTS:
            seconds[name] = spent * recall_count(samples) / recall_count(len(sequences))
    per_try, tries = 0.0, 0
    if measured:
        candidates = candidates_of(shape, chosen, evidence)
        plain = _loss_seconds(model, sequences)
        with enabled(model, candidates.remove(max(1, candidates.guess))):
            per_try = _loss_seconds(model, sequences)
        texts = [sequences] if longer is None else [sequences, longer]
        check = recall_check(tokenizer, texts, chosen.seed) if chosen.asks_recall else None
        tokens = 0 if check is None else sum(task.length * len(task.cases) for task in check.tasks)
        wanted = held_out * len(texts) + tokens / length
        per_try *= wanted
        seconds["perplexity of the model"] = plain * wanted
        if chosen.refits:
            per_try += plain * PASSES * sequences_needed(model, samples, length)
        tries = max(1, steps_of(0, chosen, shape)[0] - 1)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Estimate(samples, held_out, length, seconds, tries, per_try, _memory(model), weights)


class _Clock:
    """Seconds of every step, told as a `Progress`."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, what: str, done: int, total: int) -> None:
        _finish_work()
        now, name = time.perf_counter(), what.partition(": ")[2]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
        self._progress(f"a batch of {name}", done, total)


def _loss_seconds(model: PreTrainedModel, sequences: Tensor) -> float:
    """Seconds that a sequence takes to measure on."""
    token_loss(model, sequences[:1])
    return _seconds(lambda: token_loss(model, sequences, batch_size=BATCH_SIZE)) / len(sequences)


def _seconds(run: Callable[[], object]) -> float:
    _finish_work()
    start = time.perf_counter()
    run()
    _finish_work()
    return time.perf_counter() - start


def _writing(
    model: PreTrainedModel, request: TextRequest, sequences: int, length: int, seed: int
) -> float:
    """Seconds that the model needs to write its share of the sequences."""
    weights = {source.name: source.weight for source in request.sources}
    share = sequences * weights[SELF] / sum(weights.values())
    rows = max(1, min(rows_at_once(WRITTEN_AT_ONCE, length), round(share)))
    tokens = min(WRITTEN, length)
    self_text(model, 1, 2, seed=seed)
    spent = _seconds(lambda: self_text(model, rows, tokens, seed=seed))
    return spent * -(-share // rows) * (length - 1) / max(1, tokens - 1)


def _stand_in(model: PreTrainedModel, length: int) -> Tensor:
    """Tokens ``[B, length]`` at random: how long a batch takes does not depend on what it says."""
    rows = model.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    return torch.randint(rows, (BATCH_SIZE, length), generator=draw)


def _finish_work() -> None:
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        torch.cuda.synchronize(index)


def _memory(model: PreTrainedModel) -> int:
    """Bytes at the peak."""
    gpus = [device for device in devices_of(model) if device.type == "cuda"]
    if gpus:
        return sum(torch.cuda.max_memory_allocated(device) for device in gpus)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
