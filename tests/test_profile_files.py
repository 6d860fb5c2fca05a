"""Profiles with a refit: two files that belong together."""

import hashlib
import json

import pytest
import torch

from chai_attention.errors import ProfileError
from chai_attention.profile import ClusterProfile

TENSORS = {"layers.0.weight": torch.randn(4, 6), "layers.1.bias": torch.randn(4)}
PROFILE = ClusterProfile((2, 6), refit={"kind": "output"}, corrections=TENSORS)


def test_the_tensors_come_back(tmp_path):
    PROFILE.save(tmp_path / "p.json")
    again = ClusterProfile.load(tmp_path / "p.json")
    assert set(again.corrections) == set(TENSORS)
    assert all(torch.equal(again.corrections[name], TENSORS[name]) for name in TENSORS)
    entry = json.loads((tmp_path / "p.json").read_text())["refit"]
    assert entry["kind"] == "output"
    assert (tmp_path / entry["file"]).exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_new_refit_does_not_break_the_old_profile_if_writing_fails(tmp_path, monkeypatch):
    PROFILE.save(tmp_path / "p.json")
    other = ClusterProfile(
        (2, 6), refit={"kind": "output"}, corrections={"layers.0.bias": torch.ones(4)}
    )
    monkeypatch.setattr(ClusterProfile, "to_json", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        other.save(tmp_path / "p.json")
    again = ClusterProfile.load(tmp_path / "p.json")
    assert torch.equal(again.corrections["layers.1.bias"], TENSORS["layers.1.bias"])


def test_a_missing_or_other_file_is_told(tmp_path):
    PROFILE.save(tmp_path / "p.json")
    (file,) = tmp_path.glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    with pytest.raises(ProfileError, match="not the file this profile was saved with"):
        ClusterProfile.load(tmp_path / "p.json")
    file.unlink()
    with pytest.raises(ProfileError, match="keep both files in one folder"):
        ClusterProfile.load(tmp_path / "p.json")


def test_a_refit_without_tensors_is_neither_saved_nor_loaded(tmp_path):
    with pytest.raises(ProfileError, match="not its tensors"):
        ClusterProfile((2, 6), refit={"kind": "output"}).save(tmp_path / "p.json")
    (tmp_path / "p.json").write_text('{"clusters": [2, 6], "refit": {"kind": "output"}}')
    with pytest.raises(ProfileError, match="needs kind"):
        ClusterProfile.load(tmp_path / "p.json")


@pytest.mark.parametrize("file", ["", "../x", "/x", "a/b", ".", ".."])
def test_tensors_lie_beside_the_profile(file, tmp_path):
    data = {"clusters": [2], "refit": {"kind": "output", "file": file, "sha256": "0"}}
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(ProfileError, match="beside the profile"):
        ClusterProfile.load(tmp_path / "p.json")


def test_a_file_of_something_else_is_told(tmp_path):
    (tmp_path / "x").write_bytes(b"hello")
    digest = hashlib.sha256(b"hello").hexdigest()
    data = {"clusters": [2], "refit": {"kind": "output", "file": "x", "sha256": digest}}
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(ProfileError, match="no safetensors file"):
        ClusterProfile.load(tmp_path / "p.json")


def test_tensors_need_a_kind():
    with pytest.raises(ProfileError, match="'corrections' need a 'refit'"):
        ClusterProfile((2, 6), corrections=TENSORS)
