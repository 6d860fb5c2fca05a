"""Every supported family against the definition: prefill, decode, chunks, padding."""

import itertools

import pytest
import torch

from chai_attention.clustering.assign import assign
from chai_attention.integrations.transformers import ClusteredCache, enabled
from chai_attention.integrations.transformers.support import describe
from chai_attention.ops import window_gram
from chai_attention.profile import ClusterProfile
from helpers import random_representatives
from tiny_models import CONFIGS, by_definition, tiny_model

WINDOW = 6


def profile_for(model, membership):
    """Clusters of different number per layer; layers that cannot be clustered keep all heads."""
    shape = describe(model)
    wanted = [3, 2, 4]
    clusters = [
        k if free else shape.heads for k, free in zip(wanted, shape.clusterable, strict=True)
    ]
    rep = None
    if membership == "static":
        rep = tuple(tuple(random_representatives(shape.heads, k)[0].tolist()) for k in clusters)
    return ClusterProfile(
        clusters=tuple(clusters),
        membership=membership,
        window=WINDOW,
        target="scores",
        representatives=rep,
    )


def representatives_of(model, profile):
    """What the definition needs: own head inside the window, the cluster's behind it."""
    shape = describe(model)

    def rule(layer, query, key, valid, scale):
        batch, heads, size, _ = query.shape
        own = torch.arange(heads).expand(batch, size, heads)
        if profile.clusters[layer] == heads:
            return own
        if profile.representatives is not None:
            return torch.tensor(profile.representatives[layer]).expand(batch, size, heads)
        rows = []
        for b in range(batch):
            first = valid[b].nonzero()[:WINDOW, 0]
            softcap = getattr(model.config, "attn_logit_softcapping", None)
            q, k = query[b : b + 1, :, first], key[b : b + 1, :, first]
            gram = window_gram(q, k, scale=scale, softcap=softcap)
            rep = assign(gram, profile.clusters[layer], shape.kv_heads, profile.target)
            behind = (valid[b].cumsum(0) > WINDOW)[:, None]
            rows.append(torch.where(behind, rep, own[b]))
        return torch.stack(rows)

    return rule


@pytest.mark.parametrize("membership", ["static", "online"])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_family_is_the_definition(family, membership):
    model = tiny_model(family)
    profile = profile_for(model, membership)
    ids = torch.randint(3, 97, (2, 24))
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

    with torch.no_grad():
        plain = run(slice(0, 24))
        with by_definition(model, representatives_of(model, profile)):
            want = run(slice(0, 24))
        with enabled(model, profile):
            whole = run(slice(0, 24))
            # a chunk shorter than the window, one token, past the window of one row only, rest
            cache = ClusteredCache(model, profile)
            bounds = [0, 11, 12, 14, 21, 22, 23, 24]
            parts = [run(slice(a, b), cache) for a, b in itertools.pairwise(bounds)]
    assert (plain - want)[real].abs().max() > 1e-3, "the clusters should change the result"
    scale = want[real].abs().max()
    torch.testing.assert_close(whole[real] / scale, want[real] / scale, atol=2e-5, rtol=0)
    chunked = torch.cat(parts, 1)
    torch.testing.assert_close(chunked[real] / scale, want[real] / scale, atol=2e-5, rtol=0)


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
