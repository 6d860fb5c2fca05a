"""``chai demo``: calibrate a model, generate with and without clusters, and measure the loss."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.calibration import calibrate, windows_of
from chai_attention.calibration.perplexity import Loss, PairedRise, paired_rise, token_loss
from chai_attention.calibration.sizes import longest_text
from chai_attention.integrations.transformers import enabled
from chai_attention.integrations.transformers.devices import input_device
from chai_attention.integrations.transformers.modes import evaluating
from chai_attention.integrations.transformers.timed_generation import Written, encode_prompt, write
from chai_attention.profile import ClusterProfile
from chai_attention.progress import Progress, quiet

LENGTH = 512  # tokens per window of calibration, or half of what the model reads
CONTEXT = 1024  # tokens per test window, or what the model reads
CALIBRATION_WINDOWS = 16
TEST_WINDOWS = 16
HELD_OUT = 16
PASSAGE = 768  # tokens of the test text that the prompt is about, where the model reads as many


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        profile: of the model.
        calibration_seconds: how long it took.
        plain: generation without clustered heads.
        clustered: generation with them.
        plain_loss: of the test text, without.
        clustered_loss: of the test text, with.
    """

    profile: ClusterProfile
    calibration_seconds: float
    plain: Written
    clustered: Written
    plain_loss: Loss
    clustered_loss: Loss

    @property
    def rise(self) -> PairedRise:
        """What clustering costs, in perplexity."""
        return paired_rise(self.plain_loss, self.clustered_loss)


def run_demo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    prompt: str,
    *,
    source: str,
    max_new_tokens: int = 96,
    save: float | None = 0.28,
    progress: Progress = quiet,
) -> DemoResult:
    """Calibrate on one half of ``texts``, measure on the other, and generate twice.

    Args:
        model: a supported causal language model.
        tokenizer: its tokenizer; its chat template is used if it has one.
        texts: documents; the even ones calibrate, the odd ones test. A single document is cut in
            the middle.
        prompt: what both generations answer, behind a passage of the test text.
        source: what to call the text in the profile.
        max_new_tokens: tokens of each generation.
        save: share of the K,V bytes of a test window to save; None for the largest with a
            perplexity rise of at most 1%.
        progress: called with (what is going on, done, in all).
    """
    if len(texts) == 1:
        middle = len(texts[0]) // 2
        texts = [texts[0][:middle], texts[0][middle:]]
    limit = longest_text(model) or CONTEXT
    context = min(CONTEXT, limit)
    test = windows_of(texts[1::2], tokenizer, TEST_WINDOWS, context, seed=0)
    start = time.perf_counter()
    profile = calibrate(
        model,
        tokenizer,
        texts[::2],
        samples=CALIBRATION_WINDOWS,
        length=min(LENGTH, limit // 2),
        held_out=HELD_OUT,
        context=context,
        source=source,
        save=save,
        measure=False,  # the test text measures it
        progress=progress,
    )
    seconds = time.perf_counter() - start

    def loss(name: str) -> Loss:
        return token_loss(model, test, progress=partial(progress, f"perplexity {name}"))

    chat = bool(tokenizer.chat_template)
    ids = encode_prompt(tokenizer, prompt, chat=chat)
    room = min(PASSAGE, limit - max_new_tokens - 2 * ids.shape[1])
    if room > 0:  # far keys need a context; what is decoded may be a few tokens more
        passage = _passage(tokenizer, texts[1::2], test[0], room)
        ids = encode_prompt(tokenizer, f"{passage}\n\n{prompt}", chat=chat)
    ids = ids[:, -(limit - max_new_tokens) :].to(input_device(model))
    with evaluating(model):
        write(model, tokenizer, ids, max_new_tokens=2)  # the first call pays for one-time set-up
        plain = write(model, tokenizer, ids, max_new_tokens=max_new_tokens)
        plain_loss = loss("without clusters")
        with enabled(model, profile):
            write(model, tokenizer, ids, max_new_tokens=2)
            clustered = write(model, tokenizer, ids, max_new_tokens=max_new_tokens)
            clustered_loss = loss("with clusters")
    return DemoResult(profile, seconds, plain, clustered, plain_loss, clustered_loss)


def _passage(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], window: Tensor, tokens: int
) -> str:
    """The beginning of the first document that is long enough, which is about one thing.

    Where there is none, of a window of the test text, which may begin and end anywhere.
    """
    for document in documents:
        # a token is seldom longer than eight characters, and most of a long text is not needed
        ids = tokenizer(document[: 8 * tokens], add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            return str(tokenizer.decode(ids[:tokens], skip_special_tokens=True)).strip()
    return str(tokenizer.decode(window[:tokens], skip_special_tokens=True)).strip()


def built_in_text() -> list[str]:
    """English prose that every Python installation carries: its own language reference."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]
