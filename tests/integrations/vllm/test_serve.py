"""What `chai serve` stops at before vLLM is started; no vLLM needed."""

import json
from pathlib import Path

import pytest
from transformers import Gemma2Config, LlamaConfig

from chai_attention.errors import ChaiError
from chai_attention.integrations.vllm import serve
from chai_attention.integrations.vllm.serve import vllm_command
from chai_attention.profile import ClusterProfile
from chai_attention.profile_files import EXPORTED

CLUSTERS = (3, 8)
REPRESENTATIVES = [[0, 1, 0, 3, 1, 1, 3, 0], list(range(8))]
STATIC = ClusterProfile(CLUSTERS, "static", representatives=REPRESENTATIVES)


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "installed", lambda: ("vllm", "0.32.0"))


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    LlamaConfig(**sizes).save_pretrained(folder)
    Gemma2Config(
        **sizes, num_key_value_heads=8, head_dim=8, sliding_window=4
    ).save_pretrained(tmp_path / "sliding")  # fmt: skip
    return str(folder)


def saved(folder: Path, profile: ClusterProfile) -> str:
    profile.save(folder / "profile.json")
    return str(folder / "profile.json")


@pytest.mark.parametrize(
    ("profile", "options", "line"),
    [
        (ClusterProfile((8, 8, 8)), "", "3 layers in the profile, 2 in the model"),
        (STATIC, "-tp 3", "cannot be dealt to 3 ranks"),
        (STATIC, "--kv-cache-dtype fp8_e5m2", "--kv-cache-dtype auto or fp8"),
        (STATIC, "--attention-backend FLASH_ATTN", "leave out FLASH_ATTN"),
        (STATIC, "--attention_backend=TRITON_ATTN", "leave out TRITON_ATTN"),
        (STATIC, "-ac.backend FLASHINFER", "leave out FLASHINFER"),
        # vLLM takes ours in one place only, and a backend of a kind of layers before ours
        (STATIC, "-ac.backend CUSTOM", "leave out CUSTOM"),
        (STATIC, "-ac.backend_per_kind.full_attention FLASH_ATTN", "leave out backend_per_kind"),
        (STATIC, "--spec-method eagle3 --spec-model m", "drafts of a model"),
        (STATIC, "--block-size many", "--block-size is a number"),
        (STATIC, "--block-size 8", "takes multiples of 16"),
        (STATIC, "--block-size=24 --hf-overrides {}", "takes multiples of 16"),
        # a prefix is found by its first page
        (ClusterProfile(CLUSTERS), "--block-size 16", "add --block-size 32 or more"),
        (ClusterProfile(CLUSTERS, recent=4), "--block-size 16", "add --block-size 32 or more"),
        (ClusterProfile(CLUSTERS, window=60, probe_start=9), "", "add --block-size 80 or more"),
    ],
)
def test_one_line_before_vllm_starts(profile, options, line, model, tmp_path) -> None:
    with pytest.raises(ChaiError, match=line) as raised:
        vllm_command(model, saved(tmp_path, profile), options.split())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("profile", "options"),
    [
        (STATIC, "--block-size 16 --attention-backend custom"),
        (ClusterProfile(CLUSTERS), ""),
        (ClusterProfile(CLUSTERS), "--block-size 16 --no-enable-prefix-caching"),
        (ClusterProfile((8, 8)), "--block-size 16"),  # nothing to decide
        (ClusterProfile(CLUSTERS, recent=4), "--block-size 32"),
        (ClusterProfile((8, 8, 8)), "--hf-overrides {}"),  # another config than the folder's
    ],
)
def test_what_can_run_is_started(profile, options, model, tmp_path) -> None:
    command = vllm_command(model, saved(tmp_path, profile), options.split())
    assert ("--no-enable-prefix-caching" in command) == ("--no-enable" in options)


def test_sliding_windows_are_refused(model, tmp_path) -> None:
    with pytest.raises(ChaiError, match="sliding windows"):
        vllm_command(
            str(tmp_path / "sliding"), saved(tmp_path, ClusterProfile((8, 8))), []
        )  # fmt: skip


def test_the_models_own_profile(model) -> None:
    with pytest.raises(ChaiError, match=r"holds no chai_profile\.json: add --profile FILE"):
        vllm_command(model, None, [])
    STATIC.save(Path(model) / EXPORTED)
    command = vllm_command(model, None, [])
    given = json.loads(command[command.index("--additional-config") + 1])
    assert given == {"chai": {"profile": model}}


@pytest.mark.parametrize(
    "options",
    [
        ["--additional_config", '{"x": 1}'],
        ["--additional-config.x", "1"],
        ["--additional-config={}", "--additional_config={\"x\": 1}"],
    ],
)  # fmt: skip
def test_other_additional_configs_are_kept_beside_the_profile(options, model, tmp_path) -> None:
    command = vllm_command(model, saved(tmp_path, STATIC), options)
    places = [place for place, word in enumerate(command) if word.startswith("--additional")]
    assert len(places) == 1
    given = json.loads(command[places[0] + 1])
    assert given["chai"] == {"profile": str(tmp_path / "profile.json")}
    assert given["x"] == 1
