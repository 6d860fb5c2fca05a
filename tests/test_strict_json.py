"""JSON that has one meaning only."""

import json

import pytest

from chai_attention.strict_json import MOST_DEPTH, load_json, parse_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": NaN}', "NaN is no number"),
        ("[Infinity]", "Infinity is no number"),
        ("-Infinity", "-Infinity is no number"),
        ("[1e999]", "1e999 is too large"),
        ("[-1e999]", "is too large"),
        (f"[{2**64}]", "is too large"),
        (f"[{'9' * 10_000}]", r"9\.\.\. is too large"),
        ('{"a": 1, "b": 2, "a": 1}', "'a' is there twice"),
        ('{"x": {"a": 1, "a": 2}}', "'a' is there twice"),
        ("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1), "in each other"),
        ("[" * 100_000 + "]" * 100_000, "in each other"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "in each other"),
        ('["\\ud800"]', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
        ('"\\udfff"', "surrogate"),
        ("{", "line 1"),
        ("", "line 1"),
        ("[1] [2]", "Extra data"),
        ("[01]", "line 1"),
    ],
)
def test_what_has_no_meaning_or_several_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(text)
    assert len(str(caught.value)) < 120


def test_what_json_can_say_comes_back():
    data = {"a": [1, -2.5, 2**64 - 1, 1e308, True, None, "ü\u2028\U0001f600", ""], "": {}}
    assert parse_json(json.dumps(data)) == data
    assert parse_json(json.dumps(data, ensure_ascii=False)) == data
    deep = "[" * MOST_DEPTH + '"x"' + "]" * MOST_DEPTH
    assert parse_json(deep) == json.loads(deep)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert load_json(tmp_path / "a.json") == [1]
    (tmp_path / "a.json").write_bytes("[1]".encode("utf-16"))
    with pytest.raises(ValueError, match="utf-8"):
        load_json(tmp_path / "a.json")
