"""Profiles with a refit: two files that belong together."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import save

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


@pytest.mark.parametrize("file", ["", "../x", "/x", "a/b", ".", "..", "a\0b", "n" * 300])
def test_tensors_lie_beside_the_profile(file, tmp_path):
    data = {"clusters": [2], "refit": {"kind": "output", "file": file, "sha256": "0"}}
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(ProfileError, match=r"beside the profile|holds a NUL|name too long"):
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


def saved(path, content):
    """A profile whose refit is a file with this content."""
    path.with_name("x").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    data = {"clusters": [2, 6], "refit": {"kind": "output", "file": "x", "sha256": digest}}
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layers.0.weight": torch.full((2, 3), torch.nan)}, "holds NaN or infinity"),
        ({"layers.0.bias": torch.tensor([1.0, -torch.inf])}, "holds NaN or infinity"),
        ({"layers.0.bias": torch.ones(2, dtype=torch.long)}, "not floating point"),
        ({"layers.0.bias": torch.ones(2).to(torch.float8_e4m3fn)}, "not floating point"),
        ({"layers.0.bias": torch.tensor(1.0)}, "has 0 dimensions"),
        ({"layers.0.weight": torch.ones(2)}, "has 1 dimensions"),
        ({"layers." + "9" * 5000 + ".bias": torch.ones(2)}, "no weight or bias of a layer"),
        ({"layers.\u0663.bias": torch.ones(2)}, "no weight or bias of a layer"),
        ({"lm_head.weight": torch.ones(2, 2)}, "no weight or bias of a layer"),
    ],
)
def test_tensors_that_cannot_be_used_are_neither_loaded_nor_saved(tensors, message, tmp_path):
    with pytest.raises(ProfileError, match=message):
        ClusterProfile.load(saved(tmp_path / "p.json", save(tensors)))
    profile = ClusterProfile((2, 6), refit={"kind": "output"}, corrections=tensors)
    with pytest.raises(ProfileError, match=message):
        profile.save(tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


def header(text, data=b""):
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        header(b"{}}"),
        header(b'{"layers.0.bias": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}', b"0"),
        header(b'{"a": {"dtype": "F32", "shape": [99], "data_offsets": [0, 4]}}', b"0" * 4),
        header(
            b'{"layers.0.bias": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
            b' "layers.0.bias": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
            b"0" * 8,
        ),
        header(b"[" * 100_000),
    ],
)
def test_damaged_tensor_files_are_one_line(content, tmp_path):
    with pytest.raises(ProfileError, match="calibrate again"):
        ClusterProfile.load(saved(tmp_path / "p.json", content))


def test_a_fifo_in_place_of_the_tensors_is_not_waited_for(tmp_path):
    path = saved(tmp_path / "p.json", b"")
    (tmp_path / "x").unlink()
    os.mkfifo(tmp_path / "x")
    with pytest.raises(ProfileError, match="a FIFO"):
        ClusterProfile.load(path)


def test_a_profile_written_through_a_link_can_be_read_by_both_names(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link.json").symlink_to("far/p.json")
    PROFILE.save(tmp_path / "link.json")
    assert len(list((tmp_path / "far").iterdir())) == 2
    for name in ("link.json", "far/p.json"):
        assert set(ClusterProfile.load(tmp_path / name).corrections) == set(TENSORS)


def test_both_files_may_be_links(tmp_path):
    """As in a cache of the hub, where a snapshot's files are links to blobs of other names."""
    (tmp_path / "blobs").mkdir()
    PROFILE.save(tmp_path / "p.json")
    for path in [*tmp_path.glob("*.json"), *tmp_path.glob("*.safetensors")]:
        path.rename(tmp_path / "blobs" / path.suffix[1:])
        path.symlink_to(tmp_path / "blobs" / path.suffix[1:])
    assert set(ClusterProfile.load(tmp_path / "p.json").corrections) == set(TENSORS)
