"""Files of text that nobody would write: texts, or one line that says what is wrong."""

import json
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chai_attention.calibration import load_texts, windows_of
from chai_attention.calibration.text_files import FILE_SUFFIXES
from chai_attention.calibration.texts import check_source
from chai_attention.errors import CalibrationError
from tiny_tokenizer import tiny_tokenizer

NAMES = ("text", "messages", "conversations", "data", "prompt", "chosen", "role", "from", "value",
         "content", "id", "\x00", "[bold]")  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)
RECORDS = st.lists(VALUES, max_size=6)
LINES = RECORDS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
ARRAY = RECORDS.map(lambda rows: json.dumps(rows).encode())
CONTENT = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    LINES,
    ARRAY,
    st.tuples(LINES | ARRAY, st.integers(0, 200)).map(lambda cut: cut[0][: cut[1]]),
    st.tuples(ARRAY, st.binary(max_size=5)).map(b"".join),
)
TEMPLATES = (
    None,
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}",
    "{{ messages[1].content }}",
    "{{ raise_exception(messages[0].content) }}",
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.exhaustive
@given(content=CONTENT, suffix=st.sampled_from(FILE_SUFFIXES), template=st.sampled_from(TEMPLATES))
@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_a_file_gives_texts_or_one_line(content, suffix, template, tokenizer, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    tokenizer.chat_template = template
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check_source(str(path))
            texts = load_texts(str(path), tokens=10, tokenizer=tokenizer)
            windows = windows_of(texts, tokenizer, samples=3, length=4, seed=0)
        except CalibrationError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017
        else:
            assert all(isinstance(text, str) for text in texts)
            assert windows.shape[1] == 4
    assert path.read_bytes() == content
