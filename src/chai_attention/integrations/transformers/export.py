"""A checkpoint with a profile in it, its refit built into the weights."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.atomic_write import require_folder
from chai_attention.errors import ProfileError, UnsupportedModelError
from chai_attention.integrations.transformers.attention import is_enabled
from chai_attention.integrations.transformers.corrections import Corrections
from chai_attention.integrations.transformers.modules import attention_modules, output_projection
from chai_attention.profile import ClusterProfile
from chai_attention.profile_files import BUILT_IN, EXPORTED
from chai_attention.runtime.shape import describe

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
        UnsupportedModelError: a refit bias for a family whose output projection has none, or
            clustered heads are enabled.
    """
    require_empty(Path(out))
    shown, out = Path(out), Path(os.path.realpath(out))
    if is_enabled(model):
        # its refit may be in the weights already, and would be written twice
        raise UnsupportedModelError("disable(model) before exporting it")
    profile.check(describe(model))
    modules = attention_modules(model)
    tensors = dict(profile.corrections or {})
    biased = any(name.endswith(".bias") for name in tensors)
    bare = getattr(output_projection(modules[0]), "bias", None) is None
    added: list[nn.Linear] = []
    applied = Corrections(modules, {})
    unfinished: Path | None = None
    try:
        if biased and bare:
            added = _add_biases(model, modules)
        applied = Corrections(modules, tensors)
        # a checkpoint is there as a whole or not at all
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = out.parent / f".chai-{secrets.token_hex(8)}"
        unfinished.mkdir()
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        _without_refit(profile).save(unfinished / EXPORTED)
        if out.exists():  # and empty: its mode stays
            unfinished.chmod(stat.S_IMODE(out.stat().st_mode))
        unfinished.replace(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ProfileError(f"cannot write to {shown}: {reason}") from error
    finally:
        if unfinished is not None and unfinished.exists():
            shutil.rmtree(unfinished)
        applied.undo()
        for projection in added:
            projection.bias = None  # type: ignore[assignment]
        if added:
            model.config.attention_bias = False
    return shown / EXPORTED


def require_empty(out: Path) -> None:
    """Refuse a folder that an export would mix with other files, or could not write.

    Raises:
        ProfileError: it is no folder, holds something, or cannot be written.
    """
    if os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise ProfileError(f"{out} is not an empty folder: export to a new one")
    require_folder(out, ProfileError)


def _without_refit(profile: ClusterProfile) -> ClusterProfile:
    """The profile for weights that hold its refit."""
    if profile.refit is None:
        return profile
    kind = profile.refit["kind"]
    note = {**(profile.provenance or {}), "refit": f"{kind}, {BUILT_IN}"}
    return replace(profile, refit=None, corrections=None, provenance=note)


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
