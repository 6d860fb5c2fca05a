"""Exported checkpoints: the same results as the profile they were made with."""

import errno

import pytest
import torch
from transformers import AutoModelForCausalLM

from chai_attention.errors import ProfileError, UnsupportedModelError
from chai_attention.integrations.transformers import disable, enable, enabled
from chai_attention.integrations.transformers.attention import is_enabled
from chai_attention.integrations.transformers.export import export
from chai_attention.integrations.transformers.modules import attention_modules, output_weight
from chai_attention.profile import ClusterProfile
from chai_attention.profile_files import EXPORTED
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

STATIC = ((0, 0, 2, 2, 2, 0), (0, 1, 2, 3, 4, 5), (3, 3, 3, 3, 3, 3))
COUNTS = (2, 6, 1)


def refit_profile(model, kind):
    weights = [output_weight(m) for m in attention_modules(model).values()]
    tensors = {}
    if kind == "output":
        tensors["layers.0.weight"] = weights[0] + 0.1 * torch.randn(weights[0].shape)
    if kind == "bias":
        tensors["layers.2.bias"] = torch.randn(weights[2].shape[0])
    return ClusterProfile(
        COUNTS, membership="static", representatives=STATIC,
        refit={"kind": kind} if tensors else None, corrections=tensors or None,
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "output"),
        ("llama", "bias"),
        ("llama", "none"),
        ("llama-grouped", "bias"),
        ("opt", "output"),
        ("opt", "bias"),
        ("gpt2", "output"),
        ("gpt2", "bias"),
    ],
)
def test_the_checkpoint_does_what_the_profile_did(family, kind, tmp_path):
    model = tiny_model(family)
    profile = refit_profile(model, kind)
    ids = torch.randint(3, 97, (2, 12))
    plain = model(ids).logits
    with enabled(model, profile):
        want = model(ids).logits
    path = export(model, tiny_tokenizer(), profile, tmp_path / "out")
    assert torch.equal(model(ids).logits, plain), "the model must be left as it was"
    assert not getattr(model.config, "attention_bias", False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    written = ClusterProfile.resolve(tmp_path / "out")
    assert written == ClusterProfile.load(path)
    assert written.refit is None
    with enabled(again, written):
        torch.testing.assert_close(again(ids).logits, want)


def test_the_profile_of_refit_weights_is_refused_for_those_without(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    plain, refit = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval(), tmp_path / "out"
    export(plain, tiny_tokenizer(), refit_profile(plain, "bias"), refit)
    written = ClusterProfile.resolve(refit)
    with pytest.raises(ProfileError, match="not the folder that chai export wrote"):
        enable(plain, written)
    assert not is_enabled(plain)
    for kind in ("none", "output"):  # other profiles take any weights
        enable(plain, refit_profile(plain, kind))
        disable(plain)
    # weights made of the export, with its profile beside them
    AutoModelForCausalLM.from_pretrained(refit).bfloat16().save_pretrained(tmp_path / "half")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    with pytest.raises(ProfileError, match=f"put its {EXPORTED} beside"):
        enable(half, written)
    written.save(tmp_path / "half" / EXPORTED)
    enable(half, written)


def test_a_bias_needs_a_place(tmp_path):
    model = tiny_model("mistral")
    with pytest.raises(UnsupportedModelError, match="--refit output"):
        export(model, tiny_tokenizer(), refit_profile(model, "bias"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    model = tiny_model("llama")
    with pytest.raises(ProfileError, match="not an empty folder"):
        export(model, tiny_tokenizer(), refit_profile(model, "none"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ProfileError, match="not an empty folder"):
        export(model, tiny_tokenizer(), refit_profile(model, "none"), tmp_path / "file")


def test_an_enabled_model_is_refused(tmp_path):
    """Its refit is in the weights already: a bias would be added twice."""
    model = tiny_model("opt")
    profile = refit_profile(model, "bias")
    with enabled(model, profile), pytest.raises(UnsupportedModelError, match="disable"):
        export(model, tiny_tokenizer(), profile, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(ProfileError, match="No space left on device"):
        export(model, tokenizer, refit_profile(model, "bias"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert not model.config.attention_bias
    after = model.state_dict()
    assert after.keys() == plain.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in plain.items())
