"""A checkpoint with a profile in it, its refit built into the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.errors import ProfileError, UnsupportedModelError
from chai_attention.integrations.transformers.corrections import Corrections
from chai_attention.integrations.transformers.support import (
    attention_modules,
    describe,
    output_projection,
)
from chai_attention.profile import EXPORTED, ClusterProfile

# families whose config can ask for biases of all four projections
_OPTIONAL_BIAS = ("llama",)


@torch.no_grad()
def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    profile: ClusterProfile,
    out: str | Path,
) -> Path:
    """Write a checkpoint that ``from_pretrained`` and vLLM load, with the profile in it.

    Enabling the written profile on the written model gives what enabling ``profile`` on ``model``
    gives. The model itself is left as it was.

    Args:
        model: without clustered heads.
        tokenizer: written beside it.
        profile: for this model.
        out: a folder that is empty or does not exist.

    Returns:
        The path of the written profile, ``chai_profile.json`` in the folder.

    Raises:
        ProfileError: the profile does not fit the model, or the folder cannot be used.
        UnsupportedModelError: a refit bias for a family whose output projection has none.
    """
    out = Path(out)
    profile.check(describe(model))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ProfileError(f"{out} is not an empty folder: export to a new one")
    if profile.refit is not None and profile.corrections is None:
        raise ProfileError("this profile has a refit but not its tensors: load it from its file")
    modules = attention_modules(model)
    tensors = dict(profile.corrections or {})
    biased = any(name.endswith(".bias") for name in tensors)
    bare = getattr(output_projection(modules[0]), "bias", None) is None
    added: list[nn.Linear] = []
    applied = Corrections(modules, {})
    try:
        if biased and bare:
            added = _add_biases(model, modules)
        applied = Corrections(modules, tensors)
        out.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise ProfileError(f"cannot write to {out}: {error.strerror}") from error
    finally:
        applied.undo()
        for projection in added:
            projection.bias = None  # type: ignore[assignment]
        if added:
            model.config.attention_bias = False
    note = {**(profile.provenance or {})}
    if profile.refit is not None:
        note["refit"] = f"{profile.refit['kind']}, built into the exported weights"
    written = replace(profile, refit=None, corrections=None, provenance=note)
    written.save(out / EXPORTED)
    return out / EXPORTED


def _add_biases(model: PreTrainedModel, modules: dict[int, nn.Module]) -> list[nn.Linear]:
    """Give all attention projections a bias of zeros, as the family's config can ask for."""
    kind = model.config.model_type
    if kind not in _OPTIONAL_BIAS:
        raise UnsupportedModelError(
            f"the output projection of {kind} has no bias, and its config cannot ask for one: "
            "calibrate with --refit output instead"
        )
    added: list[nn.Linear] = []
    for module in modules.values():
        for child in module.children():
            if isinstance(child, nn.Linear) and getattr(child, "bias", None) is None:
                zeros = torch.zeros_like(child.weight[:, 0])
                child.bias = nn.Parameter(zeros, requires_grad=False)
                added.append(child)
    model.config.attention_bias = True
    return added
