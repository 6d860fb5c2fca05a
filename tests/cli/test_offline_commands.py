"""``chai calibrate`` and ``chai inspect`` as a person runs them, mistakes included."""

import resource
import subprocess
import sys

import pytest
import torch

from chai_attention.profile import ClusterProfile

SMALL = ("--samples", 6, "--length", 24)
LOCAL = (*SMALL, "--recent", 4, "--max-loss", "50%")


def test_calibrate_writes_a_profile_and_a_table(chai, tmp_path):
    out = tmp_path / "p.json"
    code, text, _ = chai("calibrate", "llama", "--out", out, "--text", "text.txt", *LOCAL)
    assert code == 0
    profile = ClusterProfile.load(out)
    assert profile.provenance["text"] == "text.txt"
    assert profile.promise["max_loss"] == 0.5
    assert "held-out sequences" in text
    values = sum(6 - len(streaming) for streaming in profile.streaming)
    full, kept = 2 * 3 * 6 * 8 * 4, (sum(profile.clusters) + values) * 8 * 4
    assert f"{full:,} bytes per token, {kept:,} with clusters" in text
    assert str(out) in text.replace("\n", "")
    for layer, k in enumerate(profile.clusters):
        assert f"│     {layer} │   {k} of {6 - len(profile.streaming[layer])} │" in text


def test_all_options_reach_the_calibration(chai, tmp_path):
    out = tmp_path / "p.json"
    code, text, _ = chai(
        "calibrate", "llama-grouped", "--out", out, "--text", "rows.jsonl", *SMALL, "--window", 7,
        "--recent", 4, "--cost", "value",
        "--clusters", "3,6,1", "--membership", "blend", "--target", "scores", "--seed", 11,
        "--dtype", "bfloat16", "--device", "cpu",
    )  # fmt: skip
    assert code == 0
    profile = ClusterProfile.load(out)
    assert profile.clusters == (3, 6, 1)
    assert (profile.window, profile.membership, profile.target) == (7, "blend", "scores")
    assert (profile.provenance["seed"], profile.provenance["samples"]) == (11, 6)
    shape_bytes = 2 * 3 * 2 * 8 * 2  # bfloat16
    assert f"{shape_bytes:,} bytes per token" in text


def test_the_papers_recipe_and_the_bound(chai, tmp_path):
    for name, options in {
        "paper": ("--recipe", "paper"),
        "bound": ("--max-error", 0, "--recipe", "elbow"),
    }.items():
        code, *_ = chai(
            "calibrate", "llama", "--out", tmp_path / name, "--text", "text.txt", *SMALL, *options
        )
        assert code == 0
    assert ClusterProfile.load(tmp_path / "paper").window == 5
    assert ClusterProfile.load(tmp_path / "bound").clusters == (6, 6, 6)


def test_a_model_can_write_its_own_text_and_the_file_repeats(chai, tmp_path):
    for name in ("a", "b"):
        torch.manual_seed(len(tmp_path.name) + ord(name))
        code, *_ = chai("calibrate", "llama", "--out", tmp_path / name, "--text", "self", *LOCAL)
        assert code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert ClusterProfile.load(tmp_path / "a").provenance["text"] == "self"


def test_inspect_a_file_with_counts_alone(chai):
    code, text, _ = chai("inspect", "counts.json")
    assert code == 0
    assert "--model" in text
    code, text, _ = chai("inspect", "counts.json", "--model", "llama")
    assert code == 0
    assert "2 of 6" in text  # K heads kept
    assert "576 bytes per token, 464 with clusters: 19.4% saved" in text
    code, text, _ = chai("inspect", "counts.json", "--model", "llama-grouped")
    assert code == 0
    assert "at least 0.0% saved" in text  # which K heads an online choice reads is not known yet


@pytest.mark.parametrize(("name", "saved"), [("llama-7b", 4), ("llama-33b", 6)])
def test_inspect_a_published_schedule(chai, name, saved):
    code, text, _ = chai("inspect", name)
    assert code == 0
    assert f"│       {saved:2} │" in text


def test_inspect_plots(chai, tmp_path):
    chai("calibrate", "llama", "--out", tmp_path / "p.json", "--text", "text.txt", *LOCAL)
    code, text, _ = chai("inspect", tmp_path / "p.json", "--plot", tmp_path / "plots")
    assert code == 0
    assert (tmp_path / "plots" / "elbow.png").exists()
    assert (tmp_path / "plots" / "similarity.png").exists()
    assert (tmp_path / "plots" / "heads.png").exists()
    assert text.count("plot written to") == 3


OUT = ("--out", "never.json")
TEXT_FILE = ("--text", "text.txt")
CALIBRATE = ("calibrate", "llama", *OUT, *TEXT_FILE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # no model, or none that can be used
        (("calibrate", "none", *OUT, *TEXT_FILE), "no model 'none'"),
        (("calibrate", "broken", *OUT, *TEXT_FILE), "cannot load broken"),
        (("calibrate", "none.gguf", *OUT, *TEXT_FILE), "no such file: none.gguf"),
        (("calibrate", "text.txt", *OUT, *TEXT_FILE), "cannot load text.txt"),
        (("calibrate", "bloom", *OUT, *TEXT_FILE), "supported: decoder-only models such as llama"),
        # text
        (("calibrate", "llama", *OUT, "--text", "none.txt"), "no such text file: none.txt"),
        (("calibrate", "llama", *OUT, "--text", "empty.txt"), "empty.txt holds no text"),
        (("calibrate", "llama", *OUT, "--text", "short.txt"), "has 9"),
        (("calibrate", "llama", *OUT, "--text", "org/data"), "neither a file nor a data set"),
        # options
        ((*CALIBRATE, "--samples", "0"), "at least 1 sample"),
        ((*CALIBRATE, "--samples", "many"), "--samples"),
        ((*CALIBRATE, "--length", "1000"), "at most 256"),
        ((*CALIBRATE, "--window", "0"), "window 0 is not a whole number of 1 to"),
        ((*CALIBRATE, "--window", "7"), "this one is static: leave out --window"),
        ((*CALIBRATE, "--probe-from", "content"), "this one is static: leave out --window"),
        ((*CALIBRATE, "--clusters", "3", "--max-error", "0.2"), "max_error bounds the elbow"),
        ((*CALIBRATE, "--clusters", "some"), "--clusters is elbow"),
        ((*CALIBRATE, "--clusters", "9"), "cannot have 9 clusters"),
        ((*CALIBRATE, "--clusters", "2,2"), "2 numbers of clusters for 3 layers"),
        ((*CALIBRATE, "--membership", "both"), "is none of online, static, blend"),
        ((*CALIBRATE, "--target", "k-bytes"), "grouped-query"),
        ((*CALIBRATE, "--max-error", "2"), "not 2.0"),
        ((*CALIBRATE, "--recipe", "mine"), "is none of default, share, stream"),
        ((*CALIBRATE, "--dtype", "int8"), "not 'int8'"),
        ((*CALIBRATE, "--device", "abacus"), "abacus"),
        ((*CALIBRATE, "--speed", "9"), "--speed"),
        (("calibrate", "llama"), "--out"),
        (("calibrate", *OUT), "MODEL"),
        (("calibrate", "llama", "--out", "none/p.json", *TEXT_FILE), "no folder none"),
        (("reticulate",), "reticulate"),
        # profiles
        (("inspect", "none.json"), "no profile 'none.json'"),
        (("inspect", "bad.json"), "at least 1"),
        (("inspect", "text.json"), "is not JSON"),
        (("inspect", "other.json", "--model", "llama"), "2 layers in the profile, 3 in the model"),
        (
            ("inspect", "llama-7b", "--model", "llama"),
            "layers is 32 in the profile, 3 in the model",
        ),
        (("inspect", "counts.json", "--model", "none"), "no model 'none'"),
        (("inspect", "counts.json", "--model", "bloom"), "supported: decoder-only models"),
        (("inspect", "counts.json", "--plot", "plots"), "no error curves"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(chai, folder, arguments, message):
    code, _, err = chai(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (folder / "never.json").exists()


def test_a_full_disk_leaves_the_old_profile(chai, tmp_path):
    out = tmp_path / "p.json"
    ClusterProfile((1, 2, 3)).save(out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        code, _, err = chai("calibrate", "llama", "--out", out, *TEXT_FILE, *LOCAL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert err.startswith("error: cannot write")
    assert ClusterProfile.load(out) == ClusterProfile((1, 2, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_without_arguments_help_is_shown(chai):
    code, text, _ = chai()
    assert code == 0
    for command in ("calibrate", "inspect", "generate", "demo"):
        assert command in text


def test_a_fresh_process_shows_help_without_torch_and_no_traceback(folder):
    script = (
        "import sys\n"
        "from chai_attention.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    assert '--help' not in sys.argv or 'torch' not in sys.modules\n"
    )
    for arguments, code in ((["--help"], 0), (["inspect", "none.json"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
