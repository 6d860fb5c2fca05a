"""Names of models and data sets, checked before anything slow begins.

Local files come first. The hub is asked once and briefly: the libraries that download from it
go on trying for half a minute when it cannot be reached. Nothing here imports torch.
"""

from __future__ import annotations

import os
from functools import cache

from chai_attention.errors import ChaiError, LoadError, first_line

SMOLLM2 = "smollm2-135m"  # the model that the extra demo installs
SECONDS = 5.0  # that the hub gets to answer
_CONFIGS = ("config.json", "adapter_config.json")  # one of them makes a folder a model's


def is_gguf(name: str) -> bool:
    """Whether a model of this name is in a ``.gguf`` file."""
    return name == SMOLLM2 or name.endswith(".gguf")


def find_model(name: str) -> bool:
    """Check that a model's name leads somewhere.

    Args:
        name: a folder, a ``.gguf`` file, a name on the hub, or "smollm2-135m".

    Returns:
        Whether only files on this machine can be used: those of a folder, or a copy that was
        downloaded from the hub, which cannot be reached now.

    Raises:
        LoadError: a name that leads nowhere, or to something that is no model.
    """
    if name == SMOLLM2:
        return True
    if os.path.isdir(name):
        if not any(os.path.isfile(os.path.join(name, config)) for config in _CONFIGS):
            raise LoadError(f"cannot load {name}: this folder holds no config.json of a model")
        return True
    if name.endswith(".gguf"):
        if not os.path.isfile(name):
            raise LoadError(f"no such file: {name}")
        return True
    if os.path.lexists(name):
        raise LoadError(
            f"cannot load {name}: a model is a folder, a .gguf file or a name on the hub, and "
            "this is another file"
        )
    found, reason = _answer("model", name)
    if found is False:
        raise LoadError(
            f"no model {name!r}: neither a folder here nor a model of the hub: {reason}"
        )
    if found:
        return False
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, _CONFIGS[0]), str):
        return True
    raise LoadError(f"no model {name!r} here, and the hub cannot be reached ({reason})")


def require_dataset(name: str, error: type[ChaiError]) -> None:
    """Check that the hub has a data set.

    Args:
        name: ``name`` or ``name:config``.
        error: raised if it has none of that name, or cannot be reached.
    """
    repository = name.partition(":")[0]
    found, reason = _answer("dataset", repository)
    if found is False:
        raise error(f"{name} is neither a file nor a data set of the hub: {reason}")
    if found is None:
        raise error(
            f"{name} is neither a file nor a data set that can be streamed: the hub cannot be "
            f"reached ({reason})"
        )


@cache  # asked when a command line is read, and again by what loads
def _answer(kind: str, name: str) -> tuple[bool | None, str]:
    """Whether the hub has a repository, or None if it cannot be asked; and why not."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    api = HfApi()
    ask = api.model_info if kind == "model" else api.dataset_info
    try:
        ask(name, timeout=SECONDS)
    except HFValidationError:
        return False, "no name there is like this"
    except RepositoryNotFoundError:
        return False, "none is public there by this name (for a private one: hf auth login)"
    except Exception as error:  # a type for every way in which a network fails
        return None, first_line(error)
    return True, ""
