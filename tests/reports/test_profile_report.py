"""A profile on the page of ``chai report``: three kinds of heads, for the explorer too."""

import json
import re

import pytest

from chai_attention.profile import ClusterProfile
from chai_attention.reports.page import write_page
from chai_attention.reports.result_files import load_sections
from chai_attention.reports.sections import ReportError
from result_files import EVERY

PROFILE = ClusterProfile(
    (2, 6, 0), membership="static", recent=4, sinks=1, streaming=((1, 5), (), tuple(range(6))),
    representatives=((0, 1, 0, 3, 3, 5), *[tuple(range(6))] * 2),
    model={"architecture": "llama", "layers": 3, "heads": 6}, promise={"rise": 0.004},
    provenance={"method": "k-medoids"},
)  # fmt: skip


@pytest.fixture
def run(tmp_path):
    PROFILE.save(tmp_path / "profile.json")
    return tmp_path / "profile.json"


def test_every_head_is_a_square_of_its_kind(run, tmp_path):
    (section,) = load_sections([run])
    assert section.kind == "profile"
    assert "8 heads keep" in section.summary[-1]
    assert "2 heads share" in section.summary[-1]
    assert "8 heads forget" in section.summary[-1]
    assert section.tables[0].rows[0] == ["0", "2", "2", "2", "1, 5"]
    page = write_page([run], tmp_path / "page.html").read_text()
    for kind, count in (("keep", 8), ("share", 2), ("forget", 8)):
        assert len(re.findall(rf"layer \d+, head \d+: {kind}<", page)) == count
    assert "<title>layer 0, head 4: share</title>" in page
    assert '<th scope="row">rise</th><td>0.004</td>' in page


def test_an_online_profile_states_its_numbers(tmp_path):
    ClusterProfile(
        (2, 6, 3), recent=4, streaming=((1, 5), (), ()), provenance={"method": "budget"}
    ).save(tmp_path / "p.json")
    (section,) = load_sections([tmp_path / "p.json"])
    assert "Every request decides" in section.summary[-1]
    assert section.charts == []
    assert section.tables[0].rows[0] == ["0", "2", "-", "2", "1, 5"]


def test_an_explorer_of_the_same_model_offers_the_profile(run, tmp_path):
    name = next(iter(EVERY))
    EVERY[name](tmp_path / name)
    study, profile = load_sections([tmp_path / name, run])
    (offered,) = study.explorer["profiles"]
    assert offered["name"] == f"profile {profile.source}"
    for place, info in enumerate(study.explorer["layers"]):
        layer = info["layer"]
        assert offered["representatives"][place] == list(PROFILE.representatives[layer])
        assert offered["streaming"][place] == list(PROFILE.streaming[layer])
    other = {"provenance": {"method": "k-means"}, "representatives": ((0, 0, 2, 2),)}
    ClusterProfile((2,), membership="static", **other).save(run)
    study, _ = load_sections([tmp_path / name, run])
    assert study.explorer["profiles"] == []


def test_a_profile_that_cannot_be_is_named(run):
    data = json.loads(run.read_text())
    run.write_text(json.dumps({**data, "streaming": [[9], [], []]}))
    with pytest.raises(ReportError, match=re.escape(str(run))):
        load_sections([run])
