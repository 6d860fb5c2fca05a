"""Arithmetic of grids and tiles; Triton's own functions take ten times as long on the host."""

from __future__ import annotations


def cdiv(number: int, part: int) -> int:
    """How many parts of this size hold a number of things."""
    return -(-number // part)


def power_of_2(number: int) -> int:
    """The lowest power of two that is no less than a number of at least 1."""
    return 1 << (number - 1).bit_length()
