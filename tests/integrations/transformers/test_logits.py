"""Losses of blocks of tokens are the model's own, and no logits of a whole text are made."""

import pytest
import torch

from chai_attention import ClusterProfile, enabled
from chai_attention.calibration import costs
from chai_attention.calibration.perplexity import token_loss
from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers import logits, plain
from chai_attention.integrations.transformers.intervene import capture
from chai_attention.integrations.transformers.logits import (
    rows_at_once,
    summed_loss,
    token_losses,
)
from chai_attention.ops import cpu_attention, reference_backend
from largest_tensor import largest_tensor
from tiny_models import CONFIGS, tiny_model

VOCABULARY = 97
FAMILIES = sorted(CONFIGS)


@pytest.fixture(params=[1, 7, 32])
def in_blocks(request, monkeypatch):
    """Blocks of so many tokens of two rows: of one, of some that do not divide, of almost all."""
    monkeypatch.setattr(logits, "LOGITS", 2 * VOCABULARY * request.param + 5)


def tokens(size=34):
    return torch.randint(3, VOCABULARY, (2, size), generator=torch.Generator().manual_seed(0))


def plain_losses(model, ids):
    with torch.no_grad():
        found = model(ids, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(found.mT, ids[:, 1:], reduction="none")


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_blocks_are_the_models_own(family, in_blocks):
    model, ids = tiny_model(family), tokens()
    torch.testing.assert_close(token_losses(model, ids), plain_losses(model, ids))


@pytest.mark.parametrize("only", ["all", "some", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_blocks_are_those_of_the_whole_loss(family, only, in_blocks):
    model, ids = tiny_model(family), tokens()
    counted = None
    if only != "all":
        counted = torch.zeros(ids.shape, dtype=torch.bool)
        counted[:, -1 if only == "last" else slice(9, 13)] = True
    found = []
    for block in (logits.LOGITS, 1 << 27):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logits, "LOGITS", block)
            weights = model.get_input_embeddings().weight
            wanted = [p for p in model.parameters() if p.requires_grad and p is not weights]
            for parameter in wanted:
                parameter.requires_grad_(False)
            weights.grad = None
            tied = model.get_output_embeddings().weight is weights
            if tied:  # of the part below the hidden states alone
                model.lm_head.weight = torch.nn.Parameter(weights.detach().clone(), False)
            loss = summed_loss(model, ids, counted)
            loss.backward()
            found.append((loss.detach(), weights.grad))
            for parameter in wanted:
                parameter.requires_grad_(True)
            if tied:
                model.tie_weights()
    (loss, gradient), (want, want_gradient) = found
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-4, atol=1e-5)
    assert want_gradient.abs().max() > 0


def test_no_logits_of_a_whole_text_are_made(monkeypatch):
    """In the backward pass neither."""
    monkeypatch.setattr(logits, "LOGITS", 40 * VOCABULARY)
    model, ids = tiny_model("llama"), tokens(200)[:1]
    most = 4 * 200 * 48  # rotary embeddings, MLPs, hidden states of the text
    with largest_tensor() as made:
        token_losses(model, ids)
    assert made.numbers <= max(40 * VOCABULARY, most) < 200 * VOCABULARY * 2
    with largest_tensor() as made:
        summed_loss(model, ids).backward()
    assert 97 * 48 <= made.numbers < 200 * VOCABULARY


def test_the_model_is_left_as_it_was(in_blocks):
    model, ids = tiny_model("opt"), tokens()
    own = model.model.decoder.forward
    model.model.decoder.forward = own  # as accelerate's hooks leave one on the module
    with torch.no_grad():
        want = model(ids).logits
        token_losses(model, ids)
        assert torch.equal(model(ids).logits, want)
    assert vars(model.model.decoder)["forward"] is own
    assert "forward" not in vars(model.model)
    model.lm_head.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        token_losses(model, ids)
    assert "forward" not in vars(model.model)


@pytest.mark.parametrize("recent", [0, 6])
def test_clustered_heads_are_scored_in_blocks_too(recent, in_blocks, monkeypatch):
    model, ids = tiny_model("llama"), tokens()
    profile = ClusterProfile(
        (2, 6, 3), membership="online", window=5, recent=recent, sinks=2 if recent else 0
    )
    with enabled(model, profile):
        got = token_loss(model, ids)
        monkeypatch.setattr(logits, "LOGITS", 1 << 27)
        want = token_loss(model, ids)
    assert got.per_sequence == pytest.approx(want.per_sequence, rel=1e-5)


@pytest.mark.parametrize("code", ["blocked", "torch"])
@pytest.mark.parametrize("kind", ["static", "online", "window", "streaming"])
def test_an_evaluation_makes_nothing_that_grows_with_the_square_of_the_length(kind, code):
    """On the CPU, by both of its codes; operations of torch included."""
    model, size = tiny_model("llama"), 1500
    model.config.max_position_embeddings = size
    window = {"recent": 32, "sinks": 4} if kind in ("window", "streaming") else {}
    rep, clusters, streaming = (0, 0, 0, 3, 3, 3), 2, None
    if kind == "streaming":
        rep, clusters, streaming = (0, 0, 0, 0, 4, 5), 1, ((4, 5),) * 3
    static = {"representatives": (rep,) * 3, "streaming": streaming}
    profile = ClusterProfile(
        (clusters,) * 3,
        **({"membership": "online"} if kind == "online" else {"membership": "static", **static}),
        **window,
    )
    with enabled(model, profile), cpu_attention(code), largest_tensor() as made:
        token_losses(model, tokens(size)[:1])
    assert made.numbers <= 300 * size < size * size / 4


def test_a_model_that_cannot_be_halved_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(logits, "LOGITS", 100)
    model = tiny_model("llama")
    whole = model.forward
    model.forward = lambda ids, use_cache: whole.__func__(_Unpatched(model), ids, use_cache=False)
    with pytest.raises(UnsupportedModelError, match="Use shorter texts") as told:
        token_losses(model, tokens())
    assert "\n" not in str(told.value)


class _Unpatched:
    """A model whose forward does not call the decoder inside it."""

    def __init__(self, model):
        self._model = model
        self.config, self.lm_head = model.config, model.lm_head

    def model(self, *args, **kwargs):
        return type(self._model.model).forward(self._model.model, *args, **kwargs)


@pytest.mark.parametrize(
    ("rows", "length", "want"),
    [(8, 1024, 8), (8, 4096, 8), (8, 8192, 4), (8, 32_768, 1), (8, 100_000, 1), (1, 5, 1)],
)
def test_long_windows_go_through_the_model_with_fewer_others(rows, length, want):
    assert rows_at_once(rows, length) == want


def test_batches_of_long_windows_are_smaller_everywhere(monkeypatch):
    monkeypatch.setattr(logits, "MOST_TOKENS", 70)
    model, ids = tiny_model("llama"), torch.randint(3, VOCABULARY, (5, 34))
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or [kwargs["input_ids"]])[0].shape[0]),
        with_kwargs=True,
    )
    token_loss(model, ids, batch_size=5)
    costs.collect_costs(model, ids, "gradient", batch_size=5)
    assert set(seen) == {1, 2}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("scores", [1, 999, 2000])
def test_capped_scores_of_blocks_are_those_of_all_queries(scores, grad, monkeypatch):
    """Gemma 2's attention, which no fused kernel computes: a mask, or none, and gradients."""
    monkeypatch.setattr(reference_backend, "SCORES", 1 << 27)
    model, ids = tiny_model("gemma2"), tokens(29)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(grad)

    def run():
        out = model(inputs_embeds=embedded, use_cache=False).logits
        gradient = torch.autograd.grad(out.square().mean(), embedded)[0] if grad else out
        return out.detach(), gradient.detach()

    with capture(model, lambda call, out: None), torch.set_grad_enabled(grad):
        want = run()
        monkeypatch.setattr(reference_backend, "SCORES", scores)
        got = run()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_capped_scores_of_a_whole_text_are_never_made(monkeypatch):
    monkeypatch.setattr(reference_backend, "SCORES", 20_000)
    query = torch.randn(1, 4, 300, 8, requires_grad=True)
    key = torch.randn(1, 2, 300, 8)
    with largest_tensor() as made:
        plain.plain_attention(None, query, key, key, None, 1.0, 3.0, {}).sum().backward()
    assert made.numbers <= 20_000
