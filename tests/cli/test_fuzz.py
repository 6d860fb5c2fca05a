"""Whatever is in a file or on a command line: success or one line, and nothing is destroyed.

Hypothesis makes up profile files, text files and command lines. The commands run in this process
and know nothing of it, but that a model is loaded once. The cases are the same in every run.
"""

import contextlib
import hashlib
import io
import json
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chai_attention import cli
from chai_attention.integrations.transformers import disable, loading
from chai_attention.profile import ClusterProfile

pytestmark = pytest.mark.exhaustive
SECONDS = 60  # of one case, which takes a fraction of one
OLD = b"this was here before"
PROFILE = ClusterProfile(
    (2, 6, 3),
    "static",
    representatives=((0, 0, 0, 3, 3, 3), (0, 1, 2, 3, 4, 5), (0, 1, 2, 0, 1, 2)),
    recent=2,
    sinks=1,
    offsets=(((0.5,) * 6,) * 6,) * 3,
    model={"architecture": "llama", "layers": 3, "heads": 6, "kv_heads": 6, "head_dim": 8},
    provenance={"text": "a.txt", "seed": 0},
    promise={"max_loss": 0.01, "rise": 0.001, "standard_error": 0.001, "windows": 4, "length": 24},
    error=((1.0, 0.5, 0.25, 0.1, 0.05, 0.0),) * 3,
    similarity=(((0.5,) * 6,) * 6,) * 3,
)


def fuzz(cases):
    return settings(
        max_examples=cases,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# ---- the world of a case


@pytest.fixture(scope="module")
def world(folder):
    """The folder of models with further inputs; models stay loaded."""
    PROFILE.save(folder / "static.json")
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    kept = {}
    load = loading.load_model

    def load_once(name, dtype="auto", device="auto", **options):
        key = (str(name), dtype, device)
        if key not in kept:
            kept[key] = load(name, dtype, device, **options)
        return kept[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loading, "load_model", load_once)
        yield folder
    for name in ("static.json", "fifo", "loop"):
        (folder / name).unlink()


@contextlib.contextmanager
def scratch(world):
    """A folder of its own to run in; all inputs must be afterwards what they were before."""
    before, place = state(world), os.getcwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            Path("old").write_bytes(OLD)
            os.mkfifo("pipe")
            Path("link").symlink_to("pipe")
            Path("loop").symlink_to("loop")
            yield Path(name)
        finally:
            os.chdir(place)
    assert state(world) == before


def state(folder):
    """Kinds, modes and contents of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        whole = path.is_file() and not path.is_symlink()
        found[str(path)] = mode, hashlib.sha256(path.read_bytes()).digest() if whole else None
    return found


def run(*arguments):
    """Run a command: 0, or 2 with one line that can be printed. Returns the code and the line."""
    out, err = io.StringIO(), io.StringIO()

    def too_long(*ignored):
        raise AssertionError(f"no end after {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patched.setattr(sys, "argv", ["chai", *map(str, arguments)])
            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                pytest.raises(SystemExit) as ended,
            ):
                cli.main()
    finally:
        signal.alarm(0)
        for model, _ in list(_loaded()):
            disable(model)
    code, said = ended.value.code, err.getvalue()
    assert code in (0, 2), (arguments, said)
    if code == 2:
        assert said.startswith("error: "), (arguments, said)
        assert said.count("\n") == 1, (arguments, said)
        assert said.rstrip("\n").isprintable(), (arguments, said)
        assert len(said) < 2500, (arguments, said)
    # pipes and links are never replaced, and no half of a file is left
    assert Path("pipe").is_fifo()
    assert Path("link").is_symlink()
    assert not list(Path().glob(".chai-*"))
    return code, said


def _loaded():
    once = loading.load_model
    return once.__closure__[0].cell_contents.values() if once.__closure__ else ()


# ---- what hypothesis makes up

NUMBERS = st.sampled_from([
    0, 1, -1, 2, 3, 6, 7, 24, 4096, 10**10, 2**63, 2**64, -(10**30), 0.5, -0.0, 1e-320, 1e30, 1e38,
    1e308, float("nan"), float("inf"), float("-inf"),
])  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(["", " ", "static", "online", "llama", "[/red]", "$^{", "\x1b[2J", "a\nb",
                     "{{ 1/0 }}", "%s", "\u2028", ":smile:", "n" * 300]),
    st.text(max_size=12),
)  # fmt: skip
LEAVES = st.one_of(NUMBERS, TEXTS, st.none(), st.booleans())
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
WHOLE = json.loads(PROFILE.to_json())


@st.composite
def changed_profiles(draw):
    """A profile of which one or two places hold something else."""
    data = json.loads(json.dumps(WHOLE))
    for _ in range(draw(st.integers(1, 2))):
        inside = data
        while True:
            key = draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else
                                       range(len(inside))))  # fmt: skip
            if not (isinstance(inside[key], (list, dict)) and inside[key] and draw(st.booleans())):
                break
            inside = inside[key]
        inside[key] = draw(VALUES)
    return json.dumps(data, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")


MADE_UP = st.dictionaries(
    st.one_of(st.sampled_from([*WHOLE, "refit", "costs", "blend", "features"]), TEXTS), VALUES,
    max_size=5,
)  # fmt: skip
ODD_FILES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([
        b"[" * 3000, b'{"a":' * 3000, b'{"clusters": [2, 6, 3], "clusters": [1]}', b"\xef\xbb\xbf",
        b'{"clusters": [2, 6, 3], "x": "\\ud800"}', b'{"clusters": [' + b"9" * 6000 + b"]}",
        b'\xef\xbb\xbf{"clusters": [2, 6, 3]}', '{"clusters": [2, 6, 3]}'.encode("utf-16"),
    ]),
)  # fmt: skip
PROFILES = st.one_of(
    changed_profiles(), MADE_UP.map(lambda data: json.dumps(data).encode()), ODD_FILES
)
NAMES = st.one_of(
    st.sampled_from(["", " ", ".", "..", "old", "pipe", "link", "loop", "none/x", "old/x", "new",
                     "n" * 255, "n" * 256, "a/" * 3000, "a\0b", "\udcff", "-", "--", "[/red]"]),
    st.text(max_size=8).filter(lambda name: "/" not in name),
)  # fmt: skip


@fuzz(150)
@given(content=PROFILES, command=st.sampled_from(["show", "check", "plot", "generate"]))
def test_profile_files(world, content, command):
    with scratch(world):
        Path("p.json").write_bytes(content)
        more = {"show": (), "check": ("--model", world / "llama"), "plot": ("--plot", "plots")}
        if command == "generate":
            model = ("generate", world / "llama", "--profile", "p.json")
            run(*model, "--prompt", "Hi there", "--max-new-tokens", 3, "--device", "cpu")
        else:
            run("inspect", "p.json", *more[command])
        assert Path("p.json").read_bytes() == content


LINE = st.one_of(
    st.just("Some words that go on and on, line after line, to the end. " * 3),
    TEXTS,
    st.dictionaries(st.sampled_from(["text", "messages", "conversations", "x"]), VALUES, min_size=1)
    .map(json.dumps),
    st.lists(
        st.fixed_dictionaries({"role": TEXTS, "content": TEXTS}), max_size=3
    ).map(lambda messages: json.dumps({"messages": messages})),
)  # fmt: skip
CONTENTS = st.one_of(
    ODD_FILES,
    st.lists(LINE, max_size=12).map(lambda lines: "\n".join(lines).encode(errors="surrogatepass")),
    st.lists(LINE, max_size=6).map(lambda lines: json.dumps(lines).encode()),
    st.binary(min_size=100, max_size=300),
)


@fuzz(80)
@given(
    content=CONTENTS,
    suffix=st.sampled_from([".txt", ".jsonl", ".json", ".csv", ".md", ".parquet", ".gz", ""]),
)
def test_text_files(world, content, suffix):
    with scratch(world):
        text = Path("text" + suffix)
        text.write_bytes(content)
        code, _ = run(
            "calibrate", world / "llama", "--text", text, "--out", "old", "--samples", 4,
            "--length", 12, "--clusters", 2, "--recipe", "paper", "--device", "cpu",
        )  # fmt: skip
        assert text.read_bytes() == content
        if code == 0:
            assert ClusterProfile.load("old").clusters == (2, 2, 2)
        else:
            assert Path("old").read_bytes() == OLD


WORDS = st.one_of(
    NUMBERS.map(str),
    NAMES,
    st.sampled_from(["nan%", "1e999%", "auto", "cuda:99", "meta", "1x9", "decode:1x1000000000000",
                     "elbow", "4,4", "32+4", "value", "gradient", "blend", "self", "all"]),
)  # fmt: skip
OPTIONS = {
    "calibrate": ["--samples", "--length", "--held-out", "--seed", "--max-loss", "--save",
                  "--removed", "--clusters", "--max-error", "--recipe", "--cost", "--membership",
                  "--target", "--recent", "--sinks", "--refit", "--window", "--probe-from",
                  "--blend", "--features", "--dtype", "--device"],
    "bench": ["--clusters", "--dtype", "--paged", "--cache-dtype", "--recent", "--device",
              "--seconds", "--seed", "--plot"],
    "generate": ["--prompt", "--temperature", "--seed", "--dtype", "--device"],
    "frontier": ["--budgets", "--of", "--recipes", "--contexts", "--target", "--seed", "--length",
                 "--dtype", "--device"],
    "redundancy": ["--lengths", "--clusters", "--seed", "--prompt", "--length", "--dtype"],
    "serve": ["--gpu-memory", "--max-num-seqs", "--max-model-len", "--block-size"],
    "inspect": ["--model", "--plot", "--nothing"],
    "report": ["--title"],
    "export": ["--dtype"],
}  # fmt: skip


@st.composite
def command_lines(draw):
    """A command that works, of which up to three things are not what they should be."""
    command = draw(st.sampled_from(sorted(OPTIONS)))
    more = []
    for _ in range(draw(st.integers(0, 2))):
        more += [draw(st.sampled_from(OPTIONS[command])), draw(WORDS)]
    place = draw(st.sampled_from(["old", "new"]) | NAMES)
    given = draw(st.sampled_from(["counts.json", "static.json"]) | NAMES)
    return command, place, given, more


@fuzz(200)
@given(line=command_lines())
def test_command_lines(world, line):
    command, place, given_file, more = line
    file = world / given_file if given_file in ("counts.json", "static.json") else given_file
    llama, text = world / "llama", ("--text", world / "text.txt")
    small = ("--samples", 4, "--length", 12)
    whole = {
        "calibrate": ("calibrate", llama, *text, *small, "--clusters", 3, "--recipe", "paper",
                      "--out", place),
        "bench": ("bench", "attention", "--profile", file, "--case", "decode:1x9", "--seconds", 0,
                  "--device", "cpu", "--out", place),
        "generate": ("generate", llama, "--profile", file, "--prompt", "Hi", "--device", "cpu",
                     "--max-new-tokens", 2),
        "frontier": ("frontier", llama, *text, "--test", file, "--recipes", "paper", "--budgets",
                     10, "--contexts", 8, *small, "--windows", 2, "--out", place),
        "redundancy": ("redundancy", llama, *text, *small, "--show", 0, "--out", place),
        "serve": ("serve", llama, "--estimate", "--profile", file),
        "inspect": ("inspect", file),
        "report": ("report", file, "--out", place),
        "export": ("export", llama, "--profile", file, "--out", place),
    }[command]  # fmt: skip
    with scratch(world):
        code, _ = run(*whole, *more)
        if code or command in ("frontier", "redundancy", "export", "inspect"):
            assert Path("old").read_bytes() == OLD
