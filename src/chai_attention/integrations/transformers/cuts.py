"""Which heads' rows of a layer's projections have to be computed, read off the family's code.

With a static membership nobody asks for Q and K of removed heads. Whether their rows can be left
out depends on what a family does between the projection and attention:

*compact*: the projection's output gets split by ``view(..., -1, head_dim)``, so that any number of
heads goes through. Q and K come out in the order of the cache, and so does V, whose rows are
permuted; nothing is gathered at run time.

*spread*: the code counts on H heads, or on one projection of Q, K and V. The rows that are needed
are computed, then copied to the places where the code expects them; removed heads get a copy of
some other head that nobody reads. Where too few rows go, the copy would cost more than they do,
and the projection stays whole.

*whole*: a head's Q or K depends on other heads' rows (a norm over the whole projection), or the
code or the modules are not known to treat every head by itself. Nothing is left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from chai_attention.integrations.transformers.plan import LayerPlan
from chai_attention.integrations.transformers.support import OUTPUTS, PLAIN
from chai_attention.membership import Membership

# All that the forward of an attention module may name: each is known to treat every head alike.
_PER_HEAD = frozenset((
    "ALL_ATTENTION_FUNCTIONS", "get_interface", "eager_attention_forward", "_attn_implementation",
    "apply_rotary_pos_emb", "rotary_ndims", "update", "config", "getattr", "layer_idx", "torch",
    "cat", "contiguous", "reshape", "shape", "size", "transpose", "view", "head_dim", "scaling",
    "training", "attention_dropout", "dropout", "attn_logit_softcapping", "sliding_window",
    "q_proj", "k_proj", "v_proj", *OUTPUTS,
    "q_norm", "k_norm", "q_layernorm", "k_layernorm", "qk_layernorm", "use_qk_norm",
    "use_rope", "is_sliding", "clamp_", "clip_qkv", "nn", "functional", "residual_dropout",
))  # fmt: skip
# Numbers of heads. A forward that names none leaves them to be inferred.
_COUNTS = frozenset(("num_heads", "num_attention_heads", "num_key_value_heads"))

# Attention with one projection for Q, K and V. Its shape does not tell the order of its rows:
# "blocks" has those of all heads' Q, then K, then V; "heads" has Q, K and V of head after head.
_FUSED: dict[str, tuple[str, type[nn.Module], str]] = {
    "transformers.models.gpt2.modeling_gpt2.GPT2Attention": ("c_attn", Conv1D, "blocks"),
    "transformers.models.phi3.modeling_phi3.Phi3Attention": ("qkv_proj", nn.Linear, "blocks"),
    "transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXAttention": (
        "query_key_value", nn.Linear, "heads",
    ),
}  # fmt: skip

# In prefill the copy takes as long as computing 5 to 20% of the rows, the fewer the larger the
# model. A spread projection has to lose at least this share of its rows.
SPREAD_SHARE = 1 / 8


@dataclass(frozen=True)
class Cut:
    """What is computed of one projection. Its rows are counted in heads of ``head_dim`` rows.

    Attributes:
        projection: an ``nn.Linear``, or a ``Conv1D`` as GPT-2 has them.
        heads: how many there are.
        kept: those that are computed, in the order in which they come out.
        places: which of the computed ones goes to each of the ``heads`` places; None if they
            leave the projection as they are.
    """

    projection: nn.Linear | Conv1D
    heads: int
    kept: tuple[int, ...]
    places: tuple[int, ...] | None = None

    @property
    def removed(self) -> tuple[int, ...]:
        """Those that are not computed, ascending."""
        return tuple(sorted(set(range(self.heads)) - set(self.kept)))


class WholeProjectionsError(Exception):
    """Why the projections of a layer cannot be cut; caught where they are asked for."""


def find_cuts(
    module: nn.Module, plan: LayerPlan, head_dim: int, shared: Collection[int]
) -> list[Cut]:
    """Return what to leave out of an attention module's projections; nothing is changed.

    Args:
        module: attention module of a supported model.
        plan: of its layer.
        head_dim: D.
        shared: ids of parameters that other modules use, too.

    Returns:
        No cut if the layer has no head to remove: it keeps all, has no static membership, or has
        an exact recent window, which needs every head's own Q and K.

    Raises:
        WholeProjectionsError: rows cannot be left out without changing results.
    """
    fixed = plan.full_attention and plan.representatives is not None
    if not fixed or plan.is_identity or plan.has_recent_window:
        return []
    member = plan.fixed_membership(1, torch.device("cpu"))
    queries, keys, values = (
        tuple(heads[0].tolist())
        for heads in (member.slot_heads, member.key_heads, member.value_heads)
    )
    kind = type(module)
    if "forward" in vars(module):
        raise WholeProjectionsError(f"the forward of {kind.__name__} has been replaced")
    fused = _FUSED.get(f"{kind.__module__}.{kind.__qualname__}")
    if fused is not None:
        return _spread([_fused_cut(module, fused, member, head_dim, shared)])

    counts = _counts_heads(module)
    projections: list[Any] = [getattr(module, f"{name}_proj", None) for name in "qkv"]
    sizes = (plan.heads, plan.kv_heads, plan.kv_heads)
    for projection, heads in zip(projections, sizes, strict=True):
        _require_plain(projection, nn.Linear, heads * head_dim, shared)
    one_by_one = _norms_one_by_one(module, plan, head_dim)
    cuts = [
        Cut(projection, heads, kept)
        for projection, heads, kept in zip(projections, sizes, (queries, keys, values), strict=True)
    ]
    if counts or one_by_one:
        return _spread(cuts[:2])  # V stays as it is
    return [cut for cut in cuts if cut.kept != tuple(range(cut.heads))]


def _spread(cuts: list[Cut]) -> list[Cut]:
    """Those of the cuts that are worth a copy, with everything at its place."""
    worth = [cut for cut in cuts if len(cut.removed) >= SPREAD_SHARE * cut.heads]
    if not worth:
        raise WholeProjectionsError(
            f"fewer than {SPREAD_SHARE:.1%} of a projection's rows could go, which a copy of its "
            "output would outweigh"
        )
    return [replace(cut, places=_places(cut)) for cut in worth]


def _places(cut: Cut) -> tuple[int, ...]:
    """Every computed head at its own place, the first one at those of removed heads."""
    at = {head: index for index, head in enumerate(cut.kept)}
    return tuple(at.get(head, 0) for head in range(cut.heads))


def _fused_cut(
    module: nn.Module,
    fused: tuple[str, type[nn.Module], str],
    member: Membership,
    head_dim: int,
    shared: Collection[int],
) -> Cut:
    """The cut of a projection that makes Q, K and V in one product."""
    name, kind, layout = fused
    heads, kv_heads = member.heads, member.kv_heads
    projection: Any = getattr(module, name, None)
    units = heads + 2 * kv_heads
    _require_plain(projection, kind, units * head_dim, shared)
    if layout == "blocks":
        first_key, first_value, step = heads, heads + kv_heads, 1
    else:
        first_key, first_value, step = 1, 2, 3
    kept = {step * head for head in member.slot_heads[0].tolist()}
    kept |= {first_key + step * head for head in member.key_heads[0].tolist()}
    kept |= {first_value + step * head for head in range(kv_heads)}
    return Cut(projection, units, tuple(sorted(kept)))


def _counts_heads(module: nn.Module) -> bool:
    """Whether the forward of a module counts heads; raises if it does anything unknown."""
    code = inspect.unwrap(type(module).forward).__code__
    texts = {text for text in code.co_consts if isinstance(text, str)}
    names = set(code.co_names) | (texts & _COUNTS)  # also getattr(config, "num_attention_heads")
    strange = sorted(names - _PER_HEAD - _COUNTS)
    if strange or any(inspect.iscode(constant) for constant in code.co_consts):
        raise WholeProjectionsError(
            f"{type(module).__name__} is not known to treat every head by itself"
            + (f": it uses {', '.join(strange)}" if strange else "")
        )
    return bool(names & _COUNTS)


def _require_plain(projection: Any, kind: type[Any], rows: int, shared: Collection[int]) -> None:
    """Refuse a projection that is more than a weight and a bias of our own."""
    reason = None
    if type(projection) is not kind:
        reason = f"is a {type(projection).__name__}, not a {kind.__name__}"
    elif "forward" in vars(projection) or any(
        (projection._forward_hooks, projection._forward_pre_hooks, projection._buffers)
    ):
        reason = "has hooks or buffers"
    elif set(projection._parameters) != {"weight", "bias"} or not all(
        map(_is_plain, projection._parameters.values())
    ):
        reason = "has weights that are quantised, offloaded or of a special kind"
    elif any(id(parameter) in shared for parameter in projection.parameters()):
        reason = "shares its weights with another module"
    elif (found := projection.weight.shape[int(kind is Conv1D)]) != rows:
        reason = f"has {found} rows instead of {rows}"
    if reason is not None:
        raise WholeProjectionsError(f"a projection {reason}")


def _is_plain(parameter: nn.Parameter | None) -> bool:
    """Whether a parameter is a tensor in memory and nothing else."""
    return parameter is None or (
        type(parameter) is nn.Parameter
        and type(parameter.data) is Tensor
        and parameter.dtype in PLAIN
        and not parameter.is_meta
    )


def _norms_one_by_one(module: nn.Module, plan: LayerPlan, head_dim: int) -> bool:
    """Whether heads have norms of their own; raises for modules that could mix heads."""
    if module._parameters or module._buffers:
        raise WholeProjectionsError(f"{type(module).__name__} has parameters of its own")
    one_by_one = False
    for name, child in module.named_children():
        if name in ("q_proj", "k_proj", "v_proj", *OUTPUTS) or isinstance(child, nn.Dropout):
            continue
        norms = [child]
        if list(child.children()):
            norms = [norm for part in child.children() for norm in part.children()]
            if len(norms) not in (plan.heads, plan.kv_heads):
                raise WholeProjectionsError(f"{name} is not known to treat every head by itself")
            one_by_one = True
        if not all(_is_head_norm(norm, head_dim) for norm in norms):
            raise WholeProjectionsError(f"{name} is not a norm over one head")
    return one_by_one


def _is_head_norm(norm: nn.Module, head_dim: int) -> bool:
    """Whether a module's parameters are of the size of one head, as are those of a norm over it."""
    shapes = {tuple(parameter.shape) for parameter in norm.parameters()}
    return shapes == {(head_dim,)} and not list(norm.children())
