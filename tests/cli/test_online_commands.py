"""``chai generate`` and ``chai demo`` as a person runs them, mistakes included."""

import re

import pytest

from chai_attention.evaluation.demo import built_in_text
from chai_attention.profile import ClusterProfile


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


def test_generate_counts_the_weights_of_removed_heads(chai, folder):
    rows = ((4, 5, 5, 5, 4, 5), (0, 1, 2, 3, 4, 5), (2, 4, 2, 3, 4, 2))
    ClusterProfile((2, 6, 3), "static", representatives=rows).save(folder / "static.json")
    code, out, _ = chai("generate", "llama", "--profile", "static.json", "--prompt", "Some words")
    assert code == 0
    assert f"not computed: {2 * (4 + 3) * 8 * 48 * 4:,} bytes" in out  # Q and K of 7 heads


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
