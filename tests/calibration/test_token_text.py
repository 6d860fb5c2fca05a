"""Windows of tokens: as documents joined and cut, runs by themselves, for any length at once."""

import pytest
import torch

from chai_attention.calibration import windows_of
from chai_attention.calibration.drawing import Run
from chai_attention.calibration.texts import as_tokens
from chai_attention.calibration.token_text import TokenText
from chai_attention.errors import CalibrationError
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = [f"{n:03d}" * (1 + 7 * n % 23) for n in range(60)]
END = 2


def joined_and_cut(texts, samples, length, seed):
    """The rule, in as many words: one list of all tokens."""
    tokens = []
    for text in texts:
        tokens += ([END] if tokens else []) + TOKENIZER(text)["input_ids"]
    windows = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    if len(windows) > samples:
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        windows = windows[order[:samples].sort().values]
    return windows


@pytest.mark.parametrize("length", [1, 2, 7, 64, 500])
@pytest.mark.parametrize("samples", [1, 5, 10**6])
def test_documents_are_joined_and_cut(samples, length):
    want = joined_and_cut(TEXTS, samples, length, seed=3)
    assert torch.equal(windows_of(TEXTS, TOKENIZER, samples, length, seed=3), want)
    tokens = as_tokens(TEXTS, TOKENIZER)
    for _ in range(2):
        assert torch.equal(windows_of(tokens, TOKENIZER, samples, length, seed=3), want)


def decoded(texts, length, samples=100, before=()):
    windows = TokenText(texts, TOKENIZER, before).sequences(samples, length, seed=0)
    assert windows.dtype == torch.long
    return TOKENIZER.batch_decode(windows)


def test_runs_are_cut_by_themselves_and_documents_around_them_are_joined():
    """No window goes on from a run to what did not follow it; the rest of a run is in none."""
    texts = ["abc", Run("01234567"), "defg", "hi", Run("890123"), "jklmnop"]
    want = ["abc", "012", "345", "def", "g</s>h", "890", "123", "i</s>j", "klm", "nop"]
    assert decoded(texts, 3) == want


def test_runs_that_are_too_short_for_a_window_are_joined_like_documents():
    texts = ["ab", Run("0123"), Run("45"), "cd", Run("6789012345")]
    assert decoded(texts, 6) == ["ab</s>012", "3</s>45</s>c", "678901"]
    assert decoded([Run("01"), Run("23"), Run("45")], 8) == ["01</s>23</s>45"]


def test_every_window_of_every_part_is_chosen_alike():
    texts = [Run("a" * 40), "b" * 40, Run("c" * 40)]
    counts = dict.fromkeys("abc", 0)
    for seed in range(200):
        for row in TokenText(texts, TOKENIZER).sequences(6, 4, seed):
            counts[TOKENIZER.decode(row)[0]] += 1
    assert sum(counts.values()) == 1200
    assert all(abs(count - 400) < 60 for count in counts.values())


def test_what_a_window_begins_with_takes_none_of_the_text():
    assert decoded(["abcdef", Run("0123456")], 4, before=[1]) == [
        "<s>abc", "<s>def", "<s>012", "<s>345",
    ]  # fmt: skip


@pytest.mark.parametrize("texts", [[], [" "], ["abc"], [Run("ab"), "c"]])
def test_too_little_text_is_refused(texts):
    with pytest.raises(CalibrationError, match=r"at least 16 tokens of text .*has (0|3)$"):
        TokenText(texts, TOKENIZER).sequences(4, 16, seed=0)
