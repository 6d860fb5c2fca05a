"""What holds for every command: the version, completion, interrupts, an output that is full."""

import os
import resource
import subprocess
import sys
from importlib.metadata import version

import pytest

CHAI = (sys.executable, "-c", "from chai_attention.cli import main; main()")


def test_version(chai):
    assert chai("--version") == (0, f"chai-attention {version('chai-attention')}\n", "")


def test_a_full_output_is_one_line_and_exit_code_2(folder, tmp_path):
    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    with open(tmp_path / "full", "wb") as out:
        done = subprocess.run(
            [*CHAI, "inspect", "counts.json"],
            cwd=folder, stdout=out, stderr=subprocess.PIPE, text=True, preexec_fn=little_room,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: cannot write the output: File too large\n"


def test_a_reader_that_leaves_ends_it_without_a_word(folder):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as out:
        done = subprocess.run(
            [*CHAI, "inspect", "counts.json"], cwd=folder, stdout=out, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("chai cal", {"calibrate"}),
        ("chai bench ", {"attention", "model"}),
        ("chai generate --prof", {"--profile"}),
        ("chai generate llama --dtype b", {"bfloat16"}),
        ("chai generate llama --device c", {"cpu", "cuda"}),
        ("chai inspect llama", {"llama-7b", "llama-33b"}),
    ],
)
def test_the_shell_completes(chai, monkeypatch, capsys, words, offered):
    monkeypatch.setenv("_CHAI_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    code, out, err = chai()
    assert (code, err) == (0, "")
    assert set(out.split()) == offered


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_outputs_break_nothing(folder, closed):
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *CHAI, "inspect", "counts.json"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_without_standard_error_an_error_is_not_among_the_results(folder):
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *CHAI, "inspect", "nothing", "--json"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")


def test_a_second_interrupt_prints_no_trace():
    """Libraries do things when Python ends, and impatient people interrupt those too."""
    code = (
        "import atexit, os, signal\n"
        "from chai_attention import cli\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "def interrupted(*arguments, **options): raise KeyboardInterrupt\n"
        "cli.app = interrupted\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")
