"""Names of models and data sets, with a hub that is not there, knows nothing, or answers."""

import http.server
import json
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from transformers import dynamic_module_utils

from chai_attention import hub
from chai_attention.calibration.request import TextRequest
from chai_attention.calibration.sources import parse_sources
from chai_attention.errors import CalibrationError, LoadError
from chai_attention.integrations.transformers.loading import load_model
from chai_attention.runtime.skeleton import load_config

CHAI = ("-c", "from chai_attention.cli import main; main()")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.txt").write_text("some words " * 500)
    (tmp_path / "profile.json").write_text('{"clusters": [1]}')
    (tmp_path / "data").mkdir()
    return tmp_path


@contextmanager
def _hub(answers):
    """A hub on this machine: status and body of every path; what was asked of it."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith(("/api/models/", "/api/datasets/")):
                asked.append((self.command, self.path))
            status, body = answers.get(self.path.partition("?")[0], (404, {}))
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(json.dumps(body).encode())

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def _run(folder, endpoint, *arguments, **more):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, capture_output=True, text=True,
        env={"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "cache"), "PYTHONPATH": ":".join(
            filter(None, sys.path)), **more},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


GENERATE = ("generate", "--profile", "profile.json", "--prompt", "x")


def test_a_hub_that_is_not_there_is_asked_once_and_one_line(folder):
    code, _, err = _run(folder, "http://127.0.0.1:9", *CHAI, *GENERATE, "org/model")
    assert code == 2
    assert err.startswith("error: no model 'org/model' here, and the hub cannot be reached (")
    assert err.count("\n") == 1


def test_offline_mode_is_one_line(folder):
    code, _, err = _run(
        folder, "http://127.0.0.1:9", *CHAI, *GENERATE, "org/model", HF_HUB_OFFLINE="1"
    )
    assert (code, err.count("\n")) == (2, 1)
    assert "offline" in err.lower()


def test_a_name_that_the_hub_does_not_know_is_one_question_and_one_line(folder):
    with _hub({}) as (endpoint, asked):
        code, _, err = _run(folder, endpoint, *CHAI, *GENERATE, "org/model")
    assert asked == [("GET", "/api/models/org/model")]
    assert (code, err.count("\n")) == (2, 1)
    assert "neither a folder here nor a model of the hub" in err


def test_a_data_set_that_nobody_has_is_found_out_before_a_model_loads(monkeypatch):
    monkeypatch.setattr(hub, "_answer", lambda kind, name: (False, f"no {kind} {name}"))
    request = TextRequest(parse_sources(["org/data:config"]))
    with pytest.raises(
        CalibrationError, match=r"org/data:config is neither .* no dataset org/data"
    ):
        request.check()
    monkeypatch.setattr(hub, "_answer", lambda kind, name: (None, "no route to host"))
    with pytest.raises(CalibrationError, match=r"cannot be reached \(no route to host\)"):
        request.check()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.txt", "this is another file"),
        ("profile.json", "this is another file"),
        ("data", "holds no config.json"),
        ("none.gguf", "no such file"),
        ("a/b/c", "no name there is like this"),
        ("./none", "no name there is like this"),
        ("/none/at/all", "no name there is like this"),
        ("", "no name there is like this"),
        (" ", "no name there is like this"),
        ("nul\0", "no name there is like this"),
        ("long" * 2000, "no name there is like this"),
    ],
)
def test_what_is_here_and_what_no_hub_has_is_not_asked_for(folder, monkeypatch, name, message):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LoadError, match=message):
        hub.find_model(name)


def test_a_copy_of_a_model_serves_while_the_hub_is_away(folder):
    commit = "a" * 40
    home = folder / "cache" / "hub" / "models--org--model"
    (home / "snapshots" / commit).mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots" / commit / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 4})
    )
    script = "from chai_attention.hub import find_model; print(find_model('org/model'))"
    assert _run(folder, "http://127.0.0.1:9", "-c", script) == (0, "True\n", "")


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "", "1x", "0,5"])
def test_a_bad_weight_of_a_file_is_no_data_set(folder, monkeypatch, weight):
    monkeypatch.chdir(folder)
    with pytest.raises(CalibrationError, match=r"its weight .* is not a positive number"):
        parse_sources([f"text.txt:{weight}"])


def test_code_of_a_model_is_not_run_unasked(folder, monkeypatch):
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}})
    )
    (folder / "model" / "own.py").write_text(
        "import transformers\n"
        f"open({str(folder / 'ran')!r}, 'w').close()\n"
        "class OwnConfig(transformers.LlamaConfig):\n    model_type = 'own'\n"
    )
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))
    monkeypatch.syspath_prepend(folder / "modules")
    with pytest.raises(LoadError, match="add --trust-remote-code") as caught:
        load_config(str(folder / "model"))
    assert "\n" not in str(caught.value)
    assert not (folder / "ran").exists()
    assert load_config(str(folder / "model"), trust_remote_code=True).model_type == "own"
    assert (folder / "ran").exists()


@pytest.mark.parametrize("device", ["meta", "abacus", "cuda:99", ""])
def test_a_device_that_cannot_hold_results_is_refused_before_anything_loads(folder, device):
    with pytest.raises(LoadError, match=f"--device {device} cannot be used here: "):
        load_model(str(folder / "none"), device=device)
