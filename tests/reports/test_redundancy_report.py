"""A redundancy study as a table and as plots."""

import pytest

from chai_attention.cli.tables import render
from chai_attention.evaluation.redundancy_files import RedundancyError
from chai_attention.reports.redundancy import redundancy_plots, redundancy_table, sizes_text
from result_files import load_redundancy, redundancy


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return load_redundancy(redundancy(tmp_path_factory.mktemp("study") / "redundancy.json"))


def test_table(study):
    text = render(redundancy_table(study), width=120)
    layer = study.layers[1]
    row = next(line for line in text.splitlines() if line.split()[:1] == ["1"])
    assert f"{layer.mean_correlation:.2f} (" in row
    assert f"{layer.stability.agreement[0][-1]:.2f} ±" in row
    assert sizes_text(layer) in row
    assert "the first 3 and from all 20 tokens" in " ".join(text.split())


def test_sizes(study):
    from dataclasses import replace

    layer = replace(study.layers[0], representatives=[0, 1, 2, 3, 4, 5, 6, 7, 7, 0, 0])
    assert layer.sizes == [3, 2, 1, 1, 1, 1, 1, 1]
    assert sizes_text(layer) == "3 2 1 1 1 1 + 2"


def test_plots(study, tmp_path):
    pytest.importorskip("matplotlib")
    paths = redundancy_plots(study, tmp_path / "new")
    assert [path.name for path in paths] == [
        "correlation.png",
        "elbow.png",
        "sizes.png",
        "stability.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    (tmp_path / "file").write_text("")
    with pytest.raises(RedundancyError, match="cannot write plots"):
        redundancy_plots(study, tmp_path / "file")
