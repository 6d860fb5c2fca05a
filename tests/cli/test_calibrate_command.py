"""``chai calibrate``: text of every kind, interrupts, the dry run, and shares that are percent."""

import json

import pytest

from chai_attention.calibration import evidence_file, statistics
from chai_attention.calibration.evidence import EvidenceStore
from chai_attention.profile import ClusterProfile
from tiny_tokenizer import tiny_tokenizer

SMALL = ("--samples", 24, "--held-out", 16, "--length", 24, "--recent", 4)
ASKED = (*SMALL, "--max-loss", "90%")


def test_the_numbers_of_windows_are_those_asked_for(chai, tmp_path):
    out = tmp_path / "p.json"
    code, _, err = chai("calibrate", "llama", "--out", out, "--text", "text.txt", *ASKED)
    assert (code, err) == (0, "")
    profile = ClusterProfile.load(out)
    assert (profile.provenance["samples"], profile.promise["windows"]) == (24, 16)


@pytest.mark.parametrize("option", ["--save", "--removed"])
def test_what_a_saving_costs_is_measured_and_shown(chai, tmp_path, option):
    out = tmp_path / "p.json"
    code, text, _ = chai(
        "calibrate", "llama", "--out", out, "--text", "text.txt", *SMALL, option, "10%"
    )
    assert code == 0
    assert ClusterProfile.load(out).promise["windows"] == 16
    assert "perplexity on 16 held-out sequences" in text
    assert "(asked: 10.0% of the" in text


def test_a_profile_for_ranks_says_what_they_cost(chai, tmp_path):
    out = tmp_path / "p.json"
    code, text, _ = chai(
        "calibrate", "llama", "--out", out, "--text", "text.txt", *SMALL, "--save", "10%",
        "--tensor-parallel", 3,
    )  # fmt: skip
    assert code == 0
    profile = ClusterProfile.load(out)
    rises = [profile.provenance[f"predicted_rise{end}"] for end in ("", "_one_rank")]
    line = (
        "made for 3 tensor-parallel ranks, and their divisors: all of them save the same; costs "
        f"predict {rises[0]:+.2%} perplexity, and {rises[1]:+.2%} if one rank saved as much"
    )
    assert line in text
    code, text, _ = chai("inspect", out)
    assert line in text
    assert "for 3 tensor-parallel ranks" in text.replace("\n", " ").split("made for")[0]
    assert json.loads(chai("inspect", out, "--json")[1])["tensor_parallel"] == 3


def test_ranks_that_heads_cannot_be_dealt_to_are_one_line(chai, folder):
    for options, message in (
        (("--tensor-parallel", 4), "6 heads cannot be dealt to 4 ranks: choose 1, 2, 3, 6"),
        (("--tensor-parallel", 2, "--recipe", "paper"), "belongs to a static membership only"),
    ):
        code, _, err = chai(
            "calibrate", "llama", "--out", "no.json", "--text", "text.txt", *options
        )
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-loss", "1", "would be 100%: write 1% or 100%"),
        ("--max-loss", "9.99", "write 9.99% or 999%"),
        ("--max-loss", "0.5", "write 0.5% or 50%"),
        ("--max-loss", "nan", "such as 1% or 0.01"),
        ("--max-loss", "inf%", "such as 1% or 0.01"),
        ("--save", "20", "write 20% or 2000%"),
        ("--removed", "1", "write 1% or 100%"),
        ("--seed", "99999999999999999999", "--seed"),
        ("--blend", "nan", "--blend"),
        ("--samples", "99999999999", "at most 10,000,000 samples"),
    ],
)
def test_a_number_that_is_likely_to_be_percent_is_asked_about(chai, folder, option, value, message):
    code, _, err = chai(
        "calibrate", "llama", "--out", "never.json", "--text", "text.txt", option, value
    )
    assert code == 2
    assert err.count("\n") == 1
    assert message.removeprefix("--") in err
    assert not (folder / "never.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--text", "recall"), "recall hides facts in other text: name that too"),
        (("--text", "text.txt", "--text", "recall:x"), "the weight of recall is a number"),
        (
            ("--text", "text.txt", "--text", "recall", "--length", 24, "--recent", 4),
            "24 tokens are too few for text with 1 fact",
        ),
        (
            ("--text", "text.txt", "--text", "recall", "--recipe", "paper"),
            "text to recall from is for gradient costs",
        ),
        (
            ("--text", "text.txt", "--save", "10%", "--max-recall-loss", "5%"),
            "max_recall_loss goes with max_loss",
        ),
        (("--text", "text.txt", "--max-recall-loss", "5"), "write 5% or 500%"),
    ],
)
def test_text_to_recall_from_that_cannot_be_is_one_line(chai, folder, more, message):
    code, _, err = chai("calibrate", "llama", "--out", "never.json", *more)
    assert code == 2
    assert err.count("\n") == 1
    assert message in err
    assert not (folder / "never.json").exists()


def test_a_bare_share_that_cannot_be_mistaken_is_taken(chai, tmp_path):
    out = tmp_path / "p.json"
    code, *_ = chai("calibrate", "llama", "--out", out, "--text", "text.txt", *SMALL, "--save", 0.3)
    assert code == 0
    assert ClusterProfile.load(out).promise["save"] == 0.3


def interrupted(monkeypatch, batch):
    """Let the model be interrupted at a batch of its costs."""
    from chai_attention.calibration import costs

    seen = []
    loss = costs.summed_loss

    def stop(*args):
        seen.append(1)
        if len(seen) == batch:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(costs, "summed_loss", stop)
    return seen


@pytest.mark.parametrize("text", ["text.txt", "self"])
def test_an_interrupted_calibration_goes_on_and_gives_the_same_file(
    chai, tmp_path, monkeypatch, text
):
    whole, out = tmp_path / "whole.json", tmp_path / "p.json"
    arguments = ("calibrate", "llama", "--text", text, *ASKED)
    assert chai(*arguments, "--out", whole)[0] == 0
    assert list(tmp_path.iterdir()) == [whole]  # evidence of seconds is not kept

    monkeypatch.setattr(evidence_file, "EVERY", 0.0)
    with monkeypatch.context() as patch:
        interrupted(patch, 4)
        code, _, err = chai(*arguments, "--out", out)
    assert code == 130
    assert f"kept in {out}.evidence" in err
    assert not out.exists()

    maps = []
    monkeypatch.setattr(statistics.GramStatistics, "add", lambda *args: maps.append(1))
    batches = interrupted(monkeypatch, 99)
    code, _, err = chai(*arguments, "--out", out)
    assert (code, err) == (0, "")
    assert not maps  # all of the first pass, and half of the second, are there
    assert len(batches) == 3
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(tmp_path.iterdir()) == [out, whole]


def test_evidence_of_another_text_is_not_used(chai, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence_file, "EVERY", 0.0)
    out = tmp_path / "p.json"
    with monkeypatch.context() as patch:
        interrupted(patch, 4)
        chai("calibrate", "llama", "--out", out, "--text", "text.txt", *ASKED)
    code, _, err = chai("calibrate", "llama", "--out", out, "--text", "rows.jsonl", *ASKED)
    assert code == 0
    assert err.startswith(f"warning: {out}.evidence is of another calibration")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [out]


def test_a_loss_that_cannot_be_kept_costs_no_second_pass(chai, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence_file, "EVERY", 0.0)
    out = tmp_path / "p.json"
    arguments = ("calibrate", "llama", "--out", out, "--text", "text.txt", *SMALL, "--max-loss")
    code, _, err = chai(*arguments, "0.0001%")
    assert code == 2
    assert "cannot be met" in err
    batches = interrupted(monkeypatch, 99)
    assert chai(*arguments, "90%")[0] == 0
    assert not batches


def test_a_file_in_the_way_of_the_evidence_stays(chai, tmp_path):
    out = tmp_path / "p.json"
    mine = tmp_path / "p.json.evidence"
    mine.write_text("mine")
    code, _, err = chai("calibrate", "llama", "--out", out, "--text", "text.txt", *ASKED)
    assert (code, err.count("\n")) == (2, 1)
    assert "in the way" in err
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("options", [("--text", "text.txt"), ("--text", "self"), ()])
def test_a_dry_run_says_what_it_would_take_and_writes_nothing(chai, tmp_path, options):
    out = tmp_path / "p.json"
    options = (*options, "--recipe", "share")
    code, text, err = chai("calibrate", "llama", "--out", out, *options, *ASKED, "--dry-run")
    assert (code, err) == (0, "")
    assert "24 sequences of 24 tokens to learn from, 16 to measure on" in text
    assert ("text that the model writes" in text) == ("text.txt" not in options)
    for part in ("attention maps: ", "gradient costs: ", "profiles measured: at most 8", "GiB"):
        assert part in text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_as_json_without_a_budget_to_measure(chai, tmp_path):
    code, text, _ = chai(
        "calibrate", "llama", "--out", tmp_path / "p", "--text", "text.txt", "--recipe", "elbow",
        "--samples", 5, "--length", 24, "--dry-run", "--json",
    )  # fmt: skip
    found = json.loads(text)
    assert code == 0
    assert (found["windows"], found["held_out"], found["tries"]) == (5, 0, 0)
    assert set(found["seconds"]) == {"attention maps"}
    assert found["at_most"] == pytest.approx(sum(found["seconds"].values()))
    assert found["weights"] > 0
    assert found["memory"] > found["weights"]


def test_a_dry_run_finds_what_is_wrong(chai, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"n": 3}))
    arguments = ("calibrate", "llama", "--out", tmp_path / "p", "--text", tmp_path / "a.jsonl")
    code, _, err = chai(*arguments, "--dry-run")
    assert (code, err.count("\n")) == (2, 1)
    assert "no text field" in err


def chats(path, count=60):
    """A file of chats whose longest string is an identifier."""
    rows = [
        {
            "prompt_id": "0123456789abcdef" * 20,
            "messages": [
                {"role": "user", "content": f"What is {i} times {i}?"},
                {"role": "assistant", "content": f"{i} times {i} is {i * i}."},
            ],
        }
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def chat_model(folder, tmp_path):
    """The tiny llama with a chat template."""
    import shutil

    shutil.copytree(folder / "llama", tmp_path / "chatty")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "chatty")
    return tmp_path / "chatty"


def test_chats_are_calibrated_on_what_they_say_not_on_their_identifiers(
    chai, chat_model, tmp_path, monkeypatch
):
    seen = []
    init = EvidenceStore.__init__

    def watch(self, model, windows, *rest):
        seen.append(windows)
        init(self, model, windows, *rest)

    monkeypatch.setattr(EvidenceStore, "__init__", watch)
    code, _, err = chai(
        "calibrate", chat_model, "--out", tmp_path / "p", "--text", chats(tmp_path / "c.jsonl"),
        *ASKED,
    )  # fmt: skip
    assert (code, err) == (0, "")
    text = "".join(tiny_tokenizer().batch_decode(seen[0]))
    assert "user: What is" in text
    assert "abcdef" not in text
    # without a template there is no telling how the model reads a chat
    never = tmp_path / "never"
    code, _, err = chai("calibrate", "llama", "--out", never, "--text", tmp_path / "c.jsonl")
    assert (code, err.count("\n")) == (2, 1)
    assert "no chat template" in err


def test_a_guess_is_one_line_on_standard_error(chai, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "\n".join(json.dumps({"id": i, "passage": "some words " * 9}) for i in range(50))
    )
    code, _, err = chai("calibrate", "llama", "--out", tmp_path / "p", "--text", path, *ASKED)
    assert code == 0
    assert err.startswith(f"warning: {path} has no field text: its 'passage' is taken ('some")
    assert err.count("\n") == 1
