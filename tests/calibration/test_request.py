"""Text as the command line asks for it: read and turned into tokens once, at whatever lengths."""

import json
import warnings

import pytest

from chai_attention.calibration import calibrate, sources, texts
from chai_attention.calibration.request import TextRequest
from chai_attention.calibration.settings import Settings
from chai_attention.calibration.sources import Source
from chai_attention.calibration.token_text import TokenText
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

LOCAL = {"recent": 4, "sinks": 1, "context": 40, "save": 0.2}


class Counting:
    """A tokenizer that counts the characters that it turns into tokens."""

    eos_token_id = 2

    def __init__(self):
        self.characters = 0

    def __call__(self, text, **options):
        self.characters += len(text)
        return tiny_tokenizer()(text, **options)


def read(request, tokenizer):
    model = tiny_model("llama")
    return request.read(model, tokenizer, request.settle(Settings(**LOCAL), model, tokenizer))


def lines(count):
    return "".join(f"Line {i:05d} of a text.\n" for i in range(count))


@pytest.fixture
def loads(monkeypatch):
    """Names of the sources that are read."""
    found = []

    def load(name, **options):
        found.append(name)
        return texts.load_texts(name, **options)

    monkeypatch.setattr(sources, "load_texts", load)
    return found


# 22 characters a line and 24 tokens a window: too few of 4 and of 2 times the length, or enough
@pytest.mark.parametrize(("count", "samples"), [(22, 14), (400, 42)])
def test_a_text_is_read_once_for_all_lengths_that_are_tried(count, samples, loads, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(lines(count))
    request = TextRequest([Source(str(path))], samples=samples, held_out=6, length=24)
    tokenizer = Counting()
    ready = read(request, tokenizer)
    assert loads == [str(path)]
    assert 0 <= tokenizer.characters - len(lines(count)) < 20  # what texts begin with is asked for
    assert (ready.longer is None) == (count < 400)


@pytest.mark.parametrize("names", [["a.txt"], ["a.txt", "b.txt"]])
def test_a_promise_is_not_measured_on_the_end_of_a_text_alone(names, tmp_path):
    """A text that is about one thing first, and then about another."""
    for name in names:
        (tmp_path / name).write_text("a" * 6000 + "b" * 6000)
    files = [Source(str(tmp_path / name)) for name in names]
    request = TextRequest(files, samples=200 * len(names), held_out=200 * len(names), length=24)
    ready = read(request, tiny_tokenizer())
    first, second = tiny_tokenizer()("ab", add_special_tokens=False)["input_ids"]
    for sequences in (ready.sequences, *ready.measured):
        shares = [float((sequences == letter).float().mean()) for letter in (first, second)]
        assert shares == [pytest.approx(0.5, abs=0.11)] * 2


def test_a_text_in_memory_is_turned_into_tokens_once(monkeypatch):
    made, text = [], lines(400)

    class Counted(TokenText):
        def __init__(self, documents, *rest):
            made.append(documents)
            super().__init__(documents, *rest)

    monkeypatch.setattr(texts, "TokenText", Counted)
    options = {"samples": 8, "held_out": 4, "length": 24, "measure": False}
    calibrate(tiny_model("llama"), tiny_tokenizer(), text, **options, **LOCAL)
    assert made.count([text]) == 1


def test_what_is_wrong_with_a_text_is_said_whatever_length_is_taken(tmp_path):
    """Chats that are left out, here, of a text with few long windows."""
    path = tmp_path / "a.jsonl"
    roles = ["user"] * 20 + ["system"]
    rows = [{"messages": [{"role": role, "content": "w" * 24}]} for role in roles]
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}"
    )
    request = TextRequest([Source(str(path))], samples=12, held_out=8, length=24)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ready = read(request, tokenizer)
    assert ready.longer is None
    assert ["1 of 21 chats" in str(one.message) for one in told].count(True) == 1
