"""Texts and chats of records: what is known, what is guessed aloud, what is refused."""

import json
import warnings

import pytest

from chai_attention.calibration.records import Chat, Records, shown
from chai_attention.errors import CalibrationError

TURNS = [("user", "Why is the sky blue?"), ("assistant", "Because of Rayleigh scattering.")]
OPENAI = [{"role": role, "content": content} for role, content in TURNS]
SHAREGPT = [
    {"from": "human", "value": "Why is the sky blue?"},
    {"from": "gpt", "value": "Because of Rayleigh scattering."},
]


def content(record, source="a.jsonl"):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Records(source).content(record, "a.jsonl, line 1")


@pytest.mark.parametrize(
    "record",
    [
        {"id": "a-long-identifier-of-this-chat" * 9, "messages": OPENAI},
        {"prompt_id": "f0e37e9f7800261167ce91143f98f511", "messages": OPENAI, "prompt": "Why?"},
        {"id": "QWJhYvA_0", "conversations": SHAREGPT},
        {"id": "0", "data": [content for _, content in TURNS]},
        {"conversation": OPENAI},
        {"text": "", "messages": OPENAI},
        {"prompt": OPENAI[:1], "completion": OPENAI[1:]},
        {"prompt": OPENAI[:1], "chosen": OPENAI, "rejected": SHAREGPT},
        {"messages": [{"role": r, "content": [{"type": "text", "text": c}]} for r, c in TURNS]},
        OPENAI,
    ],
)
def test_the_chat_is_taken_not_the_identifier(record):
    chat = content(record)
    assert isinstance(chat, Chat)
    assert list(chat.messages) == OPENAI


def test_calls_of_tools_stay_in_a_chat():
    calls = [{"function": {"name": "now", "arguments": "{}"}}]
    chat = content(
        {
            "messages": [
                *OPENAI,
                {"role": "assistant", "content": None, "tool_calls": calls},
                {"from": "observation", "value": "noon", "name": None},
            ]
        }
    )
    assert chat.messages[2:] == (
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "noon"},
    )


@pytest.mark.parametrize(
    "record",
    [None, {}, [], "", {"text": None}, {"text": "", "url": "a"}, {"messages": []}, {"a": ""}],
)
def test_an_empty_record_is_passed_over(record):
    assert content(record) is None


def test_a_guess_is_said_once_with_its_field_and_a_sample():
    reader = Records("a.jsonl")
    with pytest.warns(UserWarning, match=r"a\.jsonl .* 'passage' is taken \('because so'\)"):
        assert reader.content({"q": "why?", "passage": "because so"}, "line 1") == "because so"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # a longer question does not change what is read
        assert reader.content({"q": "a long question?", "passage": "yes"}, "line 2") == "yes"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "a1b2", "turns": [{"speaker": "x", "words": "many words"}]}, "most .* in 'turns'"),
        ({"id": "f0e37e9f7800261167ce91143f98f511", "n": 3}, "'id' does not look like text"),
        ({"n": 3}, "no text field: it has 'n'"),
        ({"messages": [{"who": "me", "what": "some words"}]}, "most of its text is in 'messages'"),
        ([1, 2], "no text field"),
        (7, "no text field"),
    ],
)
def test_what_cannot_be_known_is_refused_with_the_field_s_name(record, message):
    with pytest.raises(CalibrationError, match=message) as caught:
        content(record)
    assert str(caught.value).startswith("a.jsonl, line 1")


def test_half_a_surrogate_pair_is_no_character():
    assert content({"text": "a\ud800b"}) == "a?b"
    assert content({"messages": [{"role": "user", "content": "\udfff"}]}).messages[0] == {
        "role": "user", "content": "?"
    }  # fmt: skip


def test_a_sample_is_one_printable_line():
    assert shown("a\x1b[2J\nb\u2028c" + "d" * 99) == repr("a [2J b c" + "d" * 51 + "...")


def test_a_chat_that_a_table_holds_as_json_is_a_chat():
    found = content({"id": "x" * 999, "messages": json.dumps(OPENAI)})
    assert isinstance(found, Chat)
    assert [message["content"] for message in found.messages] == [text for _, text in TURNS]


@pytest.mark.parametrize("field", ["messages", "tools"])
def test_objects_in_a_string_are_no_text(field):
    with pytest.raises(CalibrationError, match=f"'{field}' does not look like text"):
        content({field: repr(OPENAI)})
