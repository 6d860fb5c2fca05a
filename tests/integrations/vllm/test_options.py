"""What vLLM may not be asked for together with clustered heads; no vLLM needed."""

from types import SimpleNamespace
from typing import Any

import pytest

from chai_attention.errors import ProfileError, UnsupportedModelError
from chai_attention.integrations.vllm.command_line import Options
from chai_attention.integrations.vllm.options import (
    Asked,
    choose_page,
    mark,
    profile_of,
    refuse,
    refuse_layer,
)
from chai_attention.profile import ClusterProfile
from chai_attention.profile_files import EXPORTED

PLAIN = ClusterProfile((2, 3), window=8)
WINDOW = ClusterProfile((2, 3), window=8, recent=4)
TABLE = [[0.0] * 4] * 4
BLEND = ClusterProfile((2, 3), "blend", window=8, blend=1.0, costs=[TABLE, TABLE])


def config(**changes: Any) -> SimpleNamespace:
    """A stand-in for ``VllmConfig`` with what is looked at."""
    made = SimpleNamespace(
        additional_config={},
        model_config=SimpleNamespace(model="nowhere", dtype="torch.bfloat16"),
        cache_config=SimpleNamespace(cache_dtype="auto", enable_prefix_caching=True),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, enable_dbo=False
        ),
        speculative_config=None,
        kv_transfer_config=None,
    )
    for name, value in changes.items():
        part, _, entry = name.rpartition("__")
        setattr(getattr(made, part) if part else made, entry, value)
    return made


@pytest.mark.parametrize(
    ("changes", "profile", "line"),
    [
        ({"cache_config__cache_dtype": "fp8_e5m2"}, PLAIN, "--kv-cache-dtype auto or fp8"),
        ({"cache_config__kv_cache_dtype_skip_layers": ["3"]}, PLAIN, "in some layers only"),
        ({"cache_config__cache_dtype": "float16"}, PLAIN, "cache of float16"),
        ({"parallel_config__decode_context_parallel_size": 2}, PLAIN, "context parallelism"),
        ({"cache_config__block_size": 24}, PLAIN, "pages of 24 tokens: .* multiples of 16"),
        ({"kv_transfer_config": object()}, PLAIN, "--kv-transfer-config"),
        ({"speculative_config": SimpleNamespace(method="eagle3")}, PLAIN, "drafts of a model"),
        ({"parallel_config__enable_dbo": True}, PLAIN, "microbatches"),
        ({"parallel_config__enable_dbo": True}, BLEND, "microbatches"),
        ({"cache_config__kv_offloading_size": 4.0}, PLAIN, "leave out --kv-offloading-size"),
        (
            {"scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=True)},
            WINDOW,
            "leave out --disable-hybrid-kv-cache-manager",
        ),
        ({"model_config__enable_sleep_mode": True}, WINDOW, "leave out --enable-sleep-mode"),
    ],
)
def test_refused(changes: dict[str, Any], profile: ClusterProfile, line: str) -> None:
    with pytest.raises(UnsupportedModelError, match=line) as raised:
        refuse(Asked.of_config(config(**changes)), profile)
    assert "\n" not in str(raised.value)


def test_accepted() -> None:
    refuse(Asked.of_config(config()), PLAIN)
    refuse(Asked.of_config(config()), WINDOW)
    refuse(Asked.of_config(config(cache_config__enable_prefix_caching=False)), WINDOW)
    one_kind = SimpleNamespace(disable_hybrid_kv_cache_manager=True)
    refuse(Asked.of_config(config(scheduler_config=one_kind)), PLAIN)
    refuse(Asked.of_config(config(cache_config__cache_dtype="bfloat16")), PLAIN)
    refuse(Asked.of_config(config(cache_config__cache_dtype="fp8")), PLAIN)
    refuse(Asked.of_config(config(speculative_config=SimpleNamespace(method="ngram"))), PLAIN)


def test_refit_has_to_be_exported() -> None:
    refit = ClusterProfile((2, 3), refit={"kind": "bias", "file": "x", "sha256": "y"})
    with pytest.raises(ProfileError, match="chai export"):
        refuse(Asked.of_config(config()), refit)


def test_the_profile_of_refit_weights_is_refused_for_those_without(tmp_path) -> None:
    # what `chai export` writes beside weights that hold a profile's refit
    note = {"refit": "output, built into the exported weights"}
    profile = ClusterProfile((2, 3), window=8, provenance=note)
    asked = Asked.of_config(config())
    with pytest.raises(ProfileError, match="not the folder that chai export wrote"):
        refuse(asked, profile, str(tmp_path))
    refuse(asked, PLAIN, str(tmp_path))
    refuse(asked, profile, "on-the-hub/of-unknown-weights")
    profile.save(tmp_path / EXPORTED)
    refuse(asked, profile, str(tmp_path))


def test_where_the_profile_comes_from(tmp_path) -> None:
    file = tmp_path / "some.json"
    PLAIN.save(file)
    named = config(additional_config={"chai": {"profile": str(file)}})
    assert profile_of(named) == PLAIN
    mark(named, PLAIN)  # every process of vLLM may do so
    mark(named, PLAIN)
    assert profile_of(named) == PLAIN
    assert named.additional_config["chai"]["profile"] == str(file)
    published = config(additional_config={"chai": {"profile": "llama-7b"}})
    assert profile_of(published).clusters[-1] == 4
    with pytest.raises(ProfileError, match="need a profile"):
        profile_of(config())
    with pytest.raises(ProfileError, match="nothing but a profile"):
        profile_of(config(additional_config={"chai": {"window": 3}}))
    WINDOW.save(tmp_path / EXPORTED)
    exported = config(model_config__model=str(tmp_path))
    assert profile_of(exported) == WINDOW
    before = exported.additional_config
    mark(exported, WINDOW)
    assert before != exported.additional_config
    assert profile_of(exported) == WINDOW


def test_a_folder_without_a_profile_says_so(tmp_path) -> None:
    with pytest.raises(ProfileError, match=r"holds no chai_profile\.json: give the file"):
        ClusterProfile.resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("words", "profile", "line"),
    [
        ("--kv-cache-dtype fp8_e5m2", PLAIN, "--kv-cache-dtype auto or fp8"),
        ("--kv_cache_dtype=fp8_e5m2", PLAIN, "--kv-cache-dtype auto or fp8"),
        ("--kv-cache-dtype-skip-layers 3 4", PLAIN, "in some layers only"),
        ("-dcp 2", PLAIN, "context parallelism"),
        ("--prefill-context-parallel-size=2", PLAIN, "context parallelism"),
        ("--kv-offloading-size 4", PLAIN, "leave out --kv-offloading-size"),
        ("--kv-transfer-config.kv_connector X", PLAIN, "leave out --kv-transfer-config"),
        ('-sc {"model":"m","num_speculative_tokens":2}', PLAIN, "drafts of a model"),
        ("--speculative-config.method eagle3", PLAIN, "drafts of a model"),
        ("--spec-method eagle3", PLAIN, "drafts of a model"),
        ("--spec-model m --spec-tokens 2", PLAIN, "drafts of a model"),
        ("--spec_tokens=2", PLAIN, "drafts of a model"),
        ("-sc.num_speculative_tokens 2 --spec-method=mtp", PLAIN, "drafts of a model"),
        ("--enable-dbo", BLEND, "microbatches"),
        ("--disable-hybrid-kv-cache-manager", WINDOW, "--disable-hybrid-kv-cache-manager"),
        ("--enable-sleep-mode", WINDOW, "leave out --enable-sleep-mode"),
    ],
)
def test_refused_by_the_command_line(words: str, profile: ClusterProfile, line: str) -> None:
    with pytest.raises(UnsupportedModelError, match=line) as raised:
        refuse(Asked.of_options(Options(words.split())), profile)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "profile"),
    [
        ("--kv-cache-dtype fp8 --port 1 -tp 2", PLAIN),
        ("--kv-cache-dtype bfloat16 -pp 2 --scheduling-policy priority", PLAIN),
        ('-sc {"method":"ngram","num_speculative_tokens":2}', PLAIN),
        ("--spec-method ngram --spec-tokens 2", PLAIN),
        ("--spec-model ngram -sc.num_speculative_tokens 2", PLAIN),
        ("", WINDOW),
        ("--no-enable-prefix-caching", WINDOW),
        ("-pp 2 --scheduling-policy priority --no-disable-hybrid-kv-cache-manager", WINDOW),
        ("--disable-hybrid-kv-cache-manager", PLAIN),
        ("--enable-sleep-mode", PLAIN),
        ("--enable-dbo --no-enable-dbo", BLEND),
    ],
)
def test_accepted_by_the_command_line(words: str, profile: ClusterProfile) -> None:
    refuse(Asked.of_options(Options(words.split())), profile)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ({"alibi": True}, "ALiBi"),
        ({"sliding_window": True}, "a sliding window"),
        ({"decoder": False}, "not a decoder's"),
        ({"shared": True}, "shared with another layer"),
        ({"extras": {"sinks": object()}}, "sinks"),
    ],
)
def test_layers_that_are_not_plain(what: dict[str, Any], text: str) -> None:
    plain = {"alibi": False, "sliding_window": False, "decoder": True, "shared": False}
    plain["extras"] = {"sinks": None}
    refuse_layer("a layer", **plain)
    with pytest.raises(UnsupportedModelError, match=text):
        refuse_layer("a layer", **{**plain, **what})


@pytest.mark.parametrize(
    ("on_gpu", "asked", "page"), [(True, None, 64), (True, 16, 16), (False, None, 16)]
)
def test_plain_vllm_serve_takes_pages_of_64_tokens_on_a_gpu(on_gpu, asked, page) -> None:
    """Local pages of 16 beside far pages of 16 would make all blocks larger than far pages."""
    cache = SimpleNamespace(block_size=asked or 16, user_specified_block_size=asked is not None)
    assert choose_page(cache, on_gpu) == (page == 64)
    assert cache.block_size == page
    assert cache.user_specified_block_size == (page != 16 or asked is not None)
    unknown = SimpleNamespace(block_size=16)  # a version that does not say who chose
    assert not choose_page(unknown, on_gpu)
    assert unknown.block_size == 16
