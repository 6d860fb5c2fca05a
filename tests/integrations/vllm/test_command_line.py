"""Options are read as vLLM's own parser reads them; no vLLM needed but for the last test."""

import importlib.util
import json
from pathlib import Path

import pytest

from chai_attention.errors import ProfileError
from chai_attention.integrations.vllm.command_line import KNOWN, Options


@pytest.mark.parametrize(
    "words",
    [
        "--block-size 32",
        "--block_size 32",
        "--block-size=32",
        "--block_size=32",
        "--block 32",
        "--block-size 16 --port 1 --block-size 32",
        "--config {file}",
        "--block-size 32 --config {file16}",
    ],
)
def test_spellings_of_a_value(words: str, tmp_path: Path) -> None:
    for name, value in (("file", 32), ("file16", 16)):
        (tmp_path / f"{name}.yaml").write_text(f"port: 1\nblock-size: {value}\n")
    words = words.format(file=tmp_path / "file.yaml", file16=tmp_path / "file16.yaml")
    assert Options(words.split()).number("--block-size", 0) == 32


def test_switches() -> None:
    name = "--enable-prefix-caching"
    assert Options([]).switch(name) is None
    assert Options([name]).switch(name) is True
    assert Options(["--no_enable_prefix_caching"]).switch(name) is False
    assert Options([name, "--no-enable-prefix-caching"]).switch(name) is False
    assert Options(["--no-enable-pre", "--port", "1"]).switch(name) is False


@pytest.mark.parametrize(
    "words",
    [
        ["--attention-config", '{"backend": "TRITON_ATTN"}'],
        ["--attention_config", '{"backend": "TRITON_ATTN"}'],
        ["-ac", '{"backend": "TRITON_ATTN"}'],
        ["--attention-config.backend", "TRITON_ATTN"],
        ["-ac.backend=TRITON_ATTN"],
    ],
)
def test_objects_whole_and_by_their_parts(words: list[str]) -> None:
    assert Options(words).mapping("--attention-config") == {"backend": "TRITON_ATTN"}


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["x", "1"], {"x": 1}),
        (["x.y", "0.5", "x.z", "true"], {"x": {"y": 0.5, "z": True}}),
        (["x", "[1, 2]", "y", "a b"], {"x": [1, 2], "y": "a b"}),
        (["x", "2k", "y", "1T", "z", "task"], {"x": 2000, "y": 2**40, "z": "task"}),
        (["x+", "a,b", "x+", "c"], {"x": ["a", "b", "c"]}),
        (["x", "1", "x.y", "2"], {"x": {"y": 2}}),
    ],
)
def test_parts_of_an_object_keep_the_types_that_vllm_gives_them(words, value) -> None:
    names, values = words[::2], words[1::2]
    given = [
        word
        for name, each in zip(names, values, strict=True)
        for word in (f"--additional-config.{name}", each)
    ]
    assert Options(given).mapping("--additional-config") == value
    if importlib.util.find_spec("vllm") is not None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        assert parser.parse_args(given).additional_config == value


def test_a_part_without_a_value_is_one_line() -> None:
    with pytest.raises(ProfileError, match=r"--additional-config\.x needs a value"):
        Options(["--additional-config.x"]).mapping("--additional-config")


def test_objects_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("additional-config:\n  x: {y: 1}\nenable-prefix-caching: false\n")
    options = Options(["--config", str(file)])
    assert options.mapping("--additional-config") == {"x": {"y": 1}}
    assert options.switch("--enable-prefix-caching") is False
    assert options.without("--additional-config") == ["--config", str(file)]


def test_taken_out() -> None:
    words = ["--port", "1", "--additional_config", "{}", "--seed=3", "--additional-config={}", "x"]
    assert Options(words).without("--additional-config") == ["--port", "1", "--seed=3", "x"]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for words, line in (
        (["--block-size", "many"], "--block-size is a number, not 'many'"),
        (["--block-size", "1e999"], "--block-size is a number"),
        (["--block-size", "nan"], "--block-size is a number"),
    ):
        with pytest.raises(ProfileError, match=line):
            Options(words).number("--block-size", 0)
    for value in ("0", "-1", "2.5"):
        with pytest.raises(ProfileError, match="--block-size is a whole number from 1 on"):
            Options([f"--block-size={value}"]).count("--block-size", 1)
    assert Options([]).count("--block-size", 0) == 0
    for text, line in (("[1]", "JSON object"), ("{", "not JSON"), ("[" * 99999, "not JSON")):
        with pytest.raises(ProfileError, match=line):
            Options(["--additional-config", text]).mapping("--additional-config")
    bad = tmp_path / "bad.yaml"
    for content, line in (("a: [", "cannot read"), ("- a", "must hold names"), ("", "must hold")):
        bad.write_text(content)
        with pytest.raises(ProfileError, match=line):
            Options(["--config", str(bad)])
    with pytest.raises(ProfileError, match="No such file"):
        Options(["--config", str(tmp_path / "none.yaml")])


def test_every_option_is_one_of_vllms_and_none_begins_another() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM, which `make test-vllm` installs into an environment of its own")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    actions = parser._option_string_actions
    for name, short in KNOWN.items():
        if name == "--config":  # the server's
            continue
        assert name in actions
        assert short is None or actions[short] is actions[name]
        begun = [other for other in actions if name.startswith(other) and other != name]
        assert set(begun) <= set(KNOWN)
    words = ["--max_num_seq", "3", "--block-size=16", "--block_size", "32", "-ac.backend", "CUSTOM",
             "--additional-conf", json.dumps({"a": 1})]  # fmt: skip
    found, own = parser.parse_args(words), Options(words)
    assert found.max_num_seqs == own.number("--max-num-seqs", 0) == 3
    assert found.block_size == own.number("--block-size", 0) == 32
    assert found.additional_config == own.mapping("--additional-config") == {"a": 1}
    assert found.attention_config.backend.name == own.mapping("--attention-config")["backend"]
