"""The help of every command: fast, and with every word that was written."""

import json
import re
import subprocess
import sys

import pytest
import typer
from typer import rich_utils

from chai_attention.cli import app

ROOT = typer.main.get_command(app)


def _commands(command=ROOT, path=()):
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, (*path, name))


COMMANDS = dict(_commands())


def _words(text):
    return " ".join(re.sub("[│─╭╮╰╯]", " ", text).split())


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_shows_every_word_default_and_bracket(chai, monkeypatch, path):
    monkeypatch.setattr(rich_utils, "MAX_WIDTH", 400)  # a column is wrapped at 80
    code, shown, err = chai(*path, "--help")
    assert (code, err) == (0, "")
    shown = _words(shown)
    assert "[default: ]" not in shown
    for param in COMMANDS[path].params:
        help_text = getattr(param, "help", None) or ""
        assert _words(help_text).replace("\\[", "[") in shown
        assert "[default:" not in help_text  # rich takes brackets in a help text for markup
        if isinstance(getattr(param, "show_default", None), str):
            assert f"[default: ({param.show_default})]" in shown


def test_defaults_that_a_profile_or_a_model_decides_are_shown(chai, monkeypatch):
    monkeypatch.setattr(rich_utils, "MAX_WIDTH", 400)
    shown = _words(chai("calibrate", "--help")[1])
    samples = "Sequences of text to use. [default: (64 with streaming heads, 256 with cost "
    assert f"{samples}gradient, else 1024)]" in shown
    assert "such as 1%. [default: (1% with recipes default, share and stream)]" in shown


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_short_h_is_help(chai, path):
    assert chai(*path, "-h") == chai(*path, "--help")


@pytest.mark.parametrize(
    "path", [path for path in COMMANDS if hasattr(COMMANDS[path], "commands")], ids=str
)
def test_a_group_without_a_command_shows_its_help(chai, path):
    code, shown, err = chai(*path)
    assert (code, err) == (0, "")
    assert shown.strip() == chai(*path, "--help")[1].strip()


def test_help_and_version_import_nothing_heavy():
    script = (
        "import json, sys\n"
        "from chai_attention.cli import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    sys.argv[1:] = arguments\n"
        "    try:\n        main()\n"
        "    except SystemExit as ended:\n        assert not ended.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'huggingface_hub', 'scipy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    asked = [[*path, "--help"] for path in COMMANDS] + [["--version"]]
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(asked)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
