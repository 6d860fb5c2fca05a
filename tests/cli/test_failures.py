"""One printable line, whatever an error says."""

import errno
import shutil

import pytest
import torch

from chai_attention.cli.failures import MOST, explain, one_line, require_text
from chai_attention.errors import FileError, ProfileError


def test_line_breaks_and_escapes_do_not_reach_the_terminal():
    assert one_line("a\n  b\x1b[2J\x00\u2028c ü") == "a b\\x1b[2J\\x00 c ü"
    assert one_line("x" * 100_000).startswith("x" * 1000)
    assert len(one_line("x" * 100_000)) <= MOST


def test_errors_of_the_system_and_of_memory_are_told():
    assert explain(ProfileError("why")) == "why"
    told = explain(OSError(errno.ENAMETOOLONG, "File name too long", "nnn"))
    assert told == "nnn: File name too long"
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried\nto")):
        assert "not enough memory" in explain(error)
    for size in (2**50, 2**62):
        with pytest.raises(RuntimeError) as caught:
            torch.empty(size, 4)
        assert "not enough memory" in explain(caught.value)


def test_a_bug_is_not_hidden():
    for error in (RuntimeError("mat1 and mat2"), KeyError("x"), ValueError("y"), OSError(28, "z")):
        assert explain(error) is None


@pytest.mark.parametrize("argument", ["a\0b", "\udcff"])
def test_arguments_that_are_no_text_are_refused(chai, argument):
    with pytest.raises(FileError):
        require_text(["fine", argument])
    code, out, err = chai("inspect", argument)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.isprintable() or err[:-1].isprintable()


@pytest.mark.parametrize(
    "arguments",
    [
        ("calibrate", "llama", "--out", "x", "--blend", "nan"),
        ("calibrate", "llama", "--out", "x", "--max-error", "inf"),
        ("generate", "llama", "--profile", "counts.json", "--temperature", "nan"),
        ("bench", "attention", "--seconds", "inf"),
        ("serve", "llama", "--estimate", "--profile", "counts.json", "--gpu-memory", "nan"),
        ("serve", "llama", "--estimate", "--profile", "counts.json", "--block-size", "0"),
        ("serve", "llama", "--estimate", "--profile", "counts.json", "--max-num-seqs", "0.5"),
        ("calibrate", "llama", "--out", "x", "--text", "text.txt:1e308"),
        ("calibrate", "llama", "--out", "x", "--text", "n" * 300),
        ("inspect", "counts.json", "--model", "n" * 300),
        ("inspect", ""),
    ],
)
def test_numbers_and_names_of_no_use_are_one_line(chai, arguments):
    code, _, err = chai(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_chat_template_that_fails_is_one_line(chai, folder, tmp_path):
    model = shutil.copytree(folder / "llama", tmp_path / "model")
    for template in ("{{ 1 / 0 }}", "{{ raise_exception('a\nb') }}", "{% if %}"):
        (model / "chat_template.jinja").write_text(template)
        code, _, err = chai(
            "generate", model, "--profile", "counts.json", "--chat", "--prompt", "Hi"
        )
        assert (code, err.count("\n")) == (2, 1), err
        assert "the model's chat template cannot render the prompt" in err


def test_memory_that_is_not_there_is_one_line(chai):
    arguments = ("bench", "attention", "llama", "--device", "cpu", "--seconds", "0")
    code, _, err = chai(*arguments, "--case", "decode:1x1000000000000", "--dtype", "float32")
    assert (code, err.count("\n")) == (2, 1), err
    assert "GB, most of it for K and V, more than there is" in err
