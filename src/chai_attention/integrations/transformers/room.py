"""Estimates whether a model fits its device, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from chai_attention.integrations.transformers.logits import LOGITS
from chai_attention.ops.reference_backend import SCORES

ACTIVATIONS = 40  # of a layer and token, in hidden sizes, roughly
ROWS = 256  # queries whose attention maps exist at a time, at most
MAPS = 5  # of them, roughly: scores, weights, slopes, workspaces
WIDEST = 16  # a file of 2-bit weights becomes so much larger in float32


@dataclass(frozen=True)
class Work:
    """The work that a model is loaded for, as far as it takes memory beside the weights.

    Attributes:
        tokens: of a forward.
        gradients: whether there is a backward pass.
        length: tokens of a window whose attention maps are looked at; 0 if none are.
        beside: bytes that it takes besides, such as K and V.
    """

    tokens: int = 4096
    gradients: bool = False
    length: int = 0
    beside: int = 0

    def bytes(self, config: PreTrainedConfig, dtype: torch.dtype) -> int:
        """What it takes, roughly: activations, logits and attention maps."""
        text = config.get_text_config(decoder=True)
        hidden = getattr(text, "hidden_size", 0) or 0
        heads = getattr(text, "num_attention_heads", 0) or 0
        layers = getattr(text, "num_hidden_layers", 0) or 0
        vocabulary = getattr(text, "vocab_size", 0) or 0
        size = self.beside + self.tokens * ACTIVATIONS * hidden * dtype.itemsize
        size += min(ROWS * self.length * heads, SCORES) * MAPS * 4
        if self.gradients:
            # every layer's input, and of the logits a copy in float32 with its gradients
            size += self.tokens * layers * hidden * dtype.itemsize
            size += min(self.tokens * vocabulary, LOGITS) * (2 * dtype.itemsize + 12)
        return size


WorkOf = Callable[[PreTrainedConfig], Work]


def available(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated; None where the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return None


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers; of tied ones, once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def is_surely_small(name: str, needed: int, free: int) -> bool:
    """Whether a folder or file of weights fits in any dtype; then no config has to be read."""
    files = [name] if name.endswith(".gguf") else []
    if os.path.isdir(name):
        endings = (".safetensors", ".bin", ".gguf")
        files = [entry.path for entry in os.scandir(name) if entry.name.endswith(endings)]
    total = sum(os.path.getsize(file) for file in files)
    return bool(files) and total * WIDEST + needed < free


def gigabytes(count: float) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
