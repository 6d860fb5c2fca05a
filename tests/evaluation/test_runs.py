import hashlib
import json
import os
import re
from dataclasses import replace

import pytest

from chai_attention.errors import EvaluationError
from chai_attention.evaluation.runs import Result, RunFolder, load_result
from chai_attention.integrations.lm_eval.items import Item

RUN, TASK = {"model": "m", "seed": 0}, {"name": "piqa", "data": "d", "limit": None}
ASKED = {"name": "a/b", "asked": {"save": 0.05}}


def result(run=RUN):
    item = Item(3, "ab", 1, 0, 1, (-1.25, -0.1), 0.0, 1.0, 0.1, 4)
    comparator = {**ASKED, "settings": {"sizes": (1, 2)}}
    share = {"length": 9, "share": 0.5, "long_length": 20, "long_share": 0.25}
    settings = {"run": run, "task": TASK, "comparator": comparator}
    return Result(settings, "here", "choice", share, (item,), {"acc": 0.0})


@pytest.fixture
def redone():
    return []


@pytest.fixture
def folder(tmp_path, redone):
    return RunFolder(tmp_path / "out", lambda path, why: redone.append(why))


def written(folder):
    folder.put(result())
    (path,) = folder.path.rglob("*.json")
    return path


def test_a_result_comes_back_as_it_was(folder, redone):
    assert folder.get(RUN, TASK, ASKED) is None
    path = written(folder)
    assert path.relative_to(folder.path).as_posix() == "a_b/piqa.json"
    found = folder.get(RUN, TASK, ASKED)
    assert found.items == result().items
    assert (found.comparator, found.task) == ("a/b", "piqa")
    assert load_result(path) == found
    assert folder.get(RUN, TASK, {**ASKED, "settings": {"sizes": (1, 2)}}) == found
    assert not redone
    before = path.read_bytes()
    folder.put(result())
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("run", "task", "comparator", "word"),
    [
        ({**RUN, "seed": 1}, TASK, ASKED, "another run .seed"),
        (RUN, {**TASK, "limit": 3}, ASKED, "another task .limit"),
        (RUN, TASK, {**ASKED, "asked": {"save": 0.1}}, "another comparator .asked"),
        (RUN, TASK, {**ASKED, "settings": {"sizes": (1, 3)}}, "another comparator .settings"),
    ],
)
def test_a_result_of_other_settings_is_not_taken(folder, redone, run, task, comparator, word):
    written(folder)
    assert folder.get(run, task, comparator) is None
    (why,) = redone
    assert re.search(word, why)


def damage_cut(text):
    return text[: len(text) // 2]


def damage_digit(text):
    return text.replace("-1.25", "-1.26")


def damage_fields(text):
    return json.dumps({**json.loads(text), "kind": "other"})


def damage_all(text):
    return ""


def damage_list(text):
    return "[]"


def damage_nan(text):
    return text.replace("-1.25", "NaN")


def damage_twice(text):
    return text.replace('"kind"', '"kind": "choice", "kind"')


def damage_depth(text):
    return "[" * 100_000


@pytest.mark.parametrize(
    "damage",
    [
        damage_cut, damage_digit, damage_fields, damage_all, damage_list, damage_nan, damage_twice,
        damage_depth,
    ],
)  # fmt: skip
def test_a_damaged_result_is_not_taken(folder, redone, damage):
    path = written(folder)
    path.write_text(damage(path.read_text()))
    assert folder.get(RUN, TASK, ASKED) is None
    assert len(redone) == 1
    with pytest.raises(EvaluationError):
        load_result(path)
    path.write_bytes(b"\xff\xfe\x00")
    assert folder.get(RUN, TASK, ASKED) is None


def test_an_interrupt_while_writing_leaves_the_old_file_and_nothing_else(folder, monkeypatch):
    path = written(folder)
    before = path.read_bytes()

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        folder.put(replace(result(), source="there"))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_numbers_that_json_lacks_are_refused(folder):
    bad = result({"seed": float("nan")})
    with pytest.raises(EvaluationError, match="JSON"):
        folder.put(bad)
    assert not list(folder.path.rglob("*.json"))


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="cannot write"):
        RunFolder(tmp_path / "file")


@pytest.mark.parametrize(
    "change",
    [
        {"items": []}, {"items": [3]}, {"items": [{}]}, {"settings": {}}, {"settings": 3},
        {"settings": {"run": 1, "task": 1, "comparator": 1}},
    ],
)  # fmt: skip
def test_a_checksum_does_not_make_a_result_of_other_fields(folder, change):
    path = written(folder)
    body = {**json.loads(path.read_text()), **change}
    del body["checksum"]
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(body))
    with pytest.raises(EvaluationError, match="damaged"):
        load_result(path)


def test_a_folder_of_another_run_is_refused_and_left_alone(folder):
    path = written(folder)
    before = path.read_bytes()
    folder.require_run(RUN)
    with pytest.raises(EvaluationError, match="measured with another seed: write to another fol"):
        folder.require_run({**RUN, "seed": 1})
    with pytest.raises(EvaluationError, match="another extra, model: "):
        folder.require_run({**RUN, "model": "n", "extra": 1})
    assert path.read_bytes() == before
    path.write_text("{")
    folder.require_run({**RUN, "seed": 1})  # what is damaged is measured anew


def test_a_fifo_in_place_of_a_result_is_not_waited_for(folder, redone):
    path = written(folder)
    path.unlink()
    os.mkfifo(path)
    assert folder.get(RUN, TASK, ASKED) is None
    with pytest.raises(EvaluationError, match="a FIFO"):
        folder.put(result())


def test_tables_that_could_not_be_written_are_told_before_anything_is_measured(tmp_path):
    (tmp_path / "out" / "table.md").mkdir(parents=True)
    with pytest.raises(EvaluationError, match=r"table\.md: it is a folder"):
        RunFolder(tmp_path / "out")
