"""Every supported family against the definition: prefill, decode, chunks, padding."""

import itertools

import pytest
import torch

from chai_attention.clustering.assign import assign, assign_by_cost
from chai_attention.integrations.transformers import ClusteredCache, enabled
from chai_attention.ops import window_gram, window_output_distances
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe
from helpers import random_membership
from tiny_models import CONFIGS, by_definition, tiny_model

WINDOW = 6
RECENT = {"recent": 5, "sinks": 2}
SETTINGS = {
    "static": {"membership": "static"},
    "online": {"membership": "online"},
    "static-recent": {"membership": "static", **RECENT},
    "online-recent": {"membership": "online", "probe_start": 3, **RECENT},
    "blend-recent": {"membership": "blend", "blend": 0.5, "features": "value", **RECENT},
    "k-bytes-recent": {"membership": "blend", "blend": 2.0, "probe_start": 1, "target": "k-bytes"},
}
SETTINGS["k-bytes-recent"].update(RECENT)
SETTINGS["static-streaming"] = {"membership": "static", "streaming": 2, **RECENT}
SETTINGS["online-streaming"] = {"membership": "online", "streaming": 1, "probe_start": 3, **RECENT}
# what one K/V head, or as many as there are heads, leave to choose
WITHOUT = {6: {"k-bytes-recent"}, 1: {"k-bytes-recent", "online-streaming"}}
CASES = [
    (family, setting)
    for family, config in sorted(CONFIGS.items())
    for setting in SETTINGS
    if setting not in WITHOUT.get(getattr(config(), "num_key_value_heads", 6), ())
]


def profile_for(model, membership="online", target="scores", streaming=0, **settings):
    """Clusters of different number per layer; layers that cannot be clustered keep all heads.

    ``streaming`` heads stream in every layer but one, where all do (static), or as many K/V heads.
    """
    shape = describe(model)
    heads, layers = shape.heads, shape.layers
    wanted = [3, 2, 4] if target == "scores" else [3, 6, 3]
    if streaming:
        wanted = [3, 1, 0] if membership == "static" else [2, 1, 3]
    clusters = [k if free else heads for k, free in zip(wanted, shape.clusterable, strict=True)]
    members = [None] * layers
    if membership == "static":
        count = [0 if k == heads else heads if k == 0 else streaming for k in clusters]
        members = [
            random_membership(heads, k, 1, shape.kv_heads, n)
            for k, n in zip(clusters, count, strict=True)
        ]
        settings["representatives"] = [m.representatives[0].tolist() for m in members]
        settings["streaming"] = [list(m.streaming) for m in members] if streaming else None
    elif streaming:
        group = heads // shape.kv_heads
        settings["streaming"] = [
            [] if k == heads else list(range(group, group * (1 + streaming))) for k in clusters
        ]
    if membership == "blend":
        settings["costs"] = torch.rand(layers, heads, heads).tolist()
    if settings.get("recent"):
        settings["offsets"] = torch.randn(layers, heads, heads).tolist()
    return ClusterProfile(tuple(clusters), membership, WINDOW, target, **settings)


def window_cost(profile, layer, query, key, value, **options):
    """What the window says against each pair of heads, and the static costs: ``[1, H, H]``."""
    if profile.features == "value":
        distance = window_output_distances(query, key, value, **options)
    else:
        gram = window_gram(query, key, **options)
        norm = gram.diagonal(dim1=1, dim2=2)
        distance = norm[:, :, None] + norm[:, None] - 2 * gram
    parts = [distance, torch.tensor(profile.costs[layer])[None]]
    pairs = ~torch.eye(distance.shape[-1], dtype=torch.bool)
    return parts[0] / parts[0][:, pairs].mean() + profile.blend * (
        parts[1] / parts[1][:, pairs].mean()
    )


def representatives_of(model, profile):
    """What the definition needs: own head up to the window's end, the cluster's behind it."""
    shape = describe(model)
    end = profile.probe_start + WINDOW
    softcap = getattr(model.config, "attn_logit_softcapping", None)

    def rule(layer, query, key, value, valid, scale):
        batch, heads, size, _ = query.shape
        own = torch.arange(heads).expand(batch, size, heads)
        clusters = profile.clusters[layer]
        far = torch.tensor([h for h in range(heads) if h not in profile.streaming_heads(layer)])
        if clusters == heads:
            return own
        if profile.representatives is not None:
            return torch.tensor(profile.representatives[layer]).expand(batch, size, heads)
        rows = []
        options = {"scale": scale, "softcap": softcap}
        for b in range(batch):
            window = valid[b].nonzero()[profile.probe_start : end, 0]
            q, k, v = (x[b : b + 1, :, window] for x in (query, key, value))
            kv = far[:: heads // shape.kv_heads] // (heads // shape.kv_heads)
            q, k, v = q[:, far], k[:, kv], v[:, kv]
            if profile.membership == "blend":
                cost = window_cost(profile, layer, q, k, v, **options)
                rep = assign_by_cost(cost, clusters, shape.kv_heads, profile.target)
            else:
                gram = window_gram(q, k, **options)
                rep = assign(gram, clusters, len(kv), profile.target)
            every = torch.arange(heads)
            every[far] = far[rep[0]]
            behind = (valid[b].cumsum(0) > end)[:, None]
            rows.append(torch.where(behind, every, own[b]))
        return torch.stack(rows)

    return rule


def forgetting(model, profile):
    """Which heads stream at which token: online, behind the probe window only."""
    heads = describe(model).heads
    end = profile.probe_start + WINDOW if profile.membership != "static" else 0

    def rule(layer, valid):
        flags = torch.zeros(heads, dtype=torch.bool)
        flags[list(profile.streaming_heads(layer))] = True
        probes = profile.clusters[layer] + flags.sum() < heads
        behind = valid.cumsum(1) > (end if probes else 0)
        return behind[..., None] & flags

    return rule if profile.streaming is not None else None


def check(family, setting, length, bounds):
    """A whole prefill, and one in chunks, against the definition."""
    model = tiny_model(family)
    profile = profile_for(model, **SETTINGS[setting])
    ids = torch.randint(3, 97, (2, length))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0  # left padding
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    real = mask.bool()

    def run(span, cache=None):
        return model(
            ids[:, span],
            attention_mask=mask[:, : span.stop],
            position_ids=positions[:, span],
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits

    offsets = None if profile.offsets is None else [torch.tensor(x) for x in profile.offsets]
    rule = representatives_of(model, profile)
    with torch.no_grad():
        plain = run(slice(0, length))
        forgets = forgetting(model, profile)
        with by_definition(model, rule, profile.recent, profile.sinks, offsets, forgets):
            want = run(slice(0, length))
        with enabled(model, profile):
            whole = run(slice(0, length))
            cache = ClusteredCache(model, profile)
            parts = [run(slice(a, b), cache) for a, b in itertools.pairwise(bounds)]
    assert (plain - want)[real].abs().max() > 1e-3, "the clusters should change the result"
    scale = want[real].abs().max()
    torch.testing.assert_close(whole[real] / scale, want[real] / scale, atol=2e-5, rtol=0)
    chunked = torch.cat(parts, 1)
    torch.testing.assert_close(chunked[real] / scale, want[real] / scale, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("family", "setting"), CASES)
def test_family_is_the_definition(family, setting):
    # a chunk shorter than the window, one token, past the window of one row only, rest
    check(family, setting, 24, [0, 11, 12, 14, 21, 22, 23, 24])


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_long_prompt_is_the_definition(setting):
    """Long enough to be clustered at once, K of all heads never stored."""
    check("llama-grouped", setting, 150, [0, 60, 61, 62, 149, 150])


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_generate_runs_and_leaves_the_model_as_it_was(family):
    model = tiny_model(family)
    ids = torch.randint(3, 97, (1, 9))
    with torch.no_grad():
        before = model(ids).logits
        with enabled(model, profile_for(model, "online")):
            out = model.generate(
                ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True
            )
            assert isinstance(out.past_key_values, ClusteredCache)
        torch.testing.assert_close(model(ids).logits, before, atol=0, rtol=0)
