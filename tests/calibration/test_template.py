"""The tokens of a chat template before the user's text."""

import pytest

from chai_attention.calibration.template import template_tokens
from chai_attention.errors import CalibrationError
from chai_attention.integrations.transformers.timed_generation import encode_prompt
from tiny_tokenizer import tiny_tokenizer

USER = "{% for m in messages %}user: {{ m['content'] }}</s>{% endfor %}"


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "before"),
    [
        (USER, "user: "),
        ("<s>" + USER + "{% if add_generation_prompt %}assistant: {% endif %}", "<s>user: "),
        (
            "{% if messages[0]['role'] != 'system' %}Be brief.\n{% endif %}" + USER,
            "Be brief.\nuser: ",
        ),
        ("{{ messages[0]['content'] }}: answer", ""),
    ],
)
def test_the_common_beginning_is_counted(template, before):
    tokenizer = with_template(template)
    count = template_tokens(tokenizer)
    assert count == len(tokenizer(before, add_special_tokens=False)["input_ids"])
    ids = encode_prompt(tokenizer, "Hello", chat=True)[0]
    assert tokenizer.decode(ids[count:]).startswith("Hello")


def test_a_tokenizer_without_a_template():
    with pytest.raises(CalibrationError, match="no chat template"):
        template_tokens(tiny_tokenizer())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("user: {% for %}", "cannot render"),
        ("{{ raise_exception('only with a system prompt') }}", "only with a system prompt"),
        ("always the same", "leaves out what the user says"),
        ({"tools": USER, "rag": USER}, "cannot render"),
    ],
)
def test_templates_that_cannot_be_used(template, message):
    with pytest.raises(CalibrationError, match=message):
        template_tokens(with_template(template))
