"""Tables of profiles, beside what they are made of."""

import json

from chai_attention.cli.records import profile_record
from chai_attention.cli.tables import profile_table, summary_line
from chai_attention.profile import ClusterProfile, ModelShape


def test_inspect_says_which_heads_stream_and_what_k_and_v_is_kept(tmp_path):
    profile = {
        "clusters": [2, 0], "membership": "static", "recent": 8, "sinks": 2,
        "representatives": [[0, 0, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]],
        "streaming": [[3, 4, 5], [0, 1, 2, 3, 4, 5]],
    }  # fmt: skip
    file = tmp_path / "p.json"
    file.write_text(json.dumps(profile))
    shape = ModelShape("x", layers=2, heads=6, kv_heads=6, head_dim=4, clusterable=(True, True))
    found = ClusterProfile.load(file)
    text = profile_table(found, shape)
    assert "3-5" in text
    assert "0-5" in text
    assert "2 of 3" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("│")]
    assert rows[0][-8:] == ["2", "of", "6", "│", "3", "of", "6", "│"]
    assert rows[1][-8:] == ["0", "of", "6", "│", "0", "of", "6", "│"]
    assert "bytes of local K and V" in summary_line(found, shape, 2)
    record = profile_record(found, shape)["layers"]
    assert [row["streaming"] for row in record] == [[3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert [(row["kept_k_heads"], row["kept_v_heads"]) for row in record] == [(2, 3), (0, 0)]


def test_the_summary_says_from_which_token_on_sharing_saves():
    shape = ModelShape("x", layers=2, heads=6, kv_heads=6, head_dim=4, clusterable=(True, True))
    line = summary_line(ClusterProfile((2, 6), window=30, probe_start=3), shape, 2)
    assert line.endswith("; sharing saves from 33 tokens on, with vLLM from the first (16-bit)")
    static = ClusterProfile((1, 6), "static", representatives=((0,) * 6, tuple(range(6))))
    for none in (static, ClusterProfile((6, 6))):
        assert "sharing" not in summary_line(none, shape, 2)
