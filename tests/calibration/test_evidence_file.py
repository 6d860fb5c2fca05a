"""What a calibration found before it was interrupted."""

import pytest
import torch

from chai_attention.calibration import evidence_file
from chai_attention.calibration.evidence_file import EvidenceFile
from chai_attention.errors import CalibrationError, ChaiWarning


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence_file, "EVERY", 0.0)
    return tmp_path / "p.json.evidence"


def test_sums_come_back_with_the_windows_they_are_of(path):
    sums = {"a": torch.rand(2, 3, dtype=torch.float64), "b": torch.rand(4)}
    file = EvidenceFile(path, {"model": "m"})
    file.keep("maps", sums, 8)
    kept = {name: tensor.clone() for name, tensor in sums.items()}
    sums["a"] += 1  # half a batch that is lost
    again = EvidenceFile(path, {"model": "m"})
    into = {"a": torch.zeros(2, 3, dtype=torch.float64), "b": torch.zeros(4)}
    assert again.restore("maps", into) == 8
    assert all(torch.equal(into[name], kept[name]) for name in kept)
    assert again.restore("costs", into) == 0
    assert again.restore("maps", {"a": torch.zeros(2, 2, dtype=torch.float64)}) == 0
    again.remove()
    assert not path.exists()


def test_evidence_of_another_job_is_not_used_and_said(path):
    EvidenceFile(path, {"model": "m"}).keep("maps", {"a": torch.ones(2)}, 8)
    with pytest.warns(ChaiWarning, match="is of another calibration"):
        other = EvidenceFile(path, {"model": "n"})
    assert other.restore("maps", {"a": torch.zeros(2)}) == 0


@pytest.mark.parametrize("kind", ["text", "folder", "link"])
def test_a_file_that_is_not_ours_is_never_replaced(kind, path):
    if kind == "text":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.with_name("nowhere"))
    with pytest.raises(CalibrationError, match="in the way"):
        EvidenceFile(path, {})


def test_little_work_leaves_no_file(tmp_path):
    file = EvidenceFile(tmp_path / "e", {})
    file.keep("maps", {"a": torch.ones(2)}, 8)
    assert not file.flush()
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_goes_on_where_its_evidence_cannot_be_kept(path):
    file = EvidenceFile(path.parent / "none" / "e", {})
    with pytest.warns(ChaiWarning, match="will begin anew"):
        file.keep("maps", {"a": torch.ones(2)}, 8)
    file.keep("maps", {"a": torch.ones(2)}, 16)  # said once
    assert not file.flush()
