"""What a model predicts, in blocks of tokens: the logits of all of a long text would fill memory.

A model is run up to its last hidden states, and the rest of its own forward (the projection to the
vocabulary, and what its family does to the logits) once for every block of them. Texts that are
short enough go through the model's forward as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers.modules import attention_modules, replaced_forwards
from chai_attention.integrations.transformers.switch import containing
from chai_attention.runtime.shape import decoder_config

LOGITS = 1 << 27  # numbers that exist at a time, at most: 512 MB in float32
MOST_TOKENS = 32_768  # of a forward, unless one sequence has more
IGNORED = -100  # target of a token whose loss does not count


def rows_at_once(rows: int, length: int) -> int:
    """Say how many of at most ``rows`` sequences of ``length`` tokens go through a model at once.

    Activations grow with the tokens of a forward: what is a batch of short texts is too much of
    long ones.
    """
    return max(1, min(rows, MOST_TOKENS // length))


def token_losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Negative log-likelihood of every token but the first of each row, nats.

    Args:
        model: a causal language model, clustered heads enabled or not; without a cache.
        ids: ``[B, S]`` int64, where the model takes them.

    Returns:
        ``[B, S - 1]`` float32.
    """
    targets = ids[:, 1:]
    with torch.no_grad():
        if (step := _step(model, ids)) is None:
            return _losses(model(ids, use_cache=False).logits[:, :-1], targets)
        with _Halves(model) as halves:
            hidden = halves.hidden(ids)
            return torch.cat(
                [_losses(halves.logits(hidden[:, rows]), targets[:, rows])
                 for rows in _blocks(targets.shape[1], step)], 1
            )  # fmt: skip


def summed_loss(model: PreTrainedModel, ids: Tensor, counted: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of the tokens that count but the first of each row, nats.

    Its backward pass reaches the model's hidden states, and weights below them only.

    Args:
        model: a causal language model.
        ids: ``[B, S]`` int64, where the model takes them.
        counted: ``[B, S]`` bool, tokens whose loss counts; None for all.

    Returns:
        The sum, float32.
    """
    targets = ids[:, 1:]
    if counted is not None:
        targets = targets.masked_fill(~counted[:, 1:].to(ids.device), IGNORED)
    if (step := _step(model, ids)) is None:
        return _losses(model(ids, use_cache=False).logits[:, :-1], targets).sum()
    with _Halves(model) as halves:
        hidden = halves.hidden(ids)

        def loss(part: Tensor, rows: slice) -> Tensor:
            return _losses(halves.logits(part), targets[:, rows]).sum()

        blocks = [
            rows
            for rows in _blocks(targets.shape[1], step)
            if counted is None or _counts(targets[:, rows])  # which waits for the device
        ]
        summed: Tensor = _BlockByBlock.apply(hidden, loss, blocks)  # type: ignore[no-untyped-call]
        return summed


class _BlockByBlock(torch.autograd.Function):
    """A sum of losses of blocks of hidden states, whose gradients are found with the losses."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, loss: Callable[[Tensor, slice], Tensor], blocks: list[slice]
    ) -> Tensor:
        gradient = torch.zeros_like(hidden)
        total = torch.zeros((), device=hidden.device)
        for rows in blocks:
            part = hidden[:, rows].detach().requires_grad_()
            with torch.enable_grad():
                found = loss(part, rows)
            gradient[:, rows] = torch.autograd.grad(found, part)[0]
            total += found.detach().to(total.device)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale, None, None


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """``[B, n]`` float32 of ``logits [B, n, V]``; 0 where a target is ignored."""
    flat = cross_entropy(
        logits.float().flatten(0, 1), targets.to(logits.device).flatten(), reduction="none",
        ignore_index=IGNORED,
    )  # fmt: skip
    return flat.view(targets.shape)


def _counts(targets: Tensor) -> bool:
    return bool((targets != IGNORED).any())


def _step(model: PreTrainedModel, ids: Tensor) -> int | None:
    """Tokens of a block; None if the logits of all tokens may exist at once."""
    vocabulary = decoder_config(model).vocab_size
    step = max(1, LOGITS // (ids.shape[0] * vocabulary))
    return None if step >= ids.shape[1] else step


def _blocks(count: int, step: int) -> Iterator[slice]:
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


class _DecodedError(Exception):
    """Ends a forward where its hidden states are known."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output


class _Halves(ExitStack):
    """A model's forward in two halves, in a ``with`` block: up to its hidden states, and on.

    The decoder inside the model is what stands between: its forward ends the first half, and is
    skipped in the second. Everything else (hooks, devices, scaled logits) is as in the model.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self._model = model
        self._output: Any = None
        self._given: Tensor | None = None
        self._inside = False
        stopped = {
            module: self._stopped(module.forward)
            for module in containing(model, attention_modules(model).values())
            if isinstance(module, PreTrainedModel) and module is not model
        }
        self.enter_context(replaced_forwards(stopped))

    def hidden(self, ids: Tensor) -> Tensor:
        """Last hidden states ``[B, S, E]`` of ``ids [B, S]``.

        Raises:
            UnsupportedModelError: the model's forward does not call the decoder inside it.
        """
        try:
            self._model(ids, use_cache=False)
        except _DecodedError as decoded:
            self._output = decoded.output
            found: Tensor = decoded.output[0]
            return found
        raise UnsupportedModelError(
            f"the logits of a {type(self._model).__name__} cannot be made in blocks, as a text of "
            f"{ids.shape[1]} tokens needs: its forward does not call the decoder inside it. Use "
            "shorter texts"
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Predictions ``[B, n, V]`` from some of the hidden states ``[B, n, E]``."""
        self._given = hidden
        try:
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            found: Tensor = self._model(ids, use_cache=False).logits
            return found
        finally:
            self._given = None

    def _stopped(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._given is not None:
                if isinstance(self._output, tuple):
                    return (self._given, *self._output[1:])
                return type(self._output)(**{**self._output, "last_hidden_state": self._given})
            if self._inside:  # a decoder within a decoder
                return forward(*args, **kwargs)
            self._inside = True
            try:
                output = forward(*args, **kwargs)
            finally:
                self._inside = False
            raise _DecodedError(output)

        return run
