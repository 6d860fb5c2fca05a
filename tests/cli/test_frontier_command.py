"""``chai frontier`` as a person runs it; calibration is a stand-in unless said."""

import json

import pytest

import chai_attention.calibration as calibration_package
from chai_attention.errors import CalibrationError
from chai_attention.profile import ClusterProfile

SMALL = (
    "--text", "text.txt", "--test", "rows.jsonl", "--contexts", "8,24", "--samples", 4,
    "--length", 24, "--windows", 2,
)  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """What a stand-in for `calibrate` is asked; it refuses budgets of 0.5."""
    calls = []

    def calibrate(model, tokenizer, texts, **options):
        calls.append({"windows": texts, **options})
        if 0.5 in (options.get("save"), options.get("removed")):
            raise CalibrationError("half is too much")
        return ClusterProfile(
            (5, 6, 6),
            membership="static",
            representatives=((0, 0, 2, 3, 4, 5), *[tuple(range(6))] * 2),
        )

    monkeypatch.setattr(calibration_package, "calibrate", calibrate)
    return calls


def test_every_recipe_is_measured_for_every_number_of_ranks(chai, asked, tmp_path):
    code, text, _ = chai(
        "frontier", "llama", *SMALL, "--recipes", "default,counts.json", "--budgets", 10,
        "--tensor-parallel", "1,2,3", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    assert [call.get("tensor_parallel", 1) for call in asked] == [1, 2, 3]
    for name in ("default", "default, 2 ranks", "default, 3 ranks", "counts.json"):
        assert sum(line.strip().startswith(f"{name}  ") for line in text.splitlines()) == 2
    code, _, error = chai(
        "frontier", "llama", *SMALL, "--tensor-parallel", "0", "--out", tmp_path / "out"
    )
    assert code == 2
    assert "--tensor-parallel is whole numbers above 0" in error


def test_points_table_and_plot_are_written_and_a_rerun_reads_them(chai, asked, tmp_path):
    arguments = (
        "frontier", "llama", *SMALL, "--recipes", "paper,gradient,counts.json",
        "--budgets", "5,12.5", "--out", tmp_path / "new" / "out",
    )  # fmt: skip
    code, text, error = chai(*arguments)
    assert (code, error) == (0, "")
    out = tmp_path / "new" / "out"
    data = json.loads((out / "frontier.json").read_text())
    keys = [(p["recipe"], p["budget"], p["context"]) for p in data["points"]]
    assert keys == [
        *((r, b, c) for r in ("paper", "gradient") for b in (0.05, 0.125) for c in (8, 24)),
        ("counts.json", None, 8),
        ("counts.json", None, 24),
    ]
    assert data["about"]["model"] == "llama"
    assert data["about"]["calibration text"] == ["text.txt:1"]
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "frontier.txt").read_text().strip() in text
    assert sum("gradient" in line for line in text.splitlines()) == 4
    first = asked[0]
    assert first["windows"].shape == (4, 24)
    assert first["held_out"].shape == (2, 24)
    assert first["store"] is asked[1]["store"]
    assert {k: v for k, v in first.items() if k not in ("windows", "held_out", "store")} == {
        "samples": 4, "length": 24, "target": "scores", "seed": 0, "save": 0.05, "recipe": "paper",
        "measure": False,
    }  # fmt: skip
    assert asked[2]["cost"] == "gradient"
    assert asked[2]["target"] is None

    asked.clear()
    again, same, _ = chai(*arguments)
    assert (again, same, asked) == (0, text, [])
    code, _, error = chai(*arguments, "--seed", 3)
    assert code == 2
    assert "was measured with another" in error
    (out / "frontier.json").write_text("{")
    code, _, error = chai(*arguments)
    assert code == 2
    assert "damaged" in error


def test_mixtures_heads_and_what_cannot_be_met(chai, asked, tmp_path):
    (tmp_path / "more.txt").write_text("More text, which goes on and on. " * 9)
    code, text, error = chai(
        "frontier", "llama", *SMALL, "--text", "self", "--test", tmp_path / "more.txt",
        "--of", "heads", "--budgets", "20,50", "--recipes", "value", "--target", "scores",
        "--out", tmp_path,
    )  # fmt: skip
    assert code == 0
    assert error == "left out: value at 50.0%: half is too much\n"
    assert [call["removed"] for call in asked] == [0.2, 0.5]
    assert asked[0]["target"] == "scores"
    assert asked[0]["windows"].shape == (4, 24)
    assert (asked[0]["windows"][:, 0] == 1).sum() == 2  # what a model writes begins with <s>
    points = json.loads((tmp_path / "frontier.json").read_text())["points"]
    assert {p["text"] for p in points} == {"rows.jsonl", "more.txt"}
    assert "a share of the heads" in " ".join(text.split())


def test_the_paper_against_value_costs_with_the_real_calibration(chai, tmp_path):
    code, _, error = chai(
        "frontier", "llama", *SMALL, "--recipes", "paper,value", "--budgets", "10",
        "--out", tmp_path,
    )  # fmt: skip
    assert (code, error) == (0, "")
    points = json.loads((tmp_path / "frontier.json").read_text())["points"]
    assert [p["recipe"] for p in points] == ["paper", "paper", "value", "value"]
    assert all(0 < p["saved"] < 0.2 for p in points)


BASE = ("frontier", "llama", "--out", "never", *SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*BASE, "--of", "layers"), "--of is bytes or heads"),
        ((*BASE, "--budgets", "5,x"), "--budgets is numbers above 0"),
        ((*BASE, "--budgets", "0"), "--budgets is numbers above 0"),
        ((*BASE, "--budgets", "100"), "above 0 and below 1"),
        ((*BASE, "--contexts", "8.5"), "--contexts is whole numbers above 0"),
        ((*BASE, "--contexts", "1000"), "at most 256"),
        ((*BASE, "--contexts", "1"), "length must be at least 2"),
        ((*BASE, "--length", "1000"), "at most 256"),
        ((*BASE, "--recipes", "papr"), "no recipe 'papr'"),
        ((*BASE, "--recipes", "none.json"), "cannot read none.json"),
        ((*BASE, "--recipes", "other.json"), "2 layers in the profile"),
        ((*BASE, "--recipes", "value", "--budgets", "50"), "no recipe could be calibrated"),
        ((*BASE, "--test", "none.txt"), "no such text file"),
        ((*BASE, "--test", "./rows.jsonl"), "same name"),
        ((*BASE, "--test", "./text.txt"), "text.txt is calibration text"),
        ((*BASE, "--text", "text.txt"), "is there twice"),
        ((*BASE, "--text", "same.txt"), "same.txt is there twice"),
        ((*BASE, "--test", "same.txt"), "same.txt is calibration text"),
        ((*BASE, "--recipes", "share, value", "--context", 8), "for which --context would be"),
        (
            (*BASE, "--recipes", "share", "--text", "recall:1"),
            "no recipe has streaming heads, for which --text recall would be",
        ),
        ((*BASE, "--text", "self:2"), "every source of text a weight"),
        ((*BASE, "--text", "none.txt"), "no such text file"),
        (("frontier", "none", "--out", "never", *SMALL), "no model 'none'"),
        (("frontier", "llama", "--out", "text.txt/never", *SMALL), "cannot write to"),
        (("frontier", "llama", "--out", "never", "--text", "text.txt"), "--test"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(arguments, message, chai, asked, folder):
    before = sorted(folder.iterdir())
    code, _, error = chai(*arguments)
    assert code == 2
    assert sorted(folder.iterdir()) == before
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
