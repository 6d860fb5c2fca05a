"""Files of text of every kind, damaged ones included, read as far as they are needed."""

import bz2
import gzip
import json
import lzma
import os
import re

import pytest

from chai_attention.calibration import load_texts, text_files, texts
from chai_attention.calibration.texts import check_source
from chai_attention.errors import CalibrationError
from tiny_tokenizer import tiny_tokenizer

ROWS = [{"text": "one"}, {"text": ""}, {"text": "two, three"}]
WANTED = ["one", "two, three"]


def write_csv(path, separator=","):
    path.write_text(f'id{separator}text\n1{separator}one\n2{separator}\n3{separator}"two, three"\n')


def write_parquet(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


KINDS = {
    "a.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, ROWS))),
    "a.JSONL": lambda path: path.write_text("\r\n".join(map(json.dumps, ROWS)) + "\r\n"),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_text("\n".join(map(json.dumps, ROWS))),
    "strings.json": lambda path: path.write_text(json.dumps(WANTED)),
    "[a]*.csv": write_csv,
    "a.tsv": lambda path: write_csv(path, "\t"),
    "[a].parquet": write_parquet,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_texts(name, tmp_path):
    path = tmp_path / name
    KINDS[name](path)
    check_source(str(path))
    assert load_texts(str(path), tokens=10) == WANTED


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_text(name, tmp_path):
    path = tmp_path / name
    content = "words" if name == "a.txt" else '{"text": "words"}'
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert load_texts(str(path), tokens=10) == ["words"]


def test_line_ends_of_unicode_inside_a_string_do_not_end_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    text = "one\u2028two\u2029three\x85four\x0cfive"
    path.write_text("\n".join([json.dumps({"text": text}, ensure_ascii=False)] * 2))
    assert load_texts(str(path), tokens=10) == [text, text]


def test_chats_are_written_by_the_model_s_template(tmp_path):
    path = tmp_path / "a.jsonl"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path.write_text(json.dumps({"id": "x" * 99, "messages": chat}))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    )
    check_source(str(path))
    got = load_texts(str(path), tokens=10, tokenizer=tokenizer)
    assert got == ["user: Hi</s>assistant: Hello</s>"]
    for nothing in (None, tiny_tokenizer()):
        with pytest.raises(CalibrationError, match=r"line 1 is a chat.*plain text"):
            load_texts(str(path), tokens=10, tokenizer=nothing)


def chats(path, roles):
    rows = [{"messages": [{"role": role, "content": "some words"}]} for role in roles]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_chats_that_the_template_refuses_are_left_out_aloud(tmp_path):
    tokenizer = with_template(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}"
    )
    path = chats(tmp_path / "a.jsonl", ["user", "system", "user"])
    with pytest.warns(UserWarning, match=r"1 of 3 chats .* left out: .*line 2: no system"):
        assert load_texts(path, tokens=10, tokenizer=tokenizer) == ["some words"] * 2
    path = chats(tmp_path / "b.jsonl", ["user", "system", "system"])
    with pytest.raises(CalibrationError, match=r"cannot write .*line 2: no system"):
        load_texts(path, tokens=10, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ messages.__class__.__mro__ }}",
        "{{ raise_exception('\x1b[2J many\nlines') }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ 1 / 0 }}",
        "{{ range(10 ** 12) | list }}",
        "nothing of it",
    ],
)
def test_a_hostile_chat_template_is_one_line(template, tmp_path):
    path = chats(tmp_path / "a.jsonl", ["user"])
    with pytest.raises(CalibrationError, match="chat template of this tokenizer") as caught:
        load_texts(path, tokens=10, tokenizer=with_template(template))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}, {"text": "b"}', "ends before its array does"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "no comma"),
        ("a.json", b'[{"text": "a"},', "ends before"),
        ("a.json", b'{"text": "a"', "record 1 is not JSON"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.json", b'{"data": [{"context": "many words"}]}', "most of its text is in 'data'"),
        ("a.json", b"[]", "holds no text"),
        ("a.json", b"\xff\xfe", "as text"),
        ("a.csv", b"", "holds no text"),
        ("a.csv", b'text\n"never ends', "as csv"),
        ("a.parquet", b"PAR1 and no more", "as parquet"),
        ("a.txt.gz", b"\x1f\x8b\x08", "as text"),
    ],
)
def test_damaged_files_are_one_line(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    for read in (check_source, lambda source: load_texts(source, tokens=10)):
        with pytest.raises(CalibrationError, match=message) as caught:
            read(str(path))
        assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CalibrationError, match="no regular file"):
        check_source(str(tmp_path / "pipe"))
    with pytest.raises(CalibrationError, match="cannot read"):
        check_source("x" * 5000)
    (tmp_path / "a.txt").symlink_to(tmp_path / "a.txt")
    with pytest.raises(CalibrationError):
        check_source(str(tmp_path / "a.txt"))
    with pytest.raises(CalibrationError):
        check_source("a\0b.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_no_more_is_kept_than_the_job_needs_and_it_is_spread_over_the_file(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr(texts, "LEAST_READ", 2000)
    monkeypatch.setattr(text_files, "CHUNK", 256)
    lines = [f"line {i:07d}" for i in range(10_000)]
    path = tmp_path / name
    if name == "a.txt":
        path.write_text("\n".join(lines))
    elif name == "a.jsonl":
        path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    else:
        path.write_text(json.dumps(lines))
    with pytest.warns(UserWarning, match=r"a\.\w+ holds more .*: 1,9\d\d of its 1\d\d,\d{3} char"):
        got = load_texts(str(path), tokens=10)
    assert 1900 <= len("".join(got)) <= 2000
    found = [int(number) for text in got for number in re.findall(r"line (\d{7})", text)]
    assert found == sorted(found)
    assert found[0] < 1000
    assert found[-1] >= 9000
    with pytest.warns(UserWarning, match="holds more"):
        assert load_texts(str(path), tokens=10) == got
    with pytest.warns(UserWarning, match="holds more"):
        assert load_texts(str(path), tokens=10, seed=1) != got


def test_records_across_the_ends_of_what_is_read_at_a_time(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    rows = [{"text": "words " * (i % 7 + 1)} for i in range(50)]
    path.write_text(json.dumps(rows))
    for chunk in (1, 2, 7, 100):
        monkeypatch.setattr(text_files, "CHUNK", chunk)
        assert load_texts(str(path), tokens=10) == [row["text"] for row in rows]


def test_a_table_of_a_spreadsheet_may_be_separated_by_semicolons(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufeffid;text\n1;"one; and\nmore"\n2;two, three\n')
    assert load_texts(str(path), tokens=10) == ["one; and\nmore", "two, three"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "id,text\n1,one\n2,two, three\n",
            "row 2 has more fields than .* in double quotes",
        ),
        ("text,text\none,two\n", "has two columns named 'text'"),
        ("text\none\n\0two\n", "row 2 holds NUL"),
    ],
)
def test_a_table_that_would_be_read_in_part_is_refused(content, message, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=message):
        load_texts(str(path), tokens=10)


def test_columns_without_names_are_no_matter(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,,\none,,\n")
    assert load_texts(str(path), tokens=10) == ["one"]


def test_utf_16_without_a_mark_is_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("some text\n".encode("utf-16-le"))
    with pytest.raises(CalibrationError, match="holds NUL: it is binary, or not UTF-8"):
        load_texts(str(path), tokens=10)


def test_a_link_that_leads_nowhere_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink("gone", "text")
    os.symlink("circle", "circle")
    for name in ("text", "circle"):
        with pytest.raises(CalibrationError, match="a link that leads to no file"):
            load_texts(name, tokens=10)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('[{"text": "one"}, {"text": "two"}]', r"a list, not an object \(one list .* is .json"),
        ('{"text": 5}', "its 'text' is int, not a string"),
    ],
)
def test_a_record_of_the_wrong_kind_says_what_it_is(line, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    with pytest.raises(CalibrationError, match=message):
        load_texts(str(path), tokens=10)


@pytest.mark.parametrize("size", [0, 10, 8192, 3_000_000])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_a_broken_byte_is_named_by_its_place_in_the_whole_file(size, start, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(start + b"x" * size + b"\xc3(" + b"y" * 100_000)
    with pytest.raises(
        CalibrationError, match=rf"byte {len(start) + size:,} is no UTF-8 .*convert"
    ):
        load_texts(str(path), tokens=10)
    path.write_bytes(start + b"x" * size + b"\xc3")  # half a character at the end
    with pytest.raises(CalibrationError, match=rf"byte {len(start) + size:,} is no UTF-8"):
        load_texts(str(path), tokens=10)


PACKED = {
    "gzip": lambda text: gzip.compress(text),
    "bzip2": lambda text: bz2.compress(text),
    "xz": lambda text: lzma.compress(text),
    "UTF-16": lambda text: text.decode().encode("utf-16"),
}


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("kind", PACKED)
def test_compressed_text_and_utf_16_are_called_what_they_are(name, kind, tmp_path):
    path = tmp_path / name
    path.write_bytes(PACKED[kind](b'{"text": "words, words and more words"}\n' * 50))
    for read in (check_source, lambda source: load_texts(source, tokens=10)):
        with pytest.raises(CalibrationError, match=rf"{kind}: (unpack it first|convert it)"):
            read(str(path))
