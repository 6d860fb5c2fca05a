"""The file of a frontier: whole or refused."""

import json
from dataclasses import asdict, replace

import pytest

from chai_attention.evaluation.points import FrontierError, Point, PointFile, load_points

POINT = Point(
    recipe="value",
    settings={"cost": "value", "recent": 0},
    asked="save",
    budget=0.1,
    text="t.txt",
    digest="0123456789ab",
    context=256,
    windows=16,
    removed=0.2,
    saved=0.1,
    at_least=False,
    baseline=28.7,
    rise=0.03,
    standard_error=0.004,
    seconds=12.5,
)
key_of = PointFile.key_of
ABOUT = {"model": "tiny", "seed": 0, "sizes": (1, 2)}


def contents(**changes):
    return {"schema_version": 1, "about": {}, "points": [asdict(POINT)], **changes}


def without(field):
    return {name: value for name, value in asdict(POINT).items() if name != field}


def test_points_come_back_as_they_were(tmp_path):
    path = tmp_path / "f.json"
    other = replace(POINT, recipe="p.json", asked=None, budget=None, rise=-0.01)
    for point in (POINT, other):
        PointFile(path, ABOUT).add(point)
    assert load_points(path) == [POINT, other]
    assert PointFile(path, ABOUT).get(key_of(POINT)) == POINT
    assert [file.name for file in tmp_path.iterdir()] == ["f.json"]


def test_a_key_is_what_was_asked_not_what_was_found():
    found = {"rise": 0.5, "seconds": 1.0, "saved": 0.3, "windows": 3, "baseline": 3.0}
    assert key_of(replace(POINT, **found)) == key_of(POINT)
    asked = {
        "recipe": "x", "settings": {"cost": "gradient"}, "asked": "removed", "budget": 0.2,
        "text": "u", "digest": "f", "context": 8,
    }  # fmt: skip
    keys = {key_of(replace(POINT, **{name: value})) for name, value in asked.items()}
    assert len(keys | {key_of(POINT)}) == len(asked) + 1
    assert key_of(replace(POINT, settings={"recent": 0, "cost": "value"})) == key_of(POINT)


def test_a_point_measured_again_replaces_itself(tmp_path):
    file = PointFile(tmp_path / "f.json", ABOUT)
    file.add(POINT)
    file.add(replace(POINT, rise=0.5))
    assert [p.rise for p in load_points(tmp_path / "f.json")] == [0.5]


def test_a_file_about_something_else_is_refused(tmp_path):
    path = tmp_path / "f.json"
    PointFile(path, ABOUT).add(POINT)
    with pytest.raises(FrontierError, match="another model, text: write to another folder"):
        PointFile(path, {**ABOUT, "model": "large", "text": "a"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged"),
        (json.dumps(contents())[:-9], "damaged"),
        ("[]", "no file of frontier points"),
        ("null", "no file of frontier points"),
        (json.dumps(contents(schema_version=2)), "schema version is 2"),
        (json.dumps({"clusters": [1]}), "'schema_version' is missing"),
        (json.dumps({"schema_version": 1, "about": {}}), "'points' is missing"),
        (json.dumps(contents(about=3)), "no file of frontier points"),
        (json.dumps(contents(points=[3])), "other fields"),
        (json.dumps(contents(points=[without("rise")])), "other fields"),
        (json.dumps(contents(points=[{**asdict(POINT), "rise": "3%"}])), "rise of a point is '3%'"),
        (json.dumps(contents(points=[{**asdict(POINT), "rise": True}])), "rise of a point is True"),
        (json.dumps(contents(points=[{**asdict(POINT), "context": 1.5}])), "context of a point"),
        (json.dumps(contents(points=[{**asdict(POINT), "budget": "1"}])), "budget of a point"),
        (json.dumps(contents(points=[{**asdict(POINT), "recipe": 3}])), "recipe of a point"),
    ],
)
def test_damaged_files_are_refused_and_left_alone(text, message, tmp_path):
    path = tmp_path / "f.json"
    path.write_text(text)
    for read in (load_points, lambda p: PointFile(p, {})):
        with pytest.raises(FrontierError, match=message) as caught:
            read(path)
        assert "move it away" in str(caught.value)
    assert path.read_text() == text


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(FrontierError, match="cannot read"):
        load_points(tmp_path / "none.json")
    with pytest.raises(FrontierError, match="cannot write"):
        PointFile(tmp_path / "none" / "f.json", {}).add(POINT)


def test_a_file_stays_whole_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "f.json"
    PointFile(path, ABOUT).add(POINT)
    file = PointFile(path, ABOUT)
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(FrontierError, match="disk full"):
        file.add(replace(POINT, budget=0.3))
    assert load_points(path) == [POINT]
    assert [item.name for item in tmp_path.iterdir()] == ["f.json"]


def test_two_runs_at_once_keep_each_other_s_points(tmp_path):
    path = tmp_path / "f.json"
    other = replace(POINT, budget=0.3)
    first, second = PointFile(path, ABOUT), PointFile(path, ABOUT)
    first.add(POINT)
    second.add(other)
    assert load_points(path) == [POINT, other]
    # a file about something else came meanwhile: it stays
    third = PointFile(tmp_path / "g.json", ABOUT)
    PointFile(tmp_path / "g.json", {"model": "large"}).add(POINT)
    with pytest.raises(FrontierError, match="was measured with another"):
        third.add(other)
    assert load_points(tmp_path / "g.json") == [POINT]
