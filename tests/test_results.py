"""Result files: a checksum, and runs that go on where they were."""

import hashlib
import json

import pytest
import torch

from chai_attention.errors import ChaiError
from chai_attention.results import (
    RowFile,
    digest,
    file_digest,
    read_result,
    verified,
    write_result,
)


class Times(RowFile[dict]):
    """Rows of a made-up measurement."""

    @classmethod
    def key_of(cls, row):
        return row["name"]


def test_a_digest_is_of_all_parts_in_order(tmp_path):
    tensor = torch.arange(6).view(2, 3)
    whole = hashlib.sha256(b"ab" + tensor.numpy().tobytes()).hexdigest()
    assert digest("a", b"b", tensor) == whole[:16]
    assert digest("a", b"b", tensor, digits=64) == whole
    assert digest(tensor.T) == digest(tensor.T.contiguous()) != digest(tensor)
    (tmp_path / "f").write_bytes(b"ab")
    assert file_digest(tmp_path / "f") == hashlib.sha256(b"ab").hexdigest()
    assert file_digest(tmp_path) is None


def test_a_value_that_changed_is_told_by_the_checksum(tmp_path):
    path = write_result(tmp_path / "r.json", {"schema_version": 3, "x": (1, 2)}, ChaiError)
    data = read_result(path, ChaiError, "again")
    assert verified(data, 3) == {"x": [1, 2]}
    with pytest.raises(ValueError, match="schema version is 3"):
        verified(data, 4)
    with pytest.raises(ValueError, match="do not match its checksum"):
        verified({**data, "x": [1, 3]}, 3)
    # a file of an earlier release has none
    del data["checksum"]
    assert verified(data, 3) == {"x": [1, 2]}
    with pytest.raises(ValueError, match="do not match its checksum"):
        verified(data, 3, signed=True)


def test_what_json_has_no_word_for_is_refused_before_the_file_is_touched(tmp_path):
    with pytest.raises(ChaiError, match="cannot be kept as JSON"):
        write_result(tmp_path / "r.json", {"x": float("nan")}, ChaiError)
    assert not (tmp_path / "r.json").exists()


def test_rows_are_kept_from_run_to_run(tmp_path):
    path = tmp_path / "r.json"
    Times(path, {"model": "m"}).add({"name": "a", "us": 1})
    again = Times(path, {"model": "m"})
    again.add({"name": "b", "us": 2})
    again.add({"name": "a", "us": 3})
    assert [row["us"] for row in Times(path, {"model": "m"})] == [3, 2]
    assert again.get("a") == {"name": "a", "us": 3}
    with pytest.raises(ChaiError, match="another model"):
        Times(path, {"model": "n"})
    path.write_text(json.dumps({**json.loads(path.read_text()), "rows": []}))
    with pytest.raises(ChaiError, match="do not match its checksum"):
        Times(path, {"model": "m"})
