"""Costs of pairs of heads against their definition, computed one pair at a time in float64."""

import weakref
from contextlib import contextmanager

import pytest
import torch

from chai_attention.calibration import backward, calibrate, costs, pairs
from chai_attention.calibration.costs import ExactWindow, OffsetStatistics, collect_costs
from chai_attention.calibration.statistics import observe
from chai_attention.errors import CalibrationError
from chai_attention.integrations.transformers.intervene import capture
from chai_attention.integrations.transformers.modules import attention_modules
from tiny_models import tiny_model

SIZE, HEADS = 20, 6
WINDOW, SINKS = 4, 2


def observed(model, ids):
    """Every layer's attention call, and the gradient of the summed loss at its output."""
    calls, outs = {}, {}

    def keep(call, out):
        out.retain_grad()
        calls[call.layer], outs[call.layer] = call, out

    with capture(model, keep):
        logits = model(ids, use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        ).backward()
    model.zero_grad()
    return {layer: (calls[layer], outs[layer].grad.double()) for layer in calls}


def scores_of(call):
    group = HEADS // call.key.shape[1]
    key = call.key.double().repeat_interleave(group, 1)
    scores = call.query.double() @ key.mT * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    return scores, call.value.double().repeat_interleave(group, 1)


def output_columns(module, head, dim):
    """``[out, D]`` of the output weights that belong to a head."""
    if hasattr(module, "c_proj"):
        return module.c_proj.weight.double().T[:, head * dim : (head + 1) * dim]
    projection = getattr(module, "o_proj", None) or module.out_proj
    return projection.weight.double()[:, head * dim : (head + 1) * dim]


@pytest.mark.parametrize("window", ["no window", "window"])
@pytest.mark.parametrize("kind", ["value", "gradient"])
@pytest.mark.parametrize("family", ["llama", "llama-grouped", "opt", "gemma2", "gpt2"])
def test_costs_are_their_definition(family, kind, window):
    model = tiny_model(family)
    ids = torch.randint(3, 97, (3, SIZE))
    offsets = torch.randn(3, HEADS, HEADS) / 2
    window = ExactWindow() if window == "no window" else ExactWindow(WINDOW, SINKS, offsets)
    (got,) = collect_costs(model, ids, kind, exact=[window], batch_size=2)
    position = torch.arange(SIZE)
    behind = position[:, None] - position
    is_local = (behind < WINDOW) | (position < SINKS)
    modules = attention_modules(model)
    assert (got.streaming is None) == (not window.recent)
    for layer, (call, gradient) in observed(model, ids).items():
        scores, value = scores_of(call)
        scores = scores.masked_fill(behind < 0, -torch.inf)
        own = scores.softmax(-1)
        want = torch.zeros(HEADS, HEADS + 1, dtype=torch.float64)
        for h in range(HEADS):
            for r in range(HEADS + 1 if window.recent else HEADS):
                if h == r:
                    continue
                if r == HEADS:
                    used = scores[:, h].masked_fill(~is_local, -torch.inf)
                elif window.recent:
                    used = torch.where(is_local, scores[:, h], scores[:, r] + offsets[layer, h, r])
                else:
                    used = scores[:, r]
                change = (used.softmax(-1) - own[:, h]) @ value[:, h]  # [B, S, D]
                if kind == "gradient":
                    want[h, r] = (gradient[:, :, h] * change).sum(-1).square().sum()
                else:
                    columns = output_columns(modules[layer], h, change.shape[-1])
                    want[h, r] = (change @ columns.T).square().sum()
        want /= ids.numel()
        torch.testing.assert_close(got.sharing[layer], want[:, :HEADS], rtol=1e-3, atol=1e-9)
        if got.streaming is not None:
            torch.testing.assert_close(got.streaming[layer], want[:, HEADS], rtol=1e-3, atol=1e-9)


class Runs:
    """Counts the forward passes of a model."""

    def __init__(self, model):
        self.count = 0
        model.base_model.register_forward_hook(lambda *args: self.add())

    def add(self):
        self.count += 1


@pytest.mark.parametrize("rows", [3, 256])
@pytest.mark.parametrize("sinks", [0, 2, 7])
@pytest.mark.parametrize("kind", ["value", "gradient"])
def test_windows_told_together_cost_what_each_costs_alone(kind, sinks, rows, monkeypatch):
    """Windows up to longer than the text, sinks of more than a block of queries, any order."""
    monkeypatch.setattr(pairs, "ROWS", rows)
    model = tiny_model("llama-grouped")
    ids = torch.randint(3, 97, (3, SIZE))
    exact = [ExactWindow(w, sinks, torch.randn(3, HEADS, HEADS)) for w in (4, 1, 19, 9, 40)]
    runs = Runs(model)
    together = collect_costs(model, ids, kind, exact=exact, batch_size=2)
    assert runs.count == 2
    for window, got in zip(exact, together, strict=True):
        (alone,) = collect_costs(model, ids, kind, exact=[window])
        torch.testing.assert_close(got.sharing, alone.sharing, rtol=1e-4, atol=1e-10)
        torch.testing.assert_close(got.streaming, alone.streaming, rtol=1e-4, atol=1e-10)
    assert together[-1].streaming.abs().max() < 1e-10  # everything is window
    assert together[-1].sharing.abs().max() < 1e-10


def test_far_keys_of_other_heads_cost_more_the_narrower_the_window():
    model = tiny_model("llama")
    ids = torch.randint(3, 97, (3, SIZE))
    found = collect_costs(model, ids, "gradient", exact=[ExactWindow(w) for w in (2, 5, 18)])
    costs = [entry.streaming.sum().item() for entry in found]
    assert costs == sorted(costs, reverse=True)


def test_only_tokens_that_count_have_a_loss():
    """The loss of some tokens; a window with few of them weighs as much as one with many."""
    model = tiny_model("llama")
    ids = torch.randint(3, 97, (2, SIZE))
    counted = torch.zeros(2, SIZE, dtype=torch.bool)
    counted[0, 5], counted[1, 11:15] = True, True
    (got,) = collect_costs(
        model, ids, "gradient", exact=[ExactWindow(WINDOW, SINKS)], counted=counted
    )
    want = []
    for row in range(2):
        calls, outs = {}, {}

        def keep(call, out, calls=calls, outs=outs):
            out.retain_grad()
            calls[call.layer], outs[call.layer] = call, out

        with capture(model, keep):
            logits = model(ids[row : row + 1], use_cache=False).logits[0]
            loss = -logits.log_softmax(-1)
            sum(loss[t - 1, ids[row, t]] for t in counted[row].nonzero()[:, 0]).backward()
        behind = torch.arange(SIZE)[:, None] - torch.arange(SIZE)
        is_local = (behind < WINDOW) | (torch.arange(SIZE) < SINKS)
        layers = []
        for layer in sorted(calls):
            scores, value = scores_of(calls[layer])
            scores = scores.masked_fill(behind < 0, -torch.inf)
            window = scores.masked_fill(~is_local, -torch.inf)
            change = ((window.softmax(-1) - scores.softmax(-1)) @ value)[0].transpose(0, 1)
            slope = outs[layer].grad[0].double()
            layers.append((slope * change).sum(-1).square().sum(0) / counted[row].sum())
        want.append(torch.stack(layers))
    torch.testing.assert_close(got.streaming, sum(want) / 2, rtol=1e-3, atol=1e-9)


def test_all_tokens_count_where_none_are_named():
    model, ids = tiny_model("opt"), torch.randint(3, 97, (2, SIZE))
    (plain,) = collect_costs(model, ids, "gradient")
    (named,) = collect_costs(
        model, ids, "gradient", counted=torch.ones(ids.shape, dtype=torch.bool)
    )
    assert torch.equal(plain.sharing, named.sharing)


@pytest.mark.parametrize("wrong", ["shape", "no token", "only the first"])
def test_tokens_that_cannot_count_are_refused(wrong):
    counted = torch.ones(2, SIZE + (wrong == "shape"), dtype=torch.bool)
    if wrong != "shape":
        counted[1, (1 if wrong == "only the first" else 0) :] = False
    with pytest.raises(ValueError, match="a token after the first in every row"):
        collect_costs(tiny_model("llama"), torch.ones(2, SIZE).long(), "gradient", counted=counted)


def test_value_costs_know_no_loss():
    counted = torch.ones(1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="gradient costs only"):
        collect_costs(tiny_model("llama"), torch.ones(1, 5).long(), "value", counted=counted)


@pytest.mark.parametrize(
    "exact",
    [
        [ExactWindow(4, 2), ExactWindow(8, 4)],
        [ExactWindow(), ExactWindow(4)],
        [ExactWindow(4), ExactWindow(4)],
        [],
    ],
)
def test_windows_that_cannot_be_told_together_are_refused(exact):
    with pytest.raises(ValueError, match="equal sinks"):
        collect_costs(tiny_model("llama"), torch.ones(1, 5).long(), "value", exact=exact)


def test_offsets_are_the_weighted_mean_difference():
    model = tiny_model("llama")
    ids = torch.randint(3, 97, (2, SIZE))
    wider = ExactWindow(WINDOW + 5, SINKS)
    statistics = OffsetStatistics(3, HEADS, [wider, ExactWindow(WINDOW, SINKS)])
    observe(model, ids, [statistics.add], batch_size=1)
    got = statistics.offsets[1]
    position = torch.arange(SIZE)
    behind = position[:, None] - position
    is_local = (behind < WINDOW) | (position < SINKS)
    for layer, (call, _) in observed(model, ids).items():
        scores = scores_of(call)[0].masked_fill(behind < 0, -torch.inf)
        far = scores.masked_fill(is_local, -torch.inf).logsumexp(-1)  # [B, H, S]
        share = (far - scores.logsumexp(-1)).exp()
        seen = far.isfinite()[:, 0]
        for h in range(HEADS):
            weight = (share * (1 - share))[:, h][seen]
            for r in range(HEADS):
                want = (weight * (far[:, h] - far[:, r])[seen]).sum() / weight.sum()
                assert got[layer, h, r].item() == pytest.approx(want.item(), abs=1e-4)


def test_recomputed_activations_give_the_same_costs(monkeypatch):
    model, ids = tiny_model("llama-grouped"), torch.randint(3, 97, (3, SIZE))
    (kept,) = collect_costs(model, ids, "gradient")
    monkeypatch.setattr(backward, "KEEP_BYTES", 0)
    assert torch.equal(collect_costs(model, ids, "gradient")[0].sharing, kept.sharing)


def test_activations_that_are_recomputed_are_not_kept_until_then(monkeypatch):
    """Q, K and V of all layers took more memory than anything else of a large model."""
    monkeypatch.setattr(backward, "KEEP_BYTES", 0)
    model, alive, most = tiny_model("llama"), [], 0

    @contextmanager
    def watched(model, callback):
        def noted(call, out):
            nonlocal most
            alive.append(weakref.ref(call))
            callback(call, out)
            del call
            most = max(most, sum(ref() is not None for ref in alive))

        with capture(model, noted):
            yield

    monkeypatch.setattr(costs, "capture", watched)
    collect_costs(model, torch.randint(3, 97, (3, SIZE)), "gradient", batch_size=1)
    assert len(alive) == 3 * 3 * 2  # windows, layers, forwards
    assert most == 1


@pytest.mark.parametrize("keep", [0, 1e9])
def test_the_model_is_left_as_it_was(keep, monkeypatch):
    monkeypatch.setattr(backward, "KEEP_BYTES", keep)
    model = tiny_model("llama")
    layer = model.model.layers[0]
    model.lm_head.weight.requires_grad_(False)
    model.train()
    collect_costs(model, torch.randint(3, 97, (2, 9)), "gradient")
    assert model.training
    assert "forward" not in layer.__dict__
    assert not model.lm_head.weight.requires_grad
    assert model.model.embed_tokens.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model(torch.ones(1, 3, dtype=torch.long)).logits.requires_grad


def test_a_quantised_model_has_no_gradient_costs():
    model = tiny_model("llama")
    model.is_quantized = True
    with pytest.raises(CalibrationError, match="use --cost value or --cost scores"):
        collect_costs(model, torch.ones(1, 5, dtype=torch.long), "gradient")


def test_progress_counts_windows():
    seen = []
    collect_costs(
        tiny_model("llama"),
        torch.randint(3, 97, (5, 9)),
        "gradient",
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


class Quantised(torch.nn.Module):
    """A projection with weights of 8 bits and no backward pass, as of a quantised model."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x.detach() @ (self.weight.float() * self.scale).T


@pytest.mark.parametrize(
    "names", [("q_proj", "k_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), ("o_proj",)]
)
def test_layers_that_no_gradient_reaches_do_not_count_as_free(names):
    model = tiny_model("llama")
    for name in names:
        attention = model.model.layers[1].self_attn
        setattr(attention, name, Quantised(getattr(attention, name)))
    with pytest.raises(CalibrationError, match="no gradient reaches the attention of layer 1"):
        collect_costs(model, torch.randint(3, 97, (2, 9)), "gradient")


def test_what_a_quantised_model_is_advised_to_do_works():
    model = tiny_model("llama")
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Quantised(getattr(layer.self_attn, name)))
    model.is_quantized = True
    ids = torch.randint(3, 97, (30, 24))
    options = {"length": 24, "samples": 20, "held_out": 10, "removed": 0.2, "recent": 0}
    with pytest.raises(CalibrationError, match=r"or use --cost scores$"):
        calibrate(model, None, ids, **options)
    profile = calibrate(model, None, ids, cost="scores", membership="static", **options)
    assert profile.promise["windows"] == 10


def test_sums_go_on_where_they_stopped():
    model, ids = tiny_model("llama"), torch.randint(3, 97, (6, 9))
    options = {"batch_size": 2, "exact": [ExactWindow(6), ExactWindow(2)]}
    want = collect_costs(model, ids, "gradient", **options)
    sums = torch.zeros(2, 3, 6, 7, dtype=torch.float64)

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_costs(model, ids, "gradient", sums=sums, progress=stop, **options)
    got = collect_costs(model, ids, "gradient", sums=sums, start=4, **options)
    for here, there in zip(got, want, strict=True):
        assert torch.equal(here.sharing, there.sharing)
        assert torch.equal(here.streaming, there.streaming)


def test_costs_are_computed_in_float32_under_autocast():
    model, ids = tiny_model("llama"), torch.randint(3, 97, (2, 20))
    want = collect_costs(model, ids, "value")[0].sharing
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = collect_costs(model, ids, "value")[0].sharing
    assert (got - want).abs().max() < 0.05 * want.abs().max()
