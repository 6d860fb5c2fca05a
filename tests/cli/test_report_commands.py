"""``chai redundancy`` and ``chai report``."""

import pytest

from result_files import load_redundancy

TEXT = ("--text", "text.txt")
SMALL = ("--samples", "3", "--length", "24", "--show", "1", "--cells", "8")


def test_a_study_and_its_page(chai, tmp_path):
    pytest.importorskip("matplotlib")
    prompt = ("--prompt", "some words to look at")
    code, out, err = chai(
        "redundancy", "llama-grouped", *TEXT, *SMALL, *prompt, "--lengths", "4,10", "--clusters", 2,
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "llama-grouped: 3 requests of 24 tokens" in out
    found = load_redundancy(tmp_path / "run" / "redundancy.json")
    assert found.lengths == [4, 10, 24]
    assert [one.name for one in found.prompts] == ["request 1", "some words to look at"]
    assert [one.clusters for one in found.layers] == [2, 2, 2]
    assert found.text["sources"] == ["text.txt:1"]
    for name in ("correlation.png", "elbow.png", "sizes.png", "stability.png"):
        assert str(tmp_path / "run" / name) in out
        assert (tmp_path / "run" / name).stat().st_size > 0
    code, out, err = chai("report", tmp_path / "run", "--out", tmp_path / "page.html",
                          "--title", "My page")  # fmt: skip
    assert (code, err) == (0, "")
    assert f"page written to {tmp_path / 'page.html'}" in out
    assert "<h1>My page</h1>" in (tmp_path / "page.html").read_text()
    other = tmp_path / "run" / "other.json"
    other.write_text("{}")
    code, _, err = chai("report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert (code, err) == (0, f"left out {other}: no result of a chai command of this release\n")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("redundancy", "llama", *TEXT, *SMALL, "--lengths", "9,4"), "ascending"),
        (("redundancy", "llama", *TEXT, *SMALL, "--lengths", "x"), "whole numbers"),
        (("redundancy", "llama", *TEXT, *SMALL, "--clusters", "7"), "1 to 6"),
        (("redundancy", "llama", *TEXT, "--length", "999"), "at most 256"),
        (("redundancy", "llama", "--text", "short.txt"), "at least 256 tokens"),
        (("redundancy", "llama", *TEXT, *SMALL, "--prompt", "x"), "2 to 24"),
        (("redundancy", "bloom", *TEXT, *SMALL), "bloom"),
        (("report", "text.json"), "text.json is damaged, not JSON"),
        (("report", "counts.json"), "counts.json is none of what"),
        (("report", "missing.json"), "cannot read missing.json"),
    ],
)
def test_mistakes_are_one_line(chai, tmp_path, arguments, reason):
    code, _, err = chai(*arguments, "--out", tmp_path / "out")
    assert code == 2
    assert err.startswith("error: ")
    assert reason in err
    assert err.count("\n") == 1
