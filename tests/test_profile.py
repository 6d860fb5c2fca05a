"""Profiles as files: what is read, what is refused, what survives a failed write."""

import errno
import json
import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from chai_attention.errors import ProfileError
from chai_attention.profile import FOR_EVER, PUBLISHED, ClusterProfile, sliding_bytes
from chai_attention.runtime.shape import ModelShape

SHAPE = ModelShape("llama", 3, 6, 6, 16, (True, True, True))
GROUPED = ModelShape("llama", 3, 6, 2, 16, (True, True, True))
STATIC = ((0, 0, 2, 2, 2, 0), (0, 1, 2, 3, 4, 5), (3, 3, 3, 3, 3, 3))
FULL = ClusterProfile(
    clusters=(2, 6, 1),
    membership="static",
    window=16,
    representatives=STATIC,
    model={"architecture": "llama", "layers": 3, "heads": 6, "kv_heads": 6, "head_dim": 16},
    provenance={"recipe": "default", "max_error": None, "seed": 3, "text": "größe.txt"},
    error=((1.0, 0.5, 0.25, 0.125, 0.05, 0.0),) * 3,
    similarity=(((0.5,) * 6,) * 6,) * 3,
)


def written(folder, contents):
    path = folder / "profile.json"
    path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
    return path


@pytest.mark.parametrize(
    "profile", [FULL, ClusterProfile((2, 6)), *map(ClusterProfile.published, PUBLISHED)]
)
def test_a_file_gives_back_what_was_saved(profile, tmp_path):
    profile.save(tmp_path / "p.json")
    again = ClusterProfile.load(tmp_path / "p.json")
    assert again == profile
    assert again.to_json() == profile.to_json()
    assert json.loads((tmp_path / "p.json").read_text())["schema_version"] == 1
    assert os.listdir(tmp_path) == ["p.json"]


def test_the_file_can_be_read_by_a_person(tmp_path):
    FULL.save(tmp_path / "p.json")
    lines = (tmp_path / "p.json").read_text().splitlines()
    assert ' "clusters": [2, 6, 1],' in lines
    assert "  [0, 1, 2, 3, 4, 5]," in lines
    assert len(lines) < 40


def test_counts_alone_are_a_profile(tmp_path):
    profile = ClusterProfile.load(written(tmp_path, '{"clusters": [3, 6, 2]}'))
    assert profile == ClusterProfile((3, 6, 2))
    assert (profile.membership, profile.window, profile.target) == ("online", 32, "scores")
    profile.check(SHAPE)
    profile.check(GROUPED)


def test_published_schedules():
    seven = ClusterProfile.resolve("llama-7b")
    assert seven.clusters == (32,) * 18 + (4,) * 14
    big = ClusterProfile.resolve("llama-33b")
    assert big.clusters == (48,) * 18 + (36,) * 8 + (24,) * 6 + (8,) * 2 + (6,) * 26
    assert seven.window == big.window == 5
    seven.check(ModelShape("llama", 32, 32, 32, 128, (True,) * 32))
    big.check(ModelShape("llama", 60, 52, 52, 128, (True,) * 60))
    full, kept = seven.bytes_per_token(ModelShape("llama", 32, 32, 32, 128, (True,) * 32), 2)
    assert full == 2 * 32 * 32 * 128 * 2
    assert 1 - kept / full == pytest.approx(0.1914, abs=1e-4)
    full, kept = big.bytes_per_token(ModelShape("llama", 60, 52, 52, 128, (True,) * 60), 2)
    assert 1 - kept / full == pytest.approx(0.265, abs=1e-3)


def test_lists_are_as_good_as_tuples():
    rep = [list(row) for row in STATIC]
    profile = ClusterProfile([2, 6, 1], membership="static", representatives=rep)
    assert profile.clusters == (2, 6, 1)
    assert profile.representatives == STATIC


def test_resolve_takes_a_path_and_names_what_it_knows(tmp_path):
    path = written(tmp_path, {"clusters": [1]})
    assert ClusterProfile.resolve(path) == ClusterProfile.resolve(str(path)) == ClusterProfile((1,))
    with pytest.raises(ProfileError, match="no profile 'llama-8b': give a file or one of llama-7b"):
        ClusterProfile.resolve("llama-8b")
    with pytest.raises(ProfileError, match="cannot read"):
        ClusterProfile.resolve(tmp_path)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", "is not JSON"),
        ("\udcff", "is not JSON"),
        ("[]", "JSON object"),
        ("{}", "needs 'clusters'"),
        ({"schema_version": 4, "clusters": [1]}, "schema version 4 is unknown"),
        ({"schema_version": 1, "clusters": [1], "streaming": [[0]]}, "needs schema version 2"),
        ({"schema_version": 2, "clusters": [1], "tensor_parallel": 2}, "needs schema version 3"),
        ({"clusters": [1], "tensor_parallel": 0}, "tensor_parallel 0 is not a whole number of 1"),
        ({"clusters": [1], "tensor_parallel": 2.0}, "tensor_parallel 2.0 is not a whole number"),
        ({"clusters": [1], "tensor_parallel": 2}, "belongs to a static membership only"),
        ({"clusters": [0], "streaming": [[0]]}, "need a recent window"),
        ({"clusters": [1], "streaming": [[1, 0]], "recent": 4}, "once each, ascending"),
        ({"clusters": [1], "streaming": [[-1]], "recent": 4}, "once each, ascending"),
        ({"clusters": [1], "streaming": [[True]], "recent": 4}, "must hold one list of numbers"),
        ({"clusters": [1], "streaming": [[0], [1]], "recent": 4}, "'streaming' has 2 layers"),
        (
            {
                "clusters": [1], "membership": "static", "representatives": [[0, 0]],
                "streaming": [[0]], "recent": 4,
            },
            "a streaming head represents itself alone",
        ),
        (
            {
                "clusters": [2], "membership": "static", "representatives": [[0, 1]],
                "streaming": [[0]], "recent": 4,
            },
            "1 representatives, 2 clusters",
        ),
        ({"schema_version": "1", "clusters": [1]}, "schema version '1' is unknown"),
        ({"clusters": [1], "windw": 3, "extra": 1}, "unknown keys extra, windw"),
        ({"clusters": []}, "at least 1"),
        ({"clusters": [0, 2]}, "at least 1"),
        ({"clusters": [-3]}, "at least 1"),
        ({"clusters": [1.5]}, "whole number"),
        ({"clusters": ["4"]}, "whole number"),
        ({"clusters": [True]}, "whole number"),
        ({"clusters": 4}, "whole number"),
        ({"clusters": None}, "whole number"),
        ({"clusters": [1], "membership": "dynamic"}, "'dynamic' is none of online, static, blend"),
        ({"clusters": [1], "membership": ["online"]}, "is none of online, static, blend"),
        ({"clusters": [1], "window": 0}, "window 0"),
        ({"clusters": [1], "window": "5"}, "window '5'"),
        ({"clusters": [1], "target": "bytes"}, "target 'bytes' is none of scores, k-bytes"),
        ({"clusters": [1], "model": "llama"}, "'model' must be an object"),
        ({"clusters": [1], "model": {"hidden": 3}}, "unknown entries of 'model': hidden"),
        ({"clusters": [1], "provenance": []}, "'provenance' must be an object"),
        ({"clusters": [1], "membership": "static"}, "needs 'representatives'"),
        ({"clusters": [1], "representatives": [[0]]}, "static membership only"),
        ({"clusters": [1], "error": [1.0]}, "'error' must hold"),
        ({"clusters": [1], "error": [["a"]]}, "'error' must hold"),
        ({"clusters": [1], "similarity": [[1.0]]}, "'similarity' must hold"),
        ({"clusters": [1, 1], "error": [[1.0]]}, "'error' has 1 layers, 'clusters' 2"),
    ],
)  # fmt: skip
def test_bad_files_are_refused(contents, message, tmp_path):
    path = tmp_path / "profile.json"
    text = contents if isinstance(contents, str) else json.dumps(contents)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ProfileError, match=message) as caught:
        ClusterProfile.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rep", "message"),
    [
        ([0, 0, 3], "not a head"),
        ([0, 0, -1], "not a head"),
        ([0, 0, "2"], "list of numbers per layer"),
        ([1, 2, 2], "represent itself"),
        ([0, 1, 2], "3 representatives, 2 clusters"),
        ([0, 0, 1.0], "not a head"),
        ([0, 0, True], "list of numbers per layer"),
        (2, "list of numbers per layer"),
    ],
)
def test_inconsistent_static_memberships_are_refused(rep, message):
    data = {"clusters": [2], "membership": "static", "representatives": [rep]}
    with pytest.raises(ProfileError, match=message):
        ClusterProfile.from_json(data)


def test_several_mistakes_are_told_at_once():
    with pytest.raises(ProfileError) as caught:
        ClusterProfile((2,), membership="both", window=-1, target="all")
    for part in ("membership", "window", "target"):
        assert part in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ProfileError, match=r"cannot read .*No such file"):
        ClusterProfile.load(tmp_path / "none.json")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"similarity": [[[NAN]]]}, "'similarity' must hold"),
        ({"error": [[INF]]}, "'error' must hold"),
        ({"recent": 2, "offsets": [[[NAN]]]}, "'offsets' must hold"),
        ({"recent": 2, "offsets": [[[1e31]]]}, "'offsets' must hold"),
        ({"error": [[10**400]]}, "'error' must hold"),
        ({"membership": "blend", "costs": [[[1.0]]], "blend": NAN}, "blend is a weight"),
        ({"membership": "blend", "costs": [[[1.0]]], "blend": 1e308}, "blend is a weight"),
        ({"membership": "blend", "costs": [[[-INF]]]}, "'costs' must hold"),
        ({"promise": {"rise": NAN}}, "'promise' holds something"),
        ({"provenance": {"a": {"b": [INF]}}}, "'provenance' holds something"),
        ({"window": NAN}, "window nan"),
        ({"window": 10**10}, "window 10000000000"),
        ({"probe_start": 10**10}, "probe_start"),
        ({"recent": 10**10}, "recent and sinks"),
        ({"recent": 1, "sinks": 10**10}, "recent and sinks"),
        ({"recent": True}, "recent and sinks"),
        ({"clusters": [10**10]}, "at most 4096 heads"),
        ({"clusters": [1] * 5000}, "at most 4096 layers"),
        ({"model": {"heads": 10**10}}, "heads of 'model'"),
        ({"model": {"head_dim": 1e3}}, "head_dim of 'model'"),
        ({"model": {"kv_heads": 0, "heads": 4}}, "kv_heads of 'model'"),
        ({"model": {"kv_heads": 3, "heads": 4}}, "a multiple of kv_heads"),
        ({"model": {"layers": [1]}}, "layers of 'model'"),
        ({"model": {"architecture": 3}}, "architecture of 'model'"),
    ],
)
def test_numbers_that_are_none_or_have_no_bound_are_refused(change, message):
    with pytest.raises(ProfileError, match=message) as caught:
        ClusterProfile.from_json({"clusters": [1], **change})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"clusters": [1], "error": [[NaN]]}', "NaN is no number"),
        ('{"clusters": [1], "blend": -Infinity}', "is no number"),
        ('{"clusters": [1], "provenance": {"x": 1e999}}', "too large"),
        ('{"clusters": [1], "window": ' + "9" * 5000 + "}", "too large"),
        ('{"clusters": [1], "clusters": [2]}', "'clusters' is there twice"),
        ('{"clusters": ' + "[" * 5000 + "]" * 5000 + "}", "in each other"),
        ('{"clusters": [1], "provenance": ' + '{"a":' * 900 + "1" + "}" * 901, "in each other"),
        ('{"clusters": [1], "provenance": {"x": "\\ud800"}}', "surrogate"),
    ],
)
def test_files_with_several_meanings_or_none_are_refused(text, message, tmp_path):
    with pytest.raises(ProfileError, match=message) as caught:
        ClusterProfile.load(written(tmp_path, text))
    assert "is not JSON that can be used" in str(caught.value)


@pytest.mark.parametrize("name", ["", " ", "n" * 5000, "a\0b", "a/" * 3000])
def test_names_that_no_file_has_are_one_line(name):
    with pytest.raises(ProfileError):
        ClusterProfile.resolve(name)


def test_a_loop_of_links_and_a_fifo_are_no_profiles(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ProfileError, match="symbolic links"):
        ClusterProfile.resolve(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ProfileError, match="it is a FIFO, not a regular file"):
        ClusterProfile.resolve(tmp_path / "fifo")


# ---- a model to go with


def test_check_lists_everything_that_differs():
    other = ModelShape("qwen2", 4, 8, 2, 64, (True,) * 4)
    with pytest.raises(ProfileError) as caught:
        FULL.check(other)
    for part in (
        "architecture is llama in the profile, qwen2 in the model",
        "layers is 3 in the profile, 4 in the model",
        "heads is 6 in the profile, 8 in the model",
        "kv_heads is 6 in the profile, 2 in the model",
        "head_dim is 16 in the profile, 64 in the model",
    ):
        assert part in str(caught.value)
    FULL.check(SHAPE)


@pytest.mark.parametrize(
    ("profile", "shape", "message"),
    [
        (ClusterProfile((2, 2)), SHAPE, "2 layers in the profile, 3 in the model"),
        (ClusterProfile((2, 7, 8)), SHAPE, "layer 1 has 7 clusters but 6 heads; layer 2 has 8"),
        (ClusterProfile((2, 6, 2)), replace(SHAPE, clusterable=(False, False, True)),
         "layer 0 is a sliding-window layer"),
        (ClusterProfile((3, 6, 3), target="k-bytes"), SHAPE, "is for grouped-query models"),
        (ClusterProfile((6, 6, 6), target="k-bytes"), replace(SHAPE, kv_heads=1),
         "needs several K/V heads, the model has one"),
        (ClusterProfile((3, 4, 2), target="k-bytes"), GROUPED,
         "layer 1: 4 clusters is not a multiple of 3; layer 2: 2"),
        (ClusterProfile((1, 1, 1), membership="static", representatives=((0, 0),) * 3), SHAPE,
         "layer 0 lists 2 representatives"),
    ],
)  # fmt: skip
def test_layers_a_model_cannot_run(profile, shape, message):
    with pytest.raises(ProfileError, match=message):
        profile.check(shape)


def test_a_static_choice_of_kv_heads_must_keep_whole_heads():
    """k-bytes with three representatives spread over both K/V heads would free no K at all."""
    spread = ((0, 1, 0, 0, 4, 4), (0, 1, 2, 3, 4, 5), (0, 1, 2, 0, 0, 0))
    profile = ClusterProfile((3, 6, 3), "static", target="k-bytes", representatives=spread)
    with pytest.raises(ProfileError, match="layer 0"):
        profile.check(GROUPED)


def test_bytes_of_kept_keys():
    assert ClusterProfile((2, 6, 3)).bytes_per_token(SHAPE, 4) == (2304, 64 * (2 + 6 + 3 + 18))
    # grouped queries, online scores: at most min(k, G)
    assert [ClusterProfile((1, 2, 5)).kept_keys(i, GROUPED) for i in range(3)] == [1, 2, 2]
    bytes_kept = ClusterProfile((3, 6, 3), target="k-bytes").bytes_per_token(GROUPED, 2)
    assert bytes_kept == (2 * 6 * 32, (1 + 2 + 1 + 6) * 32)
    # static: what the representatives need
    assert [FULL.kept_keys(i, GROUPED) for i in range(3)] == [1, 2, 1]


def test_error_at_the_chosen_number_of_clusters():
    assert [FULL.error_of(layer) for layer in range(3)] == [0.5, 0.0, 1.0]
    pairs = replace(ClusterProfile((4, 6)), error=((1.0, 0.2, 0.0),) * 2)
    assert pairs.error_of(0) is None  # heads per point of the curve are unknown
    assert replace(pairs, similarity=(((0.5,) * 6,) * 6,) * 2).error_of(0) == 0.2


@pytest.mark.parametrize(
    "change",
    [
        {"similarity": [[[1.0, 0.5]]] * 3},
        {"similarity": [[[1.0]]] * 3},
        {"error": [[]] * 3},
        {"error": [[1.0, 0.5, 0.2, 0.0]] * 3, "similarity": [[[0.5] * 6] * 6] * 3},
    ],
)
def test_curves_of_the_wrong_size_are_refused(change):
    with pytest.raises(ProfileError, match="layer 0"):
        ClusterProfile((2, 6, 1), **change)


# ---- writes that fail


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "profile.json"
    ClusterProfile((1, 2, 3)).save(path)
    return path


def assert_untouched(path):
    assert ClusterProfile.load(path) == ClusterProfile((1, 2, 3))
    assert [p.name for p in Path(path).parent.iterdir()] == [path.name]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_profile_whole(call, saved, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(ProfileError, match="No space left on device"):
            FULL.save(saved)
    assert_untouched(saved)


def test_a_write_cut_short_leaves_the_old_profile_whole(saved):
    """The kernel refuses the bytes themselves, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        with pytest.raises(ProfileError, match="cannot write"):
            FULL.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_untouched(saved)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ProfileError, match=r"cannot write .*No such file or directory"):
        FULL.save(tmp_path / "none" / "p.json")


def test_a_folder_in_place_of_the_file(tmp_path):
    (tmp_path / "p.json").mkdir()
    with pytest.raises(ProfileError, match="cannot write"):
        FULL.save(tmp_path / "p.json")
    assert os.listdir(tmp_path) == ["p.json"]


def test_a_profile_with_streaming_heads_is_of_schema_2_and_comes_back(tmp_path):
    profile = ClusterProfile(
        (1, 0), "static", representatives=((0, 0, 2), (0, 1, 2)), streaming=((2,), (0, 1, 2)),
        recent=8, sinks=2,
    )  # fmt: skip
    profile.save(tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text())["schema_version"] == 2
    assert ClusterProfile.load(tmp_path / "p.json") == profile
    plain = ClusterProfile((1, 2))
    assert json.loads(plain.to_json())["schema_version"] == 1


def test_streaming_heads_save_k_and_v():
    shape = ModelShape("x", 2, 6, 3, 4, (True, True))
    profile = ClusterProfile(
        (2, 4), "static", representatives=((0, 1, 0, 1, 4, 5), (0, 1, 2, 3, 4, 5)),
        streaming=((4, 5), (4, 5)), recent=8, sinks=2,
    )  # fmt: skip
    # K of 1 and V of 2 K/V heads, then 2 and 2, of 3
    assert [profile.kept_keys(layer, shape) for layer in range(2)] == [1, 2]
    assert [profile.kept_values(layer, shape) for layer in range(2)] == [2, 2]
    assert profile.bytes_per_token(shape, 2) == (2 * 2 * 3 * 4 * 2, (3 + 4) * 4 * 2)
    assert profile.window_bytes(shape, 2) == (12 - 7) * 10 * 4 * 2
    assert profile.saved(shape, 100) == pytest.approx(1 - (7 * 100 + 5 * 10) / (12 * 100))


def test_nothing_is_saved_before_the_window_is_full():
    """Where sequences decide: not in layers whose heads all represent themselves, or stream."""
    shape = ModelShape("x", 3, 6, 6, 4, (True,) * 3)
    profile = ClusterProfile(
        (2, 4, 6), window=5, probe_start=3, streaming=((), (4, 5), ()), recent=2, sinks=1
    )
    assert [profile.decides(layer, shape) for layer in range(3)] == [True, False, False]
    assert profile.probe_end == 8
    # of 36 heads' K or V the first layer drops 4 and the second 4, but for 3 tokens
    assert profile.held(shape, 7) == (36 * 7, 32 * 7, 4 * 3)
    assert profile.held(shape, 8) == (36 * 8, 28 * 8, 8 * 3)
    assert profile.saved(shape, 2) == 0
    static = ClusterProfile((2,), "static", window=8, representatives=((0, 0, 0, 3, 3, 3),))
    assert static.saved(replace(shape, layers=1, clusterable=(True,)), 1) == pytest.approx(1 / 3)


def test_layers_with_sliding_windows_do_not_grow_with_the_context():
    """They hold 10 tokens at most, with any profile, and take no part in what a token adds."""
    shape = ModelShape("x", 3, 6, 6, 4, (False, True, False), sliding_window=10)
    profile = ClusterProfile((6, 2, 6), window=9, recent=3, sinks=1)
    assert profile.bytes_per_token(shape, 2) == (12 * 4 * 2, 8 * 4 * 2)
    assert profile.window_bytes(shape, 2) == 4 * 4 * 4 * 2
    assert sliding_bytes(shape, 2) == sliding_bytes(shape, 2, 99) == 2 * 12 * 10 * 4 * 2
    assert sliding_bytes(shape, 2, 7) == 2 * 12 * 7 * 4 * 2
    assert profile.saved(shape, 100) == pytest.approx(4 * 96 / (12 * 100 + 24 * 10))
    assert replace(profile, window=8).saved(shape, 8) == pytest.approx(4 * 4 / (36 * 8))
    assert profile.saved(shape, 8) == 0
    assert profile.saved(shape, FOR_EVER) == pytest.approx(1 / 3)
    everywhere = replace(shape, clusterable=(False,) * 3)
    assert ClusterProfile((6, 6, 6)).saved(everywhere, 100) == 0


@pytest.mark.parametrize(
    ("clusters", "streaming", "message"),
    [
        ((6,), ((6,),), "a streaming head is not one of 6"),
        ((5,), ((4, 5),), "5 clusters but 4 heads that do not stream"),
        ((0,), ((4, 5),), "no head is left whose far scores others can use"),
        ((2,), ((4,),), "all 2 query heads of a K/V head stream, or none"),
    ],
)
def test_streaming_heads_that_a_model_cannot_have(clusters, streaming, message):
    shape = ModelShape("x", 1, 6, 3, 4, (True,))
    with pytest.raises(ProfileError, match=message):
        ClusterProfile(clusters, recent=4, streaming=streaming).check(shape)


def for_ranks(ranks, rep, streaming=()):
    return ClusterProfile(
        (len(set(rep)) - len(streaming),), "static", representatives=(rep,), tensor_parallel=ranks,
        streaming=(streaming,) if streaming else None, recent=4 if streaming else 0,
    )  # fmt: skip


def test_a_profile_for_ranks_is_of_schema_3_and_comes_back(tmp_path):
    for profile in (for_ranks(2, (0, 0, 3, 3)), for_ranks(2, (0, 1, 2, 3), (1, 2))):
        profile.check(ModelShape("llama", 1, 4, 4, 16, (True,)))
        profile.save(tmp_path / "p.json")
        assert ClusterProfile.load(tmp_path / "p.json") == profile
        assert json.loads((tmp_path / "p.json").read_text())["schema_version"] == 3
        assert "tensor_parallel" not in json.loads(replace(profile, tensor_parallel=1).to_json())


@pytest.mark.parametrize(
    ("profile", "kv_heads", "message"),
    [
        (for_ranks(3, (0, 1, 2, 3)), 4, "4 heads cannot be dealt to 3 ranks: choose 1, 2, 4"),
        (for_ranks(2, (0, 2, 2, 3)), 4, "head 1 uses the scores of head 2 on another rank"),
        (for_ranks(2, (0, 0, 2, 3)), 4, "made for 2 ranks, but ranks keep 1, 2 K heads"),
        (for_ranks(2, (0, 0, 2, 3), (3,)), 4, "made for 2 ranks, but ranks keep 2, 1 V heads"),
        # both ranks of a K/V head hold it; one needs nothing of it
        (for_ranks(4, (0, 1, 2, 3), (1,)), 2, "ranks keep 1, 0, 1, 1 K heads"),
    ],
)
def test_a_profile_for_ranks_leaves_them_nothing_to_spare(profile, kv_heads, message):
    shape = ModelShape("llama", 1, 4, kv_heads, 16, (True,))
    with pytest.raises(ProfileError, match=message):
        profile.check(shape)
