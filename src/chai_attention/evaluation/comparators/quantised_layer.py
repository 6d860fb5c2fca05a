"""A cache layer of clustered heads that holds its K and V quantised between forwards."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from chai_attention.errors import CacheError
from chai_attention.integrations.transformers.buffers import TokenBuffer
from chai_attention.integrations.transformers.layer import ClusteredLayer
from chai_attention.integrations.transformers.padding import Padding
from chai_attention.membership import Membership
from chai_attention.runtime.plan import LayerPlan

RESIDUAL = 128  # so many tokens after the prompt stay whole before they are quantised


@dataclass(frozen=True)
class Packed:
    """One tensor of a layer between two forwards.

    Attributes:
        codes: uint8, one or two values in a byte.
        meta: the quantiser's scales, zeros and shape.
        rest: later tokens in full precision, the shape of the whole but for its token axis.
    """

    codes: Tensor
    meta: dict[str, Any]
    rest: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that takes memory."""
        return self.codes, self.meta["scale"], self.meta["zero"], self.rest


class QuantisedClusteredLayer(ClusteredLayer):
    """`ClusteredLayer` that quantises K and V after the prompt, and again after 128 more tokens.

    Attention itself runs on dequantised tensors, as in transformers' `QuantizedCache`: right, not
    fast. Sequences cannot be cropped or picked.

    Args:
        plan: of the layer.
        bits: 8 or 4.
        group: neighbouring values with one scale and zero.
    """

    is_croppable = False

    def __init__(self, plan: LayerPlan, bits: int, group: int):
        self._quantiser = import_module("hqq.core.quantize").Quantizer
        self._bits, self._group = bits, group
        super().__init__(plan)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._packed: dict[str, Packed] = {}
        self._tokens = 0  # quantised
        self._packed_for: Membership | None = None

    def attend(
        self, query: Tensor, padding: Padding, scale: float, softcap: float | None = None
    ) -> Tensor:
        """Attend as `ClusteredLayer` does, over what dequantising gives."""
        for name, packed in self._packed.items():
            buffer = self._buffers[name]
            whole = self._quantiser.dequantize(packed.codes, packed.meta)
            buffer.replace(torch.cat([whole, packed.rest], buffer.token_axis))
        out = super().attend(query, padding, scale, softcap)
        self._pack()
        return out

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: quantised tokens cannot be taken back."""
        raise CacheError("a quantised cache of clustered heads cannot be cropped: reset it")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse: what is quantised stays as it is."""
        raise CacheError("a quantised cache of clustered heads serves no beam search")

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, quantised ones as ``key.0`` ..., ``value.0`` ..."""
        held = super().tensors()
        for name, packed in self._packed.items():
            held |= {f"{name}.{n}": tensor for n, tensor in enumerate(packed.tensors())}
        return held

    @property
    def _buffers(self) -> dict[str, TokenBuffer]:
        return {"key": self._keys, "value": self._values}

    def _pack(self) -> None:
        """Quantise what is due, and free the buffers."""
        length = self.get_seq_length()
        # a membership that has just been decided has other heads' K
        anew = self.membership is not self._packed_for or length - self._tokens >= RESIDUAL
        if anew or not self._packed:
            self._packed, self._tokens, self._packed_for = {}, length, self.membership
        for name, buffer in self._buffers.items():
            view = buffer.view
            assert view is not None
            rest = view.narrow(buffer.token_axis, self._tokens, length - self._tokens).clone()
            if name in self._packed:
                before = self._packed[name]
                self._packed[name] = Packed(before.codes, before.meta, rest)
            else:
                self._packed[name] = self._quantise(view, rest)
            buffer.data = None

    def _quantise(self, states: Tensor, rest: Tensor) -> Packed:
        """Quantise ``states [B, ., ., D]`` in groups along D."""
        options = {"device": states.device, "compute_dtype": states.dtype}
        codes, meta = self._quantiser.quantize(
            states.contiguous(), nbits=self._bits, group_size=self._group, axis=1, **options
        )
        meta["compute_dtype"] = states.dtype
        codes, meta = self._quantiser.cuda(codes, meta, device=states.device)
        return Packed(codes, meta, rest)
