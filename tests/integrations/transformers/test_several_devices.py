"""Models divided by accelerate: the results of one device, and everything where its layer is.

With a single GPU the second device is the CPU.
"""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from chai_attention.calibration import backward
from chai_attention.calibration.costs import ExactWindow, OffsetStatistics, collect_costs
from chai_attention.calibration.statistics import GramStatistics, observe
from chai_attention.errors import CalibrationError, UnsupportedModelError
from chai_attention.integrations.transformers import (
    ClusteredCache,
    DecodeGraph,
    StaticClusteredCache,
    enable,
    enabled,
)
from chai_attention.integrations.transformers.devices import (
    devices_of,
    has_offloaded_weights,
    input_device,
)
from chai_attention.integrations.transformers.modules import decoder_layers
from chai_attention.integrations.transformers.placement import drop_inner_hooks
from chai_attention.profile import ClusterProfile
from tiny_models import tiny_model

pytest.importorskip("accelerate")
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
two_devices = pytest.mark.skipif(not GPUS, reason="needs a CUDA device")
FIRST = torch.device("cuda", 0)
SECOND = torch.device("cuda", 1) if GPUS > 1 else torch.device("cpu")

REP = ((0, 0, 4, 4, 4, 0), (0, 1, 2, 3, 4, 5), (3, 1, 1, 3, 3, 5))
GENERATOR = torch.Generator().manual_seed(3)
COSTS = torch.rand(3, 6, 6, generator=GENERATOR).tolist()
OFFSETS = torch.randn(3, 6, 6, generator=GENERATOR).tolist()
PROFILES = {
    "static": ClusterProfile((2, 6, 3), membership="static", representatives=REP),
    "online": ClusterProfile((2, 6, 3), window=6, probe_start=2),
    "blend": ClusterProfile((2, 6, 3), window=6, membership="blend", blend=1.0, costs=COSTS),
    "window": ClusterProfile(
        (2, 6, 3), membership="static", representatives=REP, recent=5, sinks=3, offsets=OFFSETS
    ),
    "online window": ClusterProfile((2, 6, 3), window=6, recent=5, sinks=3),
    "streaming": ClusterProfile(
        (2, 0, 1),
        membership="static",
        representatives=((0, 0, 4, 4, 4, 5), (0, 1, 2, 3, 4, 5), (3, 1, 2, 3, 3, 5)),
        streaming=((5,), (0, 1, 2, 3, 4, 5), (1, 2, 5)),
        recent=5,
        sinks=3,
    ),
}
GREEDY = {
    "max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
    "disable_compile": True,
}  # fmt: skip
PARTS = {
    "llama": ("model.embed_tokens", "model.layers", ("model.norm", "model.rotary_emb", "lm_head")),
    "opt": ("model.decoder.embed_tokens", "model.decoder.layers",
            ("model.decoder.embed_positions", "model.decoder.final_layer_norm", "lm_head")),
    "gpt2": ("transformer.wte", "transformer.h",
             ("transformer.wpe", "transformer.ln_f", "lm_head")),
}  # fmt: skip


def places_of(family, *places):
    """A device map: embeddings and three layers in turn; what is tied is where embeddings are."""
    embed, layers, rest = PARTS[family]
    tied = family != "llama"
    last = places[-1]
    return (
        {embed: places[0]}
        | {f"{layers}.{layer}": place for layer, place in enumerate(places)}
        | {name: places[0] if tied or name.endswith("rotary_emb") else last for name in rest}
    )


def divided(family, *places):
    """A tiny model on the first device, and its copy on both: 0 is the first, 1 the second."""
    from accelerate.hooks import attach_align_device_hook_on_blocks

    model = tiny_model(family).to(FIRST)
    other = copy.deepcopy(model)
    where = {name: (FIRST, SECOND)[place] for name, place in places_of(family, *places).items()}
    # what dispatch_model does, which takes the CPU for a place to wait in
    attach_align_device_hook_on_blocks(
        other, execution_device={**where, "": FIRST}, offload=dict.fromkeys(where, False),
        skip_keys=other._skip_keys_device_placement,
    )  # fmt: skip
    other.hf_device_map = where
    other.tie_weights()
    drop_inner_hooks(other)
    return model, other


def prompts(lengths=(30, 21), seed=0):
    """Left-padded prompts: ids and mask."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (len(lengths), max(lengths)), generator=draw)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


# ---- two devices


@two_devices
@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("kind", PROFILES)
def test_generation_on_two_devices_is_that_of_one(family, kind):
    one, two = divided(family, 0, 1, 1)
    assert len(devices_of(two)) == 2
    given = {name: tensor.to(FIRST) for name, tensor in prompts().items()}
    alone = {"input_ids": given["input_ids"][:1]}
    ways = {
        "growing": (given, {}),
        "alone": (alone, {}),
        "static": (given, {"cache_implementation": "static"}),
        "beams": (given, {"num_beams": 3}),
        "static beams": (given, {"num_beams": 3, "cache_implementation": "static"}),
    }
    for model in (one, two):
        enable(model, PROFILES[kind])
    for way, (inputs, options) in ways.items():
        want = one.generate(**inputs, **GREEDY, **options)
        got = two.generate(**inputs, **GREEDY, **options)
        assert torch.equal(got, want), way
    logits = [model(**given, use_cache=False).logits for model in (one, two)]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


@two_devices
@torch.no_grad()
@pytest.mark.parametrize("kind", PROFILES)
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_what_a_cache_holds_is_where_its_layer_is(kind, static):
    _, model = divided("llama", 0, 1, 0)
    profile = PROFILES[kind]
    enable(model, profile)
    cache = (
        StaticClusteredCache(model, profile, 60, batch_size=2)
        if static
        else ClusteredCache(model, profile)
    )
    given = prompts()
    for stop in (20, 30):
        past = cache.get_seq_length()
        model(
            given["input_ids"][:, past:stop],
            attention_mask=given["attention_mask"][:, :stop],
            past_key_values=cache,
        )
    for layer, place in zip(cache.layers, (FIRST, SECOND, FIRST), strict=True):
        assert {tensor.device for tensor in layer.tensors().values()} == {place}
        assert layer.membership.representatives.device == place
    assert cache.memory().tokens == 30


@two_devices
@torch.no_grad()
def test_padding_is_looked_at_once_per_device(monkeypatch):
    from chai_attention.integrations.transformers import attention

    made = []
    plain = attention.Padding

    def noted(*args):
        made.append(args[3])
        return plain(*args)

    monkeypatch.setattr(attention, "Padding", noted)
    _, model = divided("llama", 0, 1, 1)
    enable(model, PROFILES["window"])
    model(**prompts())
    assert made == [FIRST, SECOND]


@two_devices
def test_a_graph_across_devices_is_refused_and_generation_does_without(caplog):
    _, model = divided("llama", 0, 1, 1)
    profile = PROFILES["static"]
    enable(model, profile)
    cache = StaticClusteredCache(model, profile, 60)
    with pytest.raises(UnsupportedModelError, match="on 2 devices"):
        DecodeGraph(model, cache)
    ids = prompts()["input_ids"].to(FIRST)
    options = {name: value for name, value in GREEDY.items() if name != "disable_compile"}
    got = model.generate(ids, **options, past_key_values=cache)
    assert cache.graph is None
    want = model.generate(ids, **GREEDY)
    assert torch.equal(got, want)


@two_devices
@pytest.mark.parametrize("keep", [0, 1e9], ids=["recomputed", "kept"])
def test_evidence_on_two_devices_is_that_of_one(keep, monkeypatch):
    monkeypatch.setattr(backward, "KEEP_BYTES", keep)
    windows = torch.randint(3, 97, (7, 40))
    exact = [ExactWindow(4, 2), ExactWindow(8, 2)]
    found = []
    for model in divided("llama", 0, 1, 1):
        grams, offsets = GramStatistics(3, 6), OffsetStatistics(3, 6, exact)
        observe(model, windows, [grams.add, offsets.add], batch_size=2)
        learned = [
            replace(window, offsets=table)
            for window, table in zip(exact, offsets.offsets, strict=True)
        ]
        costs = [
            collect_costs(model, windows, kind, exact=learned, batch_size=2)
            for kind in ("value", "gradient")
        ]
        found.append((grams.grams, offsets.offsets, costs))
    (grams, offsets, costs), (other_grams, other_offsets, other_costs) = found
    close = {"rtol": 1e-3, "atol": 1e-7}
    torch.testing.assert_close(other_grams, grams, **close)
    for one, two in zip(offsets, other_offsets, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)
    for kind, others in zip(costs, other_costs, strict=True):
        for one, two in zip(kind, others, strict=True):
            torch.testing.assert_close(two.sharing, one.sharing, **close)
            torch.testing.assert_close(two.streaming, one.streaming, **close)


# ---- one machine without GPUs


def offloaded(tmp_path, family="llama"):
    """A tiny model in memory, and one of whose layers two wait on disk."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "model")
    places = places_of(family, "cpu", "disk", "disk")
    places = {name: "cpu" if "layers" not in name else place for name, place in places.items()}
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    ).eval()
    assert has_offloaded_weights(other)
    return model, other


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", PROFILES)
def test_offloaded_layers_generate_what_layers_in_memory_do(kind, tmp_path):
    model, other = offloaded(tmp_path)
    given = prompts()
    with enabled(model, PROFILES[kind]), enabled(other, PROFILES[kind]):
        for options in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
            want = model.generate(**given, **GREEDY, **options)
            assert torch.equal(other.generate(**given, **GREEDY, **options), want)
        cache = StaticClusteredCache(other, PROFILES[kind], 60, batch_size=2)
        assert other(**given, past_key_values=cache).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_offloaded_layers_have_maps_but_no_gradients(tmp_path):
    model, other = offloaded(tmp_path)
    windows = torch.randint(3, 97, (3, 20))
    found = []
    for each in (model, other):
        grams = GramStatistics(3, 6)
        observe(each, windows, [grams.add], batch_size=2)
        found.append(grams.grams)
    torch.testing.assert_close(found[0], found[1])
    with pytest.raises(CalibrationError, match=r"some of this model are offloaded.*--cost scores"):
        collect_costs(other, windows, "gradient")


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_hooks_inside_a_part_are_dropped_and_change_nothing(tmp_path):
    """accelerate hooks every projection, which takes longer than the projection's decode step."""
    from accelerate import dispatch_model

    model = tiny_model("llama")
    other = copy.deepcopy(model)
    places = places_of("llama", "cpu", "cpu", "disk")
    places = {name: "cpu" if "layers" not in name else place for name, place in places.items()}
    dispatch_model(other, places, offload_dir=tmp_path, skip_keys=["past_key_values"])
    first, last = decoder_layers(other)[0], decoder_layers(other)[-1]
    assert hasattr(first.self_attn.q_proj, "_hf_hook")
    drop_inner_hooks(other)
    assert hasattr(first, "_hf_hook")
    assert not hasattr(first.self_attn.q_proj, "_hf_hook")
    assert "forward" not in vars(first.self_attn.q_proj)
    assert hasattr(last.self_attn.q_proj, "_hf_hook")  # brings its weights from disk
    given = prompts()
    torch.testing.assert_close(other(**given).logits, model(**given).logits)


def test_where_tokens_go():
    model = tiny_model("llama")
    assert input_device(model) == torch.device("cpu")
    assert devices_of(model) == [torch.device("cpu")]
    cache = DynamicCache(config=model.config)
    assert model(**prompts(), past_key_values=cache).logits.isfinite().all()
