"""docs/architecture.md and the contract that `make lint` checks tell of the same rooms."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "chai_attention"


@pytest.fixture(scope="module")
def contract():
    """Names of rooms by layer, the lowest first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (only,) = settings["contracts"]
    return [set(re.split(r" [|:] ", layer)) for layer in reversed(only["layers"])]


def test_the_table_of_rooms_has_the_layers_of_the_contract(contract):
    table = [set() for _ in contract]
    rows = re.findall(
        r"^\| (\d+) \| (`[^|]*`) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE
    )
    for layer, rooms in rows:
        names = re.findall(r"`([^`]+)`", rooms)
        assert all((PACKAGE / name).exists() for name in names)
        table[int(layer) - 1] |= {name.strip("/").removesuffix(".py") for name in names}
    assert [{room.replace("/", ".") for room in layer} for layer in table] == contract


def test_every_runtime_is_a_room(contract):
    runtimes = {path.parent.name for path in PACKAGE.glob("integrations/*/__init__.py")}
    assert {f"integrations.{name}" for name in runtimes} <= set().union(*contract)
