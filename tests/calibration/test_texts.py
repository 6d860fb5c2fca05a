"""Sample text: files, windows, and what a model writes itself."""

import json

import datasets
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from chai_attention.calibration import load_texts, self_text, texts, token_text, windows_of
from chai_attention.calibration.texts import beginning
from chai_attention.errors import CalibrationError
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("Grüße.\n\nTwo.\n", encoding="utf-8")
    assert load_texts(str(path), tokens=10) == ["Grüße.\n\nTwo.\n"]


def test_json_lines_give_the_text_or_the_longest_string(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"id": "a long identifier", "text": "short"}, {"q": "why?", "passage": "because so"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    with pytest.warns(UserWarning, match="'passage' is taken"):
        assert load_texts(str(path), tokens=10) == ["short", "because so"]


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "as text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"n": 3}\n', "line 2 has no text field"),
        ("a.jsonl", b"[1, 2]\n", "line 1 has no text field"),
        ("a.jsonl", b'{"text": " "}\n', "holds no text"),
    ],
)
def test_useless_files_are_refused(name, contents, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(contents)
    with pytest.raises(CalibrationError, match=message) as caught:
        load_texts(str(path), tokens=10)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("source", ["none.txt", "none.jsonl", "./none", "/none/at/all"])
def test_a_missing_file_is_not_looked_up_on_the_hub(source, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(CalibrationError, match="no such text file"):
        load_texts(source, tokens=10)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(CalibrationError, match="is a folder"):
        load_texts(str(tmp_path), tokens=10)


def test_a_data_set_is_streamed_until_there_is_enough(monkeypatch):
    asked, read = [], []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        for i in range(1000):
            read.append(i)
            yield {"url": "x", "text": "hundred " * 12 + "abcd"}

    monkeypatch.setattr(texts, "require_dataset", lambda name, error: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    got = load_texts("org/some-data.v1:english", tokens=100)
    assert asked == [(("org/some-data.v1", "english"), {"split": "train", "streaming": True})]
    assert len(read) < 20
    assert len("".join(got)) >= 100


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route to host\nwith many\nlines")

    monkeypatch.setattr(texts, "require_dataset", lambda name, error: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CalibrationError, match=r"neither a file.*no route") as caught:
        load_texts("org/data", tokens=10)
    assert "\n" not in str(caught.value)


def test_windows_are_the_text_cut_in_pieces():
    text = "abcdefghijklmnopqrstuvwxyz"
    windows = windows_of(text, TOKENIZER, samples=10, length=8, seed=0)
    assert TOKENIZER.batch_decode(windows) == ["abcdefgh", "ijklmnop", "qrstuvwx"]


def test_documents_are_joined_by_the_end_of_text():
    windows = windows_of(["abc", " \n", "defg"], TOKENIZER, samples=9, length=8, seed=0)
    assert TOKENIZER.batch_decode(windows) == ["abc</s>defg"]


def test_the_seed_spreads_the_windows_over_the_text():
    text = "".join(chr(ord("a") + i % 26) for i in range(26 * 400))
    tokens = windows_of(text, TOKENIZER, samples=1000, length=13, seed=0)
    whole = {tuple(row.tolist()): None for row in tokens}
    picked = [windows_of(text * 2, TOKENIZER, samples=50, length=26 * 8, seed=s) for s in (0, 0, 1)]
    assert torch.equal(picked[0], picked[1])
    assert len(whole) == 2  # the alphabet's halves: windows do not overlap and none is lost
    numbered = windows_of("".join(f"{i:04d}" for i in range(1000)), TOKENIZER, 20, 4, seed=3)
    order = [int(TOKENIZER.decode(row)) for row in numbered]
    assert order == sorted(order)
    assert order[0] < 200
    assert order[-1] >= 800
    other = windows_of("".join(f"{i:04d}" for i in range(1000)), TOKENIZER, 20, 4, seed=4)
    assert not torch.equal(numbered, other)


@pytest.mark.parametrize("text", ["", "abc", ["a", "b"]])
def test_too_short_a_text_says_how_much_is_needed_and_found(text):
    with pytest.raises(CalibrationError, match=r"at least 16 tokens.*has (0|3)$"):
        windows_of(text, TOKENIZER, samples=4, length=16, seed=0)


def with_bos():
    """A tokenizer that puts <s> before every text, as those of Gemma and LLaMA do."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def test_every_window_begins_as_the_tokenizer_begins_a_text():
    """A model like Gemma is no model without: its perplexity is some hundred times as high."""
    tokenizer = with_bos()
    assert beginning(tokenizer) == [1]
    assert beginning(TOKENIZER) == []
    windows = windows_of("abcdefghijklmn", tokenizer, samples=10, length=5, seed=0)
    assert tokenizer.batch_decode(windows) == ["<s>abcd", "<s>efgh", "<s>ijkl"]
    with pytest.raises(CalibrationError, match=r"at least 15 tokens.*has 14"):
        windows_of("abcdefghijklmn", tokenizer, samples=1, length=16, seed=0)


def test_a_template_that_writes_the_beginning_out_gives_no_second_one():
    windows = windows_of(["<s>abc</s>", "<s>defg"], with_bos(), samples=9, length=9, seed=0)
    assert with_bos().batch_decode(windows) == ["<s>abc</s>defg"]


def test_a_long_text_is_turned_into_tokens_piece_by_piece(monkeypatch):
    text = "".join(f"word {i}\n" for i in range(900))
    whole = windows_of(text, TOKENIZER, samples=10**6, length=7, seed=0)
    lengths = []
    monkeypatch.setattr(token_text, "PIECE", 100)

    def counting(piece, **options):
        lengths.append(len(piece))
        return TOKENIZER(piece, **options)

    counting.eos_token_id = None
    assert torch.equal(windows_of(text, counting, samples=10**6, length=7, seed=0), whole)
    assert max(lengths) <= 100


@pytest.mark.parametrize("seed", [-1, 2**64, 10**30])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(CalibrationError, match="a seed is a whole number"):
        windows_of("abcdef" * 9, TOKENIZER, 2, 2, seed=seed)
    with pytest.raises(CalibrationError, match="a seed is a whole number"):
        self_text(tiny_model("llama"), 2, 4, seed=seed)


def test_a_model_of_nan_writes_no_text():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=r"weight model\.layers\.1.*v_proj.* holds NaN"):
        self_text(model, 2, 4)


def test_a_model_in_training_writes_without_dropout():
    model = tiny_model("gpt2")
    model.generation_config.bos_token_id = 1
    want = self_text(model, 2, 12)
    assert torch.equal(self_text(model.train(), 2, 12), want)
    assert model.training


def test_ready_windows_are_taken_as_they_are():
    windows = torch.arange(60).view(4, 15)
    assert torch.equal(windows_of(windows, TOKENIZER, 10, 12, seed=0), windows[:, :12])
    assert windows_of(windows, TOKENIZER, 2, 12, seed=0).shape == (2, 12)
    for bad in (windows[:, :5], windows[:0], windows[0], windows.float()):
        with pytest.raises(CalibrationError, match="int64 tensor of token ids"):
            windows_of(bad, TOKENIZER, 10, 12, seed=0)


@pytest.mark.parametrize("samples", [0, -1])
def test_no_samples_is_refused(samples):
    with pytest.raises(CalibrationError, match="at least 1 sample"):
        windows_of("abc", TOKENIZER, samples, 2, seed=0)
    with pytest.raises(CalibrationError, match="at least 1 sample"):
        self_text(tiny_model("llama"), samples, 4)


def test_a_model_writes_its_own_text():
    model = tiny_model("llama")
    state = torch.get_rng_state()
    told = []
    first = self_text(
        model, 5, 12, seed=3, batch_size=2, progress=lambda done, total: told.append((done, total))
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (5, 12)
    assert first[:, 0].eq(1).all()  # begins with the beginning-of-sequence token
    assert len({tuple(row.tolist()) for row in first}) == 5
    assert torch.equal(first, self_text(model, 5, 12, seed=3, batch_size=2))
    assert not torch.equal(first, self_text(model, 5, 12, seed=4, batch_size=2))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_a_model_without_a_token_to_begin_with():
    model = tiny_model("llama")
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(CalibrationError, match="no token to begin with"):
        self_text(model, 2, 4)


def test_the_name_of_a_file_is_not_calibrated_on(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text " * 100)
    with pytest.raises(CalibrationError, match="is the name of a file, not text: load_texts"):
        windows_of(str(path), tiny_tokenizer(), 1, 4, 0)
    for other in (path, None, [1], {"text": "a"}):
        with pytest.raises(CalibrationError, match="text is a string, a list of strings"):
            windows_of(other, tiny_tokenizer(), 1, 4, 0)
