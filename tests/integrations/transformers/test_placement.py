"""Device maps: their words and files, what they refuse, and random weights by them."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from chai_attention.errors import LoadError
from chai_attention.integrations.transformers import loading, placement, room
from chai_attention.integrations.transformers.placement import (
    Placement,
    parse_placement,
    random_weights,
)
from chai_attention.integrations.transformers.room import Work, tensor_bytes
from chai_attention.runtime.skeleton import empty_model
from tiny_models import CONFIGS, tiny_model

pytest.importorskip("accelerate")
GB = 10**9
EVERYTHING = {"": "cpu"}
PARTS = {
    "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cuda:1", "model.layers.2": 1,
    "model.norm": 1, "model.rotary_emb": 0, "lm_head": "1",
}  # fmt: skip


@pytest.fixture
def two_gpus(monkeypatch):
    """As if there were two GPUs with 40 GB each."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(placement, "available", lambda device: 40 * GB)


def as_file(tmp_path, content):
    file = tmp_path / "map.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def empty(family="llama"):
    return empty_model(CONFIGS[family](), torch.float32)


# ---- the options


def test_words():
    assert parse_placement(None, None) is None
    for word in placement.WORDS:
        assert parse_placement(word, None) == Placement(word)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("0=70GiB,1=70GiB,cpu=100GiB", {0: 70 * 2**30, 1: 70 * 2**30, "cpu": 100 * 2**30}),
        ("1=500MB", {1: 500 * 10**6}),
        (" cpu = 1.5GB , cuda:0 = 3MiB ", {"cpu": 15 * 10**8, 0: 3 * 2**20}),
        ("0=70gb,1=1.5Gb,cpu=2 tib", {0: 70 * 10**9, 1: 15 * 10**8, "cpu": 2 * 2**40}),
    ],
)
def test_memory(text, memory):
    assert parse_placement("auto", text) == Placement("auto", memory)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("device_map", "memory", "message"),
    [
        (None, "0=1GB", "give --device-map auto"),
        ("auto", "70GiB", "write GPU=SIZE or cpu=SIZE"),
        ("auto", "", "write GPU=SIZE or cpu=SIZE"),
        ("auto", "0=70", "'70' is no size"),
        ("auto", "0=1_0GB", "'1_0GB' is no size"),
        ("auto", "0=infGB", "is no size"),
        ("auto", "0=nanGB", "is no size"),
        ("auto", "0=-1GB", "is no size"),
        ("auto", "0=1GB,cuda:0=2GB", "cuda:0 is there twice"),
        ("auto", "2=1GB", "no GPU 2 here: GPUs are 0 to 1"),
        ("auto", "gpu=1GB", "'gpu' is no device"),
        ("auto", "disk=1GB", "keep them in the host's memory"),
        ("cuda", None, "auto, balanced or a JSON file of modules and devices"),
        ("nowhere.json", None, "nowhere.json: No such file"),
    ],
)
def test_options_that_say_nothing_are_refused(device_map, memory, message):
    with pytest.raises(LoadError, match=re.escape(message)):
        parse_placement(device_map, memory)


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LoadError, match="no GPU 0 here: there is no GPU"):
        parse_placement("auto", "0=1GB")


def test_without_accelerate_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoadError, match=re.escape("pip install 'chai-attention[large]'")):
        parse_placement("auto", None)


@pytest.mark.usefixtures("two_gpus")
def test_files(tmp_path):
    found = parse_placement(as_file(tmp_path, PARTS), None)
    assert found.device_map == {
        **dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.rotary_emb"), 0),
        **dict.fromkeys(("model.layers.1", "model.layers.2", "model.norm", "lm_head"), 1),
    }
    assert found.divide(empty()) == found.device_map


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[0, 1]", "is no device map"),
        ("{}", "is no device map"),
        ("{", "is no device map"),
        ({"model": "disk"}, "'model': weights on disk would be read again"),
        ({"model": 3}, "'model': no GPU 3 here"),
        ({"model": True}, "True is no device"),
        ({"model": None}, "None is no device"),
    ],
)
def test_files_that_are_no_maps_are_refused(tmp_path, content, message):
    with pytest.raises(LoadError, match=re.escape(message)):
        parse_placement(as_file(tmp_path, content), None)


@pytest.mark.usefixtures("two_gpus")
def test_a_file_with_max_memory_is_refused(tmp_path):
    with pytest.raises(LoadError, match="a file says itself"):
        parse_placement(as_file(tmp_path, EVERYTHING), "0=1GB")


# ---- dividing a model


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.7": 0}, "names 'model.layers.7', which this model does not have"),
        ({"model.norm": None}, "says nothing about model.norm.weight, and 0 others"),
        ({"model.layers.0.mlp": 1}, "divides model.layers.0, which has to be on one device"),
    ],
)
def test_maps_that_do_not_fit_the_model_are_refused(change, message):
    places = dict.fromkeys(PARTS, 0) | change
    places = {name: place for name, place in places.items() if place is not None}
    with pytest.raises(LoadError, match=re.escape(message)):
        Placement(places).divide(empty())


@pytest.mark.usefixtures("two_gpus")
def test_a_map_that_a_device_has_no_memory_for_is_refused(monkeypatch):
    monkeypatch.setattr(placement, "available", lambda device: 1000)
    with pytest.raises(LoadError, match=r"puts 0.2 MB on cuda:0, which has 0.0 MB free"):
        Placement({"": 0}).divide(empty())


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("word", ["auto", "balanced", "sequential"])
def test_words_divide_by_memory_and_never_a_layer(word):
    model = empty()
    whole = tensor_bytes(model)
    memory = {0: whole * 0.85, 1: whole * 0.85}
    places = Placement(word, {k: int(v) for k, v in memory.items()}).divide(model)
    assert set(places.values()) == {0, 1}
    assert all("layers" not in name or name.count(".") == 2 for name in places)


@pytest.mark.usefixtures("two_gpus")
def test_auto_leaves_room_for_the_work():
    model = empty()
    with pytest.raises(LoadError, match=r"the GPUs have 0.0 MB for them, 40.0 GB each kept"):
        Placement("auto").divide(model, room=40 * GB)
    assert set(Placement("auto").divide(model, room=GB).values()) == {0, 1}


@pytest.mark.usefixtures("two_gpus")
def test_what_does_not_fit_max_memory_is_refused_not_put_on_disk():
    with pytest.raises(LoadError, match=r"do not fit --max-memory, which sums up to 0.1 MB"):
        Placement("auto", {0: 50_000, 1: 50_000}).divide(empty())


@pytest.mark.usefixtures("two_gpus")
def test_what_is_left_goes_to_the_host_only_if_it_is_named():
    model = empty()
    memory = {0: tensor_bytes(model) // 2, "cpu": GB}
    places = Placement("auto", memory).divide(model)
    assert set(places.values()) == {0, "cpu"}
    assert places["model.embed_tokens"] == 0


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma2", "gpt_neox"])
def test_random_weights_are_made_where_they_belong(family):
    model = random_weights(empty(family), EVERYTHING)
    held = (*model.parameters(), *model.buffers())
    assert not any(tensor.is_meta for tensor in held)
    deviation = model.get_input_embeddings().weight.std().item()
    assert 0.018 < deviation < 0.022
    whole = tiny_model(family)
    whole.load_state_dict(model.state_dict())
    ids = torch.randint(3, 97, (2, 20))
    torch.testing.assert_close(model(ids).logits, whole(ids).logits)


# ---- loading


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A saved model, whose tokenizer nobody asks for."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda *args, **options: None)
    return str(tmp_path / "model")


@pytest.fixture
def unloaded(monkeypatch):
    """Nothing may be loaded."""

    def load(*args, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)


@pytest.mark.parametrize(
    "places",
    [EVERYTHING, {"model": "cpu", "lm_head": "cpu"},
     {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "cpu"}],
)  # fmt: skip
def test_a_model_in_several_parts_of_one_device_is_the_model(folder, places):
    model, _ = loading.load_model(folder, placement=Placement(places))
    ids = torch.randint(3, 97, (2, 20))
    torch.testing.assert_close(model(ids).logits, tiny_model("llama")(ids).logits)
    assert not model.training


def test_device_and_device_map_contradict_each_other(folder):
    with pytest.raises(LoadError, match="leave out --device"):
        loading.load_model(folder, device="cpu", placement=Placement("auto"))


def test_gguf_files_are_not_divided(tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(LoadError, match=r"not for .gguf files"):
        loading.load_model(str(file), placement=Placement("auto"))


@pytest.mark.usefixtures("unloaded")
def test_a_model_that_does_not_fit_is_told_the_option_before_it_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(loading, "available", lambda device: 100_000)
    with pytest.raises(LoadError) as refused:
        loading.load_model(folder, "float32", "cpu")
    text = str(refused.value)
    assert "\n" not in text
    assert "of weights in float32" in text
    assert "0.1 MB are free: --device-map auto divides it" in text


@pytest.mark.usefixtures("unloaded")
def test_room_for_the_work_counts(folder, monkeypatch):
    config = CONFIGS["llama"]()
    works = {"few": Work(64), "many": Work(4096), "gradients": Work(4096, True, 1024)}
    needed = {name: work.bytes(config, torch.float32) for name, work in works.items()}
    assert needed["few"] < needed["many"] < needed["gradients"]
    weights = tensor_bytes(empty())
    for name, work in works.items():
        free = weights + needed[name] - 1
        monkeypatch.setattr(loading, "available", lambda device, free=free: free)
        with pytest.raises(LoadError, match="for the work"):
            loading.load_model(folder, "float32", "cpu", work=lambda config, work=work: work)
        monkeypatch.setattr(loading, "available", lambda device, free=free + 1: free)
        with pytest.raises(LoadError, match="weights were loaded"):
            loading.load_model(folder, "float32", "cpu", work=lambda config, work=work: work)


@pytest.mark.usefixtures("unloaded")
def test_a_device_map_that_does_not_fit_is_refused_before_anything_is_loaded(folder):
    with pytest.raises(LoadError, match="do not fit --max-memory"):
        loading.load_model(folder, placement=Placement("auto", {"cpu": 1000}))


def test_small_models_are_loaded_without_a_look_at_their_config(folder, monkeypatch):
    def read(*args, **options):
        raise AssertionError("the config was read")

    monkeypatch.setattr(loading, "load_config", read)
    monkeypatch.setattr(loading, "available", lambda device: 8 * GB)
    assert loading.load_model(folder, device="cpu")[0] is not None


def test_what_a_large_model_takes_is_local_what_was_measured():
    """Calibrating LLaMA-7B's shape by gradients peaked at 16.5 GB on a GPU, 13.5 of weights."""
    from chai_attention.benchmarking.presets import PRESETS

    config = PRESETS["llama-7b"]()
    weights = tensor_bytes(empty_model(config, torch.bfloat16))
    work = Work(2 * 1024, gradients=True, length=1024).bytes(config, torch.bfloat16)
    assert weights == pytest.approx(13.5e9, rel=0.01)
    assert weights + work == pytest.approx(16.5e9, rel=0.05)
    assert room.gigabytes(weights) == "13.5 GB"


@pytest.mark.usefixtures("unloaded")
def test_without_a_gpu_nobody_is_sent_from_one_option_to_the_next(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(placement, "available", lambda device: 100_000)
    with pytest.raises(LoadError, match="there is no GPU here") as refused:
        loading.load_model(folder, placement=Placement("auto"))
    assert "--max-memory" not in str(refused.value)


def test_a_gguf_file_that_does_not_fit_is_not_sent_to_device_map(tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" * 1000)
    monkeypatch.setattr(loading, "available", lambda device: 100_000)
    monkeypatch.setattr(loading, "load_config", lambda name, **options: CONFIGS["llama"]())
    with pytest.raises(LoadError, match="never divided: take more memory") as refused:
        loading.load_model(str(file), "float32", "cpu")
    assert "--device-map" not in str(refused.value)
