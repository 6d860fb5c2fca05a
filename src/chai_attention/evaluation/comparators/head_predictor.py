"""How much each head of each layer will matter to a token, predicted from the layer's input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.evaluation.comparators.chai import stacked
from chai_attention.integrations.transformers.devices import input_device
from chai_attention.integrations.transformers.intervene import edited_heads
from chai_attention.integrations.transformers.modes import evaluating
from chai_attention.integrations.transformers.modules import attention_modules, output_weight
from chai_attention.progress import Progress, quiet
from chai_attention.runtime.shape import describe

SAMPLES = 8192  # tokens that predictors learn from
WIDTH = 128  # hidden units of a predictor
EPOCHS, BATCH, RATE = 20, 256, 1e-3
TOKENS_PER_FORWARD = 2048
TINY = 1e-30  # below every importance that counts


class Importance:
    """Importance of heads: the norm of what a head adds to the layer's output.

    ``|O_h W_O,h|``, with the Gram matrices ``W_O,h W_O,h^T`` made once per layer.

    Args:
        model: a supported causal language model.
    """

    def __init__(self, model: PreTrainedModel):
        heads = describe(model).heads
        self._grams: dict[int, Tensor] = {}
        for layer, module in attention_modules(model).items():
            weight = output_weight(module).float().unflatten(1, (heads, -1))  # [out, H, Dv]
            self._grams[layer] = torch.einsum("ohd,ohe->hde", weight, weight)  # [H, Dv, Dv]

    def __call__(self, layer: int, out: Tensor) -> Tensor:
        """Return ``[..., H]`` float32 of the heads' outputs ``[..., H, Dv]``."""
        heads = out.float()
        weighted = torch.einsum("...hd,hde->...he", heads, self._grams[layer])
        return (weighted * heads).sum(-1).clamp_min(0).sqrt()


class HeadPredictors:
    """One MLP with a hidden layer per layer of the model, all trained at once.

    A predictor sees what its layer's attention sees and predicts the logarithm of every head's
    importance, by squared error. One set serves all shares of heads to drop.

    Args:
        seed: of the tokens that are sampled, the first weights and the order of training.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self._fitted: tuple[Tensor, ...] | None = None

    @property
    def fitted(self) -> bool:
        """Whether `fit` has been called."""
        return self._fitted is not None

    def fit(
        self,
        model: PreTrainedModel,
        tokens: Sequence[Tensor],
        progress: Progress = quiet,
    ) -> None:
        """Train on tokens sampled from windows ``[S]`` of text."""
        inputs, importance = self._collect(model, stacked(tokens), progress)
        with torch.enable_grad():
            self._train(inputs, importance, input_device(model), progress)

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        """Predict the log-importance of heads, ``[..., H]`` float32, from ``[..., E]``."""
        assert self._fitted is not None
        mean, spread, first, bias, second, offset = (
            x[layer].to(hidden.device) for x in self._fitted
        )
        normed = (hidden.float() - mean) / spread
        return torch.relu(normed @ first + bias) @ second + offset

    @torch.no_grad()
    def _collect(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        progress: Progress,
    ) -> tuple[Tensor, Tensor]:
        """Inputs ``[L, N, E]`` in the model's dtype, log-importance ``[L, N, H]``; on the CPU."""
        shape, of = describe(model), Importance(model)
        batch = max(1, TOKENS_PER_FORWARD // windows.shape[1])
        draw = torch.Generator().manual_seed(self.seed)
        wanted = torch.zeros(windows.numel(), dtype=torch.bool)
        wanted[torch.randperm(len(wanted), generator=draw)[:SAMPLES]] = True
        wanted = wanted.view_as(windows)
        chosen = wanted
        seen: list[list[Tensor]] = [[] for _ in range(shape.layers)]
        found: list[list[Tensor]] = [[] for _ in range(shape.layers)]

        def see(layer: int, hidden: Tensor) -> None:
            seen[layer].append(hidden.cpu()[chosen])

        def note(layer: int, out: Tensor) -> None:
            found[layer].append(of(layer, out).clamp_min(TINY).log().cpu()[chosen])

        with evaluating(model), edited_heads(model, note, see):
            for start in range(0, len(windows), batch):
                chosen = wanted[start : start + batch]
                model(windows[start : start + batch].to(input_device(model)), use_cache=False)
                progress("importance of heads", min(start + batch, len(windows)), len(windows))
        return (
            torch.stack([torch.cat(rows) for rows in seen]),
            torch.stack([torch.cat(rows) for rows in found]),
        )

    def _train(
        self,
        inputs: Tensor,
        importance: Tensor,
        device: torch.device,
        progress: Progress,
    ) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        layers, samples, size = inputs.shape
        heads = importance.shape[-1]
        mean = torch.stack([rows.float().mean(0) for rows in inputs])[:, None]  # [L, 1, E]
        spread = torch.stack([rows.float().std(0, correction=0) for rows in inputs])[:, None]
        mean, spread = mean.to(device), spread.clamp_min(1e-6).to(device)
        middle = importance.mean(1, keepdim=True).to(device)  # [L, 1, H]
        scale = importance.std(1, correction=0, keepdim=True).clamp_min(1e-6).to(device)
        first = torch.randn(layers, size, WIDTH, generator=draw) * (2 / size) ** 0.5
        second = torch.randn(layers, WIDTH, heads, generator=draw) * WIDTH**-0.5
        biases = torch.zeros(layers, 1, WIDTH), torch.zeros(layers, 1, heads)
        weights = [
            weight.to(device).requires_grad_() for weight in (first, biases[0], second, biases[1])
        ]
        w1, b1, w2, b2 = weights
        optimizer = torch.optim.Adam(weights, lr=RATE)
        for epoch in range(EPOCHS):
            for rows in torch.randperm(samples, generator=draw).split(BATCH):
                x = (inputs[:, rows].to(device).float() - mean) / spread  # [L, N, E]
                y = (importance[:, rows].to(device) - middle) / scale  # [L, N, H]
                guess = torch.baddbmm(b2, torch.relu(torch.baddbmm(b1, x, w1)), w2)
                # layers share no weights: a sum over them trains each by itself
                loss = (guess - y).square().mean((1, 2)).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            progress("predictors of heads", epoch + 1, EPOCHS)
        self._fitted = tuple(
            x.detach()
            for x in (mean, spread, w1, b1, w2 * scale, b2 * scale + middle)
        )  # fmt: skip
