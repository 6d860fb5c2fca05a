"""Examples in the docstrings of what users call: they run, and print what they say."""

import doctest
from importlib import import_module

import pytest

MODULES = [
    "chai_attention",
    "chai_attention.integrations.transformers.cache",
    "chai_attention.integrations.transformers.enable",
    "chai_attention.membership",
    "chai_attention.ops.dispatch",
    "chai_attention.profile",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_print_what_they_say(name: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    found = doctest.testmod(import_module(name), optionflags=flags, report=True)
    assert found.failed == 0
    assert found.attempted > 0
