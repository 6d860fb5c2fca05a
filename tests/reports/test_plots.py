"""Plots of a profile: real PNG files that show every layer."""

import importlib.util
from dataclasses import replace

import pytest

from chai_attention.errors import ChaiError, ProfileError
from chai_attention.profile import ClusterProfile
from chai_attention.reports.head_kinds import head_kinds, kind_numbers
from chai_attention.reports.plots import KIND_COLORS, profile_plots

image = pytest.importorskip("matplotlib.image", reason="needs the extra plots")

CURVE = (1.0, 0.4, 0.2, 0.1, 0.05, 0.0)
TABLE = tuple(tuple(1.0 if i == j else 0.3 for j in range(6)) for i in range(6))


def profile(layers=8):
    return ClusterProfile((3,) * layers, error=(CURVE,) * layers, similarity=(TABLE,) * layers)


def size_of(path):
    """Width and height from a PNG's header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.parametrize("layers", [1, 6, 8])
def test_both_plots_are_written(layers, tmp_path):
    paths = profile_plots(profile(layers), tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["elbow.png", "similarity.png"]
    for path in paths:
        width, height = size_of(path)
        assert width > 200
        assert height > 200


def test_a_page_grows_with_the_layers(tmp_path):
    few = size_of(profile_plots(profile(6), tmp_path / "a")[0])
    many = size_of(profile_plots(profile(30), tmp_path / "b")[0])
    assert many[0] == few[0]
    assert many[1] > 3 * few[1]


def test_curves_of_kept_kv_heads(tmp_path):
    pairs = replace(profile(), error=((1.0, 0.3, 0.0),) * 8, clusters=(4,) * 8, target="k-bytes")
    assert all(path.exists() for path in profile_plots(pairs, tmp_path))


def test_a_profile_without_curves_is_refused(tmp_path):
    for missing in ("error", "similarity"):
        with pytest.raises(ProfileError, match="no error curves to plot"):
            profile_plots(replace(profile(), **{missing: None}), tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match="cannot write plots"):
        profile_plots(profile(), tmp_path / "file" / "folder")


def test_three_kinds_of_heads_are_drawn_with_or_without_curves(tmp_path):
    bare = ClusterProfile(
        (2, 6), membership="static", recent=4, sinks=1, streaming=((1, 5), ()),
        representatives=((0, 1, 0, 3, 3, 5), tuple(range(6))),
    )  # fmt: skip
    assert head_kinds(bare) == [
        ["keep", "forget", "share", "keep", "share", "forget"], ["keep"] * 6
    ]  # fmt: skip
    assert kind_numbers(bare, 6)[0] == {"keep": 2, "share": 2, "forget": 2}
    (path,) = profile_plots(bare, tmp_path / "a")
    assert path.name == "heads.png"
    pixels = {tuple(color) for color in (image.imread(path)[:, :, :3] * 255).round().reshape(-1, 3)}
    for color in KIND_COLORS.values():
        assert tuple(int(color[at : at + 2], 16) for at in (1, 3, 5)) in pixels
    curves = replace(bare, error=(CURVE,) * 2, similarity=(TABLE,) * 2)
    names = [path.name for path in profile_plots(curves, tmp_path / "b")]
    assert names == ["elbow.png", "similarity.png", "heads.png"]


def test_an_online_profile_counts_its_kinds_and_draws_no_heads(tmp_path):
    online = replace(profile(), recent=4, streaming=((2,),) * 8)
    assert head_kinds(online) is None
    assert kind_numbers(online, 6)[3] == {"keep": 3, "share": 2, "forget": 1}
    assert [path.name for path in profile_plots(online, tmp_path)] == [
        "elbow.png",
        "similarity.png",
    ]


def test_missing_matplotlib_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ChaiError, match=r"chai-attention\[plots\]"):
        profile_plots(profile(), tmp_path)
