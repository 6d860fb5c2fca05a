"""What is beside a profile: a refit's weights, in a safetensors file, or those of an export."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chai_attention.atomic_write import place_of, read_whole, write_whole
from chai_attention.errors import ProfileError
from chai_attention.profile_checks import tensor_problems
from chai_attention.results import digest as digest_of

if TYPE_CHECKING:
    from torch import Tensor

EXPORTED = "chai_profile.json"  # in the folder of an exported model
BUILT_IN = "built into the exported weights"  # what its provenance says of a refit
MOST_BYTES = 2**36  # of a refit: the output weights of the largest models are a third of that


def corrections_file(profile: Path, digest: str = "0" * 8) -> Path:
    """Where a profile's refit is written: beside the file, not beside a link to it.

    It is named by its contents, so that the profile that was there before keeps its own; without
    their digest this is a name of the same length.
    """
    real = Path(place_of(profile))
    return real.with_name(f"{real.stem}-{digest[:8]}.safetensors")


def save_corrections(profile: Path, kind: str, corrections: Mapping[str, Tensor]) -> dict[str, str]:
    """Write a refit's tensors beside the file of its profile; return the profile's entry.

    Raises:
        ProfileError: tensors that cannot be used, or the file cannot be written.
    """
    from safetensors.torch import save

    if problems := tensor_problems(corrections):
        raise ProfileError("; ".join(problems))
    content = save({name: tensor.contiguous() for name, tensor in corrections.items()})
    digest = digest_of(content, digits=64)
    file = corrections_file(profile, digest)
    write_whole(file, content, ProfileError)
    return {"kind": kind, "file": file.name, "sha256": digest}


def load_corrections(profile: Path, refit: Mapping[str, str]) -> dict[str, Tensor]:
    """Read the tensors that a profile's entry names.

    Raises:
        ProfileError: no such file, another one of that name, none of tensors, or tensors that
            cannot be used.
    """
    from safetensors.torch import load

    name = refit["file"]
    if name in ("", "..") or Path(name).name != name:
        raise ProfileError(f"{profile}: the refit's file {name!r} must be one beside the profile")
    # links may lead to a profile alone, or to each of two files whose own names are others
    places = (profile.with_name(name), Path(place_of(profile)).with_name(name))
    file = next((place for place in places if os.path.exists(place)), places[0])
    try:
        content = read_whole(file, MOST_BYTES)
    except OSError as error:
        raise ProfileError(
            f"the refit of this profile is in {file}, which cannot be read ({error.strerror}): "
            "keep both files in one folder, or calibrate again"
        ) from error
    if digest_of(content, digits=64) != refit["sha256"]:
        raise ProfileError(
            f"{file} is not the file this profile was saved with: calibrate again, or restore it"
        )
    try:
        tensors: dict[str, Tensor] = load(content)
    except Exception as error:  # besides its own, the library's reader lets through many others
        raise ProfileError(f"{file} is no safetensors file: calibrate again") from error
    if problems := tensor_problems(tensors):
        raise ProfileError(f"{file}: {'; '.join(problems)}: calibrate again")
    return tensors


def holds_export(model: str | Path) -> bool:
    """Whether this is a folder with the profile that ``chai export`` puts beside weights."""
    return os.path.isfile(os.path.join(model, EXPORTED))


def require_refit_weights(provenance: Mapping[str, Any] | None, model: str) -> None:
    """Refuse weights without the refit that ``chai export`` built into a profile's.

    Args:
        provenance: the profile's.
        model: the folder of the weights, or their name; "" where neither is known.

    Raises:
        ProfileError: a folder without the file that the export puts beside such weights.
    """
    is_built_in = str((provenance or {}).get("refit")).endswith(BUILT_IN)
    if is_built_in and os.path.isdir(model) and not holds_export(model):
        raise ProfileError(
            f"this profile is of weights that hold its refit, and {model} is not the folder that "
            f"chai export wrote: take that one, or put its {EXPORTED} beside weights made of them"
        )
