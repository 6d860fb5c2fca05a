"""What is measured: shapes, cases and their parsing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from chai_attention.errors import ChaiError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DECODE, PREFILL = "decode", "prefill"
KINDS = (DECODE, PREFILL)
_CASE = re.compile(r"(?:([a-z]+):)?(\d+)x(\d+)")


class BenchmarkError(ChaiError):
    """A benchmark cannot be run as asked, or what it measures is wrong."""


@dataclass(frozen=True)
class Case:
    """One size.

    Attributes:
        kind: "decode", one query per sequence over ``tokens`` keys, or "prefill", all at once.
        batch: number of sequences.
        tokens: tokens of each.
    """

    kind: str
    batch: int
    tokens: int

    @property
    def queries(self) -> int:
        """New tokens of each sequence."""
        return 1 if self.kind == DECODE else self.tokens

    def __str__(self) -> str:
        return f"{self.kind} {self.batch} x {self.tokens:,}"


@dataclass(frozen=True)
class AttentionShape:
    """One layer's attention.

    Attributes:
        name: of the model or preset it is from.
        heads: H.
        kv_heads: G; divides H.
        head_dim: D.
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        groups = "" if self.kv_heads == self.heads else f", {self.kv_heads} K/V heads"
        return f"{self.name}: {self.heads} heads x {self.head_dim}{groups}"


def parse_case(text: str) -> Case:
    """``decode:16x8192`` or ``prefill:1x8192``: batch x tokens.

    Raises:
        BenchmarkError: anything else.
    """
    found = _CASE.fullmatch(text.replace(",", "").replace(" ", ""))
    if found is None or found[1] not in KINDS or not int(found[2]) or not int(found[3]):
        raise BenchmarkError(
            f"--case is decode:BATCHxTOKENS or prefill:BATCHxTOKENS, such as decode:16x8192, "
            f"not {text!r}"
        )
    return Case(found[1], int(found[2]), int(found[3]))


def parse_size(text: str) -> tuple[int, int]:
    """``16x8192``: batch and prompt tokens of a whole model.

    Raises:
        BenchmarkError: anything else.
    """
    found = _CASE.fullmatch(text.replace(",", "").replace(" ", ""))
    if found is None or found[1] is not None or not int(found[2]) or int(found[3]) < 2:
        raise BenchmarkError(
            f"--case is BATCHxTOKENS with two tokens or more, such as 1x2048, not {text!r}"
        )
    return int(found[2]), int(found[3])


def parse_clusters(text: str, heads: int) -> tuple[int, ...]:
    """``4,16,32``, or ``all`` for the number of heads, without duplicates and in order.

    Raises:
        BenchmarkError: no numbers, or numbers that are no clusters of ``heads`` heads.
    """
    parts = [str(heads) if part.strip() == "all" else part.strip() for part in text.split(",")]
    if not all(part.isdigit() and 1 <= int(part) <= heads for part in parts):
        raise BenchmarkError(
            f"--clusters is numbers from 1 to {heads} (the heads) separated by commas, not {text!r}"
        )
    return tuple(sorted({int(part) for part in parts}))


def parse_recent(text: str) -> tuple[int, int]:
    """``32+4``, recent and first keys that every head sees with its own scores; ``0`` for none.

    Raises:
        BenchmarkError: anything else.
    """
    found = re.fullmatch(r"(\d+)(?:\+(\d+))?", text.strip())
    if found is None or (int(found[1]) == 0 and int(found[2] or 0)):
        raise BenchmarkError(
            f"--recent is RECENT+SINKS, such as 32+4, or 0 for no exact window, not {text!r}"
        )
    return int(found[1]), int(found[2] or 0)


def parse_dtypes(text: str) -> tuple[torch.dtype, ...]:
    """``bfloat16`` or ``float32,bfloat16``.

    Raises:
        BenchmarkError: unknown names.
    """
    names = [part.strip() for part in text.split(",")]
    if not set(names) <= set(DTYPES):
        raise BenchmarkError(f"--dtype is of {', '.join(DTYPES)}, not {text!r}")
    return tuple(DTYPES[name] for name in dict.fromkeys(names))


def parse_cache_dtype(text: str) -> bool:
    """Whether ``auto`` or ``fp8`` asks for 8-bit floats.

    Raises:
        BenchmarkError: something else.
    """
    if text not in ("auto", "fp8"):
        raise BenchmarkError(f"--cache-dtype is auto or fp8, not {text!r}")
    return text == "fp8"


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def resolve_device(name: str) -> str:
    """Return "cpu" or "cuda" for a name or "auto".

    Raises:
        BenchmarkError: another device, or no GPU.
    """
    cuda = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if cuda else "cpu"
    if name not in ("cpu", "cuda"):
        raise BenchmarkError(f"--device is auto, cpu or cuda, not {name!r}")
    if name == "cuda" and not cuda:
        raise BenchmarkError("there is no CUDA device here: use --device cpu")
    return name


def default_seconds(device: str) -> float:
    """Time for one timing; the clock of a GPU needs little."""
    return 0.1 if device == "cuda" else 1.0


def default_dtypes(device: str) -> tuple[torch.dtype, ...]:
    """The dtypes of the published tables."""
    return (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)


def default_clusters(heads: int) -> tuple[int, ...]:
    """An eighth, half and all of the heads."""
    return tuple(sorted({max(1, heads // 8), max(1, heads // 2), heads}))


def default_cases(device: str) -> Sequence[Case]:
    """The cases of the published tables."""
    sizes: dict[str, list[tuple[int, int]]]
    if device == "cuda":
        sizes = {
            DECODE: [(16, 8192), (64, 4096), (1, 32768), (1, 2048)],
            PREFILL: [(1, 2048), (1, 8192), (1, 32768), (8, 2048)],
        }
    else:
        sizes = {
            DECODE: [(batch, tokens) for batch in (1, 4) for tokens in (2048, 8192, 16384)],
            PREFILL: [(batch, tokens) for batch in (1, 4) for tokens in (512, 2048)],
        }
    return [Case(kind, *size) for kind in KINDS for size in sizes[kind]]
