"""``chai generate`` and ``chai demo`` as a person runs them, mistakes included."""

import io
import json
import re
import sys
import types

import pytest

from chai_attention.evaluation.demo import built_in_text
from chai_attention.profile import ClusterProfile

PROMPT = ("generate", "llama", "--profile", "counts.json", "--prompt")


def test_generate_writes_text_and_counts_bytes(chai):
    code, out, _ = chai(
        "generate", "llama", "--profile", "counts.json", "--prompt", "Some words to go on from, "
        "more than the window of thirty-two tokens.", "--max-new-tokens", "40",
    )  # fmt: skip
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith("│ CHAI"))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    key, value = (int(cell.replace(",", "")) for cell in cells[4:6])
    assert key * 18 == value * 11  # clusters 2 + 6 + 3 of 3 x 6 heads
    assert re.fullmatch(r"\d+\.\d%", cells[6])
    assert "ms" in cells[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama", "--profile", "other.json", "--prompt", "Hi"], "2 layers in the profile"),
        (["llama", "--profile", "none.json", "--prompt", "Hi"], "no profile 'none.json'"),
        (["llama", "--profile", "counts.json", "--prompt", " "], "prompt is empty"),
        (["llama", "--profile", "counts.json", "--prompt", "Hi", "--chat"], "no chat template"),
        (["bloom", "--profile", "counts.json", "--prompt", "Hi"], "attention interface"),
        (["nowhere/x", "--profile", "counts.json", "--prompt", "Hi"], "no model 'nowhere/x'"),
        (["llama", "--profile", "llama-7b", "--prompt", "Hi"], "layers is 32 in the profile"),
    ],
)
def test_mistakes_are_one_line(chai, arguments, message):
    code, _, err = chai("generate", *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert message in err


WORDS = "Some words to go on from, more than the window of thirty-two tokens."
GENERATE = ("generate", "llama", "--profile", "counts.json", "--max-new-tokens", 12)


@pytest.fixture
def typed(monkeypatch):
    """What is piped in."""

    def pipe(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return pipe


def test_a_prompt_can_be_piped_in(chai, typed):
    want = chai(*GENERATE, "--quiet", "--prompt", WORDS)
    assert want[0] == 0
    for more, content in (
        ((), WORDS.encode() + b"\n"),
        (("--prompt", "-"), b"\xef\xbb\xbf" + WORDS.encode() + b"\r\n"),
    ):
        typed(content)
        assert chai(*GENERATE, "--quiet", *more) == want


def test_what_is_piped_in_must_be_text(chai, typed):
    for content, message in ((b"\xff\xfe", "not UTF-8"), (b"", "prompt is empty")):
        typed(content)
        code, _, err = chai(*GENERATE)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_a_terminal_is_not_waited_for(chai, monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    code, _, err = chai(*GENERATE)
    assert (code, err) == (2, "error: no prompt: give --prompt, or pipe one in\n")


def test_quiet_prints_the_text_alone(chai):
    _, loud, _ = chai(*GENERATE, "--prompt", WORDS)
    code, text, err = chai(*GENERATE, "--prompt", WORDS, "--quiet")
    assert (code, err) == (0, "")
    assert loud.startswith(text)
    assert "TTFT" in loud
    assert "TTFT" not in text
    found = json.loads(chai(*GENERATE, "--prompt", WORDS, "--json")[1])
    assert found["runs"]["CHAI"]["text"] == text.removesuffix("\n")
    assert found["runs"]["CHAI"]["tokens"] == 12


def test_compare_sets_the_plain_model_beside_clustered_heads(chai, folder):
    ClusterProfile((6, 6, 6)).save(folder / "whole.json")
    same = ("generate", "llama", "--profile", "whole.json", "--max-new-tokens", 12)
    code, out, err = chai(*same, "--prompt", WORDS, "--compare")
    assert (code, err) == (0, "")
    assert "both texts are the same" in out
    assert "K,V bytes 1.00x" in out
    found = json.loads(chai(*GENERATE, "--prompt", WORDS, "--compare", "--json")[1])["runs"]
    plain, clustered = found["full model"], found["CHAI"]
    assert plain["memory"]["saved"] == 0
    memory = clustered["memory"]
    assert memory["key_bytes"] * 18 == memory["full_key_bytes"] * 11
    alone = json.loads(chai(*GENERATE, "--prompt", WORDS, "--json")[1])["runs"]
    assert clustered["text"] == alone["CHAI"]["text"]


def test_compare_says_where_texts_part(chai):
    out = chai(*GENERATE, "--prompt", WORDS, "--compare")[1]
    rows = [line for line in out.splitlines() if line.startswith(("│ full model", "│ CHAI"))]
    assert len(rows) == 2
    assert re.search(r"the texts differ after \d+ characters|both texts are the same", out)
    assert re.search(r"time per token \d+\.\d\dx", out)


def test_the_profile_of_an_exported_model_is_found(chai, folder, tmp_path):
    assert chai("export", "llama", "--profile", "counts.json", "--out", tmp_path / "m")[0] == 0
    ask = ("--prompt", WORDS, "--max-new-tokens", 12, "--quiet")
    assert chai("generate", tmp_path / "m", *ask) == chai(*GENERATE, *ask)
    code, _, err = chai("generate", "llama", *ask)
    assert (code, err.count("\n")) == (2, 1)
    assert "llama has no chai_profile.json: give --profile" in err


def test_demo(chai, folder):
    code, out, _ = chai(
        "demo", "--model", "llama", "--text", "text.txt", "--max-new-tokens", "8", "--out", "demo"
    )
    assert code == 0
    assert "full model" in out
    assert "with CHAI" in out
    assert "perplexity on held-out text" in out
    assert "Quality cost" in out
    profile = ClusterProfile.load(folder / "demo" / "profile.json")
    assert profile.provenance["text"] == "text.txt"
    for name in ("elbow.png", "similarity.png"):
        assert (folder / "demo" / name).read_bytes().startswith(b"\x89PNG")
        assert name in out


def test_the_demo_s_own_text_is_prose():
    texts = built_in_text()
    assert len(texts) > 20
    assert sum(map(len, texts)) > 200_000


def test_a_prompt_longer_than_the_model_reads_is_refused(chai):
    code, out, err = chai(*PROMPT, "a" * 300)
    assert (code, out) == (2, "")
    assert "the prompt has 300 tokens, and this model reads at most 256: shorten it" in err


def test_no_more_is_written_than_the_model_reads(chai):
    code, out, err = chai(*PROMPT, "a" * 200, "--json")
    assert code == 0
    assert json.loads(out)["runs"]["CHAI"]["tokens"] <= 56
    assert err == "warning: this model reads at most 256 tokens: at most 56 new ones are written\n"


def test_a_temperature_that_nothing_can_be_divided_by_is_refused(chai):
    code, out, err = chai(*PROMPT, "a", "--temperature", "1e-320")
    assert (code, out) == (2, "")
    assert "a temperature is 0 (greedy) or at least 1e-06" in err
