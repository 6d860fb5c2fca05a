"""Check the logits of a model with clustered heads, before its speed is measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.benchmarking.clustered import even_membership
from chai_attention.benchmarking.correctness import ROUNDING, WrongResultError, relative_error
from chai_attention.benchmarking.runners import Runner, make_runner
from chai_attention.integrations.transformers import enabled
from chai_attention.profile import STATIC, ClusterProfile
from chai_attention.runtime.shape import describe

BATCH, TOKENS, STEPS = 2, 48, 3
MOST = TOKENS + STEPS


def check_model(model: PreTrainedModel, profile: ClusterProfile) -> list[dict[str, Any]]:
    """Compare logits; twice what eager and fused attention differ by is allowed, and rounding.

    - With k = H, every head on its own, the logits are the plain model's.
    - With the profile's clusters, in a fixed membership, tokens read one by one behind a prompt
      get the logits that they get in one forward.

    Returns:
        Name, relative error and bound of each check.

    Raises:
        WrongResultError: logits differ.
    """
    shape = describe(model)
    ids = torch.randint(model.config.vocab_size, (BATCH, TOKENS + STEPS), device=model.device)
    before = model.config._attn_implementation
    logits = []
    try:
        for name in plain_implementations(model):
            model.set_attn_implementation(name)
            logits.append(_by_steps(make_runner(model, None, MOST), ids))
    finally:
        model.set_attn_implementation(before)
    noise = relative_error(logits[0], logits[-1])
    allowed = 2 * noise + ROUNDING[model.dtype]

    whole = ClusterProfile((shape.heads,) * shape.layers)
    with enabled(model, whole):
        same = _by_steps(make_runner(model, whole, MOST), ids)
    checks = [_check("k = H gives the plain model's logits", same, logits[-1], allowed)]
    fixed = _fixed(profile, shape.heads, shape.kv_heads)
    with enabled(model, fixed):
        steps = _by_steps(make_runner(model, fixed, MOST), ids)
        together = _together(make_runner(model, fixed, MOST), ids)
    checks.append(_check("tokens one by one as in one forward", steps, together, allowed))
    return checks


def plain_implementations(model: PreTrainedModel) -> tuple[str, ...]:
    """What transformers runs a model with: "eager" and, for most models, the fused "sdpa"."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:  # such as Gemma 2, whose scores are capped
        return ("eager",)
    finally:
        model.set_attn_implementation(before)
    return "eager", "sdpa"


def _by_steps(runner: Runner, ids: Tensor) -> Tensor:
    """Logits ``[B, 1 + STEPS, V]`` behind a prompt and the tokens after it, one at a time."""
    # a runner may write every step's logits to the same memory
    found = [runner.prefill(ids[:, :TOKENS]).clone()]
    found += [runner.step(ids[:, i : i + 1]).clone() for i in range(TOKENS, TOKENS + STEPS)]
    return torch.stack(found, 1)


def _together(runner: Runner, ids: Tensor) -> Tensor:
    """The same from prompts of every length."""
    found = [runner.prefill(ids[:, : TOKENS + i]).clone() for i in range(STEPS + 1)]
    return torch.stack(found, 1)


def _check(name: str, got: Tensor, want: Tensor, allowed: float) -> dict[str, Any]:
    error = relative_error(got, want)
    if not error <= allowed:
        raise WrongResultError(
            f"wrong logits ({name}): relative error {error:.2g} where {allowed:.2g} is allowed; "
            "nothing is reported"
        )
    return {"check": name, "error": error, "allowed": allowed}


def _fixed(profile: ClusterProfile, heads: int, kv_heads: int) -> ClusterProfile:
    """The profile with a membership that no rounding can change."""
    if profile.membership == STATIC:
        return profile
    group = heads // kv_heads
    rows = []
    for clusters in profile.clusters:
        if profile.target == "k-bytes" and group > 1:
            keys = even_membership(kv_heads, clusters // group, 1).representatives[0]
            rep = keys.repeat_interleave(group) * group + torch.arange(heads) % group
        else:
            rep = even_membership(heads, clusters, 1).representatives[0]
        rows.append(tuple(rep.tolist()))
    return replace(
        profile, membership=STATIC, representatives=tuple(rows), costs=None, blend=0.0,
        features="scores", probe_start=0,
    )  # fmt: skip
