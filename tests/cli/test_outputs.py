"""What every command does with a place to write to: told before the work, nothing destroyed."""

import os

import pytest

from chai_attention.integrations.transformers import loading

TEXT = ("--text", "text.txt")
# a command up to its output, the option that names it, and a file that it writes there
FILES = {
    "calibrate": (("calibrate", "llama", *TEXT), "--out"),
    "bench attention": (("bench", "attention", "llama"), "--out"),
    "bench attention plot": (("bench", "attention", "llama"), "--plot"),
    "bench model": (("bench", "model", "llama", "--profile", "counts.json"), "--out"),
    "report": (("report", "results.json"), "--out"),
}
FOLDERS = {
    "demo": (("demo", "--model", "llama", *TEXT), "--out", "profile.json"),
    "eval": (("eval", "llama", *TEXT, "--tasks", "perplexity"), "--out", "results.json"),
    "frontier": (("frontier", "llama", *TEXT, "--test", "rows.jsonl"), "--out", "frontier.png"),
    "redundancy": (("redundancy", "llama", *TEXT), "--out", "redundancy.json"),
    "inspect": (("inspect", "counts.json"), "--plot", "elbow.png"),
}


@pytest.fixture(autouse=True)
def _no_work(monkeypatch):
    """Whatever cannot be written is told before a model is loaded."""

    def load(*arguments, **options):
        raise AssertionError("the work began")

    monkeypatch.setattr(loading, "load_model", load)


def refused(chai, *arguments):
    code, out, err = chai(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_written_is_told_before_the_work(chai, tmp_path, name):
    command, option = FILES[name]
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("old")
    for place, word in (
        (".", "it is a folder"),
        ("none/x.json", "no folder"),
        ("file/x.json", "ot a directory"),
        ("fifo", "a FIFO, not a regular file"),
        ("link", "a FIFO, not a regular file"),
        ("loop", "symbolic links"),
        ("n" * 300, "name too long"),
    ):
        assert word in refused(chai, *command, option, tmp_path / place)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file", "link", "loop"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_cannot_be_written_is_told_before_the_work(chai, tmp_path, name):
    command, option, written = FOLDERS[name]
    (tmp_path / "file").write_text("old")
    (tmp_path / "taken").mkdir()
    os.mkfifo(tmp_path / "taken" / written)
    for place, word in (
        ("file", "is no folder"),
        ("file/x", "cannot write to"),
        ("taken", "a FIFO, not a regular file"),
        ("n" * 300, "name too long"),
    ):
        assert word in refused(chai, *command, option, tmp_path / place)
    assert sorted(os.listdir(tmp_path)) == ["file", "taken"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_read_only_place_is_told_before_the_work(chai, tmp_path, monkeypatch, name):
    command, option, *_ = (FILES | FOLDERS)[name]
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    assert "write-protected" in refused(chai, *command, option, tmp_path / "new")


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (("calibrate", "llama", *TEXT, "--out", "./text.txt"), "text.txt"),
        (("calibrate", "llama", *TEXT, "--out", "llama/config.json"), "llama/config.json"),
        (("bench", "attention", "--profile", "counts.json", "--out", "counts.json"), "counts.json"),
        (("bench", "attention", "--out", "same", "--plot", "./same"), "same"),
        (("report", "counts.json", "--out", "./counts.json"), "counts.json"),
        (("report", ".", "--out", "counts.json"), "counts.json"),
        (("eval", "llama", "--tasks", "perplexity", "--text", "run/results.json", "--out", "run"),
         "run/results.json"),
        (("frontier", "llama", *TEXT, "--test", "run/frontier.txt", "--out", "run"),
         "run/frontier.txt"),
        (("redundancy", "llama", "--text", "run/redundancy.json", "--out", "run"),
         "run/redundancy.json"),
        (("demo", "--model", "llama", "--text", "run/profile.json", "--out", "run"),
         "run/profile.json"),
    ],
)  # fmt: skip
def test_an_input_is_never_written_over(chai, folder, arguments, file):
    path = folder / file
    (folder / "run").mkdir(exist_ok=True)
    there = path.exists()
    if file.startswith("run/"):
        path.write_text("Some text. " * 50)
    before = path.read_bytes() if path.exists() else None
    assert "write to another file" in refused(chai, *arguments)
    assert (path.read_bytes() if path.exists() else None) == before
    if not there and path.exists():
        path.unlink()


def test_an_export_that_cannot_be_written_is_told_before_the_work(chai, tmp_path):
    (tmp_path / "file").write_text("old")
    for place in ("file", "file/x", "n" * 300):
        refused(chai, "export", "llama", "--profile", "counts.json", "--out", tmp_path / place)
    assert os.listdir(tmp_path) == ["file"]


def test_a_refit_s_name_that_is_too_long_is_told_before_the_work(chai, tmp_path):
    out = tmp_path / f"{'x' * 235}.json"
    command = ("calibrate", "llama", *TEXT, "--recipe", "default", "--recent", 0)
    message = refused(chai, *command, "--refit", "output", "--out", out)
    assert message.endswith(".safetensors: File name too long\n")


def test_evidence_s_name_that_is_too_long_is_told_before_the_work(chai, tmp_path):
    message = refused(chai, "calibrate", "llama", *TEXT, "--out", tmp_path / f"{'x' * 250}.json")
    assert "cannot write" in message
    assert message.endswith("keeps what it has found so far: File name too long\n")


def test_plots_that_cannot_be_drawn_are_told_before_anything_is_printed(chai, tmp_path):
    message = refused(chai, "inspect", "counts.json", "--json", "--plot", tmp_path)
    assert "no error curves" in message
