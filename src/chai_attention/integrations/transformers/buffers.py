"""Memory of the cache: tensors that grow along the tokens, and picking of heads and tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chai_attention.integrations.transformers.modes import lasting


class TokenBuffer:
    """A tensor that grows along one axis in small steps.

    Appending to a plain tensor copies it at every token. This one keeps spare room for 1/32 of
    its length (at least 16 tokens), which bounds both the copying and the memory it wastes.

    Args:
        token_axis: the axis that grows, 1 or 2.

    Attributes:
        transposed: whether axes 1 and 2 change places in memory, though not in the shape; to be
            set while nothing is held.
    """

    def __init__(self, token_axis: int):
        self.token_axis = token_axis
        self.transposed = False
        self.data: Tensor | None = None
        self.length = 0

    @property
    def view(self) -> Tensor | None:
        """The part in use."""
        return None if self.data is None else self.data.narrow(self.token_axis, 0, self.length)

    def append(self, new: Tensor) -> Tensor:
        """Copy ``new`` behind the tokens in use and return all of them."""
        count = new.shape[self.token_axis]
        needed = self.length + count
        if self.data is None or needed > self.data.shape[self.token_axis]:
            self._grow(new, needed)
        assert self.data is not None
        self.data.narrow(self.token_axis, self.length, count).copy_(new)
        self.length = needed
        return self.data.narrow(self.token_axis, 0, needed)

    def replace(self, data: Tensor) -> None:
        """Hold a tensor of other heads with the same tokens instead; the old one is freed."""
        self.data = None
        self.length = 0
        self.append(data)

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Hold ``change(data)``: some sequences of the batch, or another dtype."""
        if self.data is not None:
            with lasting():
                self.data = change(self.data)

    def _grow(self, new: Tensor, needed: int) -> None:
        shape = list(new.shape)
        shape[self.token_axis] = needed + max(16, needed // 32)
        if self.transposed:
            shape[1], shape[2] = shape[2], shape[1]
        with lasting():
            data = torch.empty(shape, dtype=new.dtype, device=new.device)
        if self.transposed:
            data = data.transpose(1, 2)
        if self.data is not None:
            data.narrow(self.token_axis, 0, self.length).copy_(
                self.data.narrow(self.token_axis, 0, self.length)
            )
        self.data = data


def pick_heads(states: Tensor, heads: Tensor, axis: int = 1) -> Tensor:
    """Choose ``heads [B, n]`` of each sequence along ``axis`` (1 or 2) of ``states``.

    ``[B, H, S, D]`` becomes ``[B, n, S, D]`` (axis 1), ``[B, S, H, D]`` ``[B, S, n, D]`` (axis 2).
    """
    if states.shape[0] == 1:
        return states.index_select(axis, heads[0])
    shape = list(states.shape)
    shape[axis] = heads.shape[1]
    index = heads[:, :, None, None] if axis == 1 else heads[:, None, :, None]
    return states.gather(axis, index.expand(shape))


def pick_tokens(states: Tensor, positions: Tensor) -> Tensor:
    """``[B, H, S, D]`` and ``[B or 1, W]`` to ``[B, H, W, D]``."""
    batch, heads, _, dim = states.shape
    index = positions[:, None, :, None].expand(batch, heads, -1, dim)
    return states.gather(2, index)
