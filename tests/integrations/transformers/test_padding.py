"""What later forwards may say about tokens that a cache holds."""

from dataclasses import replace

import pytest
import torch

from chai_attention.errors import CacheError
from chai_attention.integrations.transformers import (
    ClusteredCache,
    StaticClusteredCache,
    enable,
    enabled,
)
from chai_attention.integrations.transformers.layer import ClusteredLayer
from chai_attention.profile import ClusterProfile
from helpers import definition, recent_definition
from tiny_models import tiny_model

MAPS = ((0, 0, 2, 2, 4, 4), (0, 1, 2, 3, 4, 5), (1, 1, 1, 5, 5, 5))
STATIC = ClusterProfile((3, 6, 2), "static", representatives=MAPS)
WINDOW = replace(STATIC, recent=4, sinks=2)
ONLINE = ClusterProfile((3, 6, 2), window=8)
HELD, NEW = 20, 4


def prompt(length, batch=2, seed=0):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def mask_of(length, *padding):
    """A mask of two sequences; ``padding`` are stretches of the second one."""
    mask = torch.ones(2, length, dtype=torch.long)
    for start, end in padding:
        mask[1, start:end] = 0
    return mask


CHANGED = {
    "left out": (mask_of(HELD, (0, 6)), None),
    "all real": (mask_of(HELD, (0, 6)), mask_of(HELD + NEW)),
    "less": (mask_of(HELD, (0, 6)), mask_of(HELD + NEW, (0, 5))),
    "hidden later": (None, mask_of(HELD + NEW, (0, 3))),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", CHANGED)
@pytest.mark.parametrize("steps", [NEW, 1])
def test_padding_that_changes_does_not_give_sinks_of_other_tokens(kind, steps):
    """K of clustered heads is held for the first real tokens only, which would be others."""
    before, after = CHANGED[kind]
    model, ids = tiny_model("llama"), prompt(HELD + NEW)
    enable(model, WINDOW)
    cache = ClusteredCache(model, WINDOW)
    model(ids[:, :HELD], attention_mask=before, past_key_values=cache)
    end = HELD + steps
    later = None if after is None else after[:, :end]
    with pytest.raises(CacheError, match=r"are padding has changed.*pass an attention_mask"):
        model(ids[:, HELD:end], attention_mask=later, past_key_values=cache)
    whole = mask_of(HELD + NEW) if before is None else torch.cat([before, mask_of(NEW)], 1)
    got = model(ids[:, HELD:], attention_mask=whole, past_key_values=cache).logits  # it goes on
    want = model(ids, attention_mask=whole, use_cache=False).logits[:, HELD:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


WAITING = [(ClusteredCache, (), kind) for kind in CHANGED]
# a static cache remembers the padding where no mask says otherwise
WAITING += [(StaticClusteredCache, (40,), kind) for kind in CHANGED if kind != "left out"]


@torch.no_grad()
@pytest.mark.parametrize(("cached", "room", "kind"), WAITING)
def test_padding_that_changes_does_not_mix_probe_windows(cached, room, kind):
    """Queries of the window's tokens wait in the cache; they would be those of others."""
    before, after = CHANGED[kind]
    model, ids, held = tiny_model("llama"), prompt(12), 7
    with enabled(model, ONLINE):
        cache = cached(model, ONLINE, *room)
        first = None if before is None else before[:, :held]
        model(ids[:, :held], attention_mask=first, past_key_values=cache)
        later = None if after is None else after[:, :12]
        with pytest.raises(CacheError, match="are padding has changed"):
            model(ids[:, held:], attention_mask=later, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["all real", "less", "hidden later"])
def test_padding_that_changes_is_refused_in_a_static_cache_with_a_window(kind):
    before, after = CHANGED[kind]
    model, ids = tiny_model("llama"), prompt(HELD + NEW)
    enable(model, WINDOW)
    cache = StaticClusteredCache(model, WINDOW, 40)
    model(ids[:, :HELD], attention_mask=before, past_key_values=cache)
    with pytest.raises(CacheError, match="are padding has changed"):
        model(ids[:, HELD:], attention_mask=after, past_key_values=cache)


LATER = {**CHANGED, "behind the sinks": (None, mask_of(HELD + NEW, (9, 12)))}
ALLOWED = [("static", STATIC, kind) for kind in LATER] + [("window", WINDOW, "behind the sinks")]


@torch.no_grad()
@pytest.mark.parametrize(("name", "profile", "kind"), ALLOWED)
def test_padding_may_change_where_nothing_depends_on_it(name, profile, kind, monkeypatch):
    """The first layer, whose K and V depend on no mask, against the definition."""
    seen = []
    attend = ClusteredLayer.attend

    def noted(self, query, padding, scale, softcap=None):
        states = (query, *self._incoming)
        out = attend(self, query, padding, scale, softcap)
        if self.plan.layer == 0:
            seen.append((*states, out, scale))
        return out

    monkeypatch.setattr(ClusteredLayer, "attend", noted)
    before, after = LATER[kind]
    model, ids = tiny_model("llama"), prompt(HELD + NEW)
    positions = torch.arange(HELD + NEW)[None].expand(2, -1)
    enable(model, profile)
    cache = ClusteredCache(model, profile)
    for part, mask in ((slice(0, HELD), before), (slice(HELD, None), after)):
        inputs = {"attention_mask": mask, "position_ids": positions[:, part]}
        model(ids[:, part], past_key_values=cache, **inputs)
    query, key, value = (torch.cat(states, 2) for states in list(zip(*seen, strict=True))[:3])
    scale, rep = seen[0][4], torch.tensor(MAPS[0]).expand(2, -1)
    valid = torch.ones(2, HELD + NEW, dtype=torch.bool) if after is None else after.bool()
    states = (query[:, :, HELD:], key, value, rep, scale)
    if profile.recent:
        want = recent_definition(*states, profile.recent, profile.sinks, valid=valid)
    else:
        want = definition(*states, valid=valid)
    torch.testing.assert_close(seen[1][3].double(), want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("profile", [WINDOW, ONLINE])
@pytest.mark.parametrize("held", [5, HELD])
def test_rows_that_are_picked_or_cropped_keep_their_padding(profile, held):
    model, ids = tiny_model("llama"), prompt(HELD + NEW)
    mask = mask_of(HELD + NEW, (0, 3))
    enable(model, profile)
    cache = ClusteredCache(model, profile)
    cache.activate_past_recording()
    model(ids[:, : held + 2], attention_mask=mask[:, : held + 2], past_key_values=cache)
    cache.crop(-2)
    rows = torch.tensor([1, 1, 0])
    cache.batch_select_indices(rows)
    ids, mask = ids[rows], mask[rows]
    got = model(ids[:, held:], attention_mask=mask, past_key_values=cache).logits
    want = model(ids, attention_mask=mask, use_cache=False).logits[:, held:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
