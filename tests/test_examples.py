"""The scripts of ``examples/`` run as a person runs them, on a tiny random model."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from transformers import LlamaConfig

from chai_attention.profile import ClusterProfile
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, records of text and a profile that streams, shares and keeps."""
    root = tmp_path_factory.mktemp("examples")
    tiny_model("llama").save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    texts = [f"Record {i} of some data, {i * i} and so on.\n" * 5 for i in range(40)]
    (root / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    ClusterProfile(
        (2, 5, 6),
        membership="static",
        representatives=((0, 0, 0, 3, 3, 5), (0, 0, 2, 3, 4, 5), tuple(range(6))),
        streaming=((5,), (), ()),
        recent=4,
        sinks=2,
    ).save(root / "profile.json")
    return root


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """What a command prints; it finds this checkout's package."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src"), **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_listed_and_tested_here() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    here = Path(__file__).read_text()
    for script in EXAMPLES.iterdir():
        if script.suffix in (".py", ".sh"):
            assert f"]({script.name})" in listed
            assert f'EXAMPLES / "{script.name}"' in here


def test_calibrate_on_own_data_writes_a_profile_that_generates(folder: Path) -> None:
    out = run(
        *(sys.executable, EXAMPLES / "calibrate.py", "--model", "model", "--text", "data.jsonl"),
        *("--length", "48", "--samples", "4", "--held-out", "8", "--out", "own.json"),
        cwd=folder,
    )
    profile = ClusterProfile.load(folder / "own.json")
    assert str(profile.clusters) in out
    assert f"saved: {profile.promise['saved']:.1%}" in out
    assert f"kept back: {profile.promise['rise']:+.2%}" in out


def test_generate_says_what_the_cache_saves(folder: Path) -> None:
    out = run(
        *(sys.executable, EXAMPLES / "generate.py", "--model", "model"),
        *("--profile", "profile.json", "--prompt", "Once upon a time " * 5),
        cwd=folder,
    )
    assert out.startswith("full:")
    assert "\nclustered:" in out
    saved = float(out.rpartition("(")[2].removesuffix("% saved)\n"))
    assert 5 < saved < 60


def test_serve_tells_what_it_will_gain(folder: Path) -> None:
    LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(
        folder / "seven"
    )
    out = run(EXAMPLES / "serve.sh", "seven", "llama-7b", cwd=folder, ESTIMATE_ONLY="1")
    assert "with clusters" in out
    assert "(19.1% saved)" in out


class _Server(BaseHTTPRequestHandler):
    """Answers as the server of the OpenAI API does."""

    def log_message(self, *_: object) -> None:
        """Be quiet."""

    def _send(self, kind: str, body: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self._send("application/json", json.dumps({"data": [{"id": "tiny"}]}))

    def do_POST(self) -> None:
        assert self.path == "/v1/completions"
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == "tiny"
        pieces = [json.dumps({"choices": [{"text": word}]}) for word in ("so ", asked["prompt"])]
        events = [f"data: {piece}\n\n" for piece in (*pieces, "[DONE]")]
        self._send("text/event-stream", "".join(events))


def test_client_writes_a_streamed_answer(folder: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        out = run(
            *(sys.executable, EXAMPLES / "client.py", "--prompt", "it is", "--url", url),
            cwd=folder,
            no_proxy="127.0.0.1",
        )
        server.shutdown()
    assert out == "so it is\n"
