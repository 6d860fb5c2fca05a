import subprocess
import sys

import pytest

import chai_attention


def test_every_public_name_is_there():
    for name in chai_attention.__all__:
        assert getattr(chai_attention, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = chai_attention.nothing


def test_the_command_line_starts_without_torch():
    code = "import sys, chai_attention.cli; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
