"""Writes new tokens into caches: K and V of kept heads, and of other heads into their window."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chai_attention.errors import AttentionInputError
from chai_attention.membership import Membership
from chai_attention.ops.fp8 import FLOAT8, narrow
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.rolling_buffer import RollingBuffer

if TYPE_CHECKING:
    from chai_attention.ops.triton.write import PagedWrite


def write_dense(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    membership: Membership,
    start: Tensor,
    local: RollingBuffer | None = None,
) -> None:
    """Write Q new tokens of every sequence into caches of fixed capacity.

    Args:
        key: ``[B, G, Q, D]``, all K/V heads in their natural order.
        value: ``[B, G, Q, Dv]``, in the order of ``key``.
        keys: ``[B, kept_keys, S, D]``, the K cache, in the order of ``membership.key_heads``.
        values: ``[B, kept_values, S, Dv]``, the V cache, in that of ``membership.value_heads``.
        membership: tables of B rows, or of one for all.
        start: ``[B]`` integer on the caches' device, position of each sequence's first new token.
            Tokens that would stand outside S are not written.
        local: takes K and V of the removed heads.

    Raises:
        AttentionInputError: shapes or dtypes that do not fit together, or strided head dimensions.
    """
    batch, given, tokens, dim = key.shape
    size, value_dim, groups = keys.shape[2], value.shape[3], membership.kv_heads
    fits = (
        keys.shape == (batch, membership.kept_keys, size, dim)
        and values.shape == (batch, membership.kept_values, size, value_dim)
        and value.shape == (batch, groups, tokens, value_dim)
        and given == groups
        and membership.batch in (1, batch)
        and start.shape == (batch,)
    )
    if not fits:
        raise AttentionInputError(
            f"new K {tuple(key.shape)} and V {tuple(value.shape)} do not fit "
            f"{_described(keys, values, membership)}"
        )
    _check_dtypes(key, value, keys, values)
    _check_strides(key, value)
    _check_strides(keys, values)
    if keys.device.type == "cuda":
        from chai_attention.ops.triton import write

        write.write_dense(key, value, keys, values, membership, start, local)
        return
    member = membership if membership.batch == batch else membership.expand(batch)
    position = start.long()[:, None] + torch.arange(tokens, device=key.device)  # [B, Q]
    inside = (position >= 0) & (position < size)
    pick = torch.arange(batch, device=key.device)[:, None]
    keys_of = key[pick, member.key_heads]  # [B, kept, Q, D]
    values_of = value[pick, member.value_heads]
    row, token = inside.nonzero(as_tuple=True)
    at = position[row, token]
    keys[row, :, at] = keys_of[row, :, token]
    values[row, :, at] = values_of[row, :, token]
    if local is None:
        return
    latest = token >= tokens - local.size
    new_row, new_token, new_at = row[latest], token[latest], at[latest]
    heads_of = (key, member.removed_key_heads), (value, member.removed_value_heads)
    for (states, heads), (ring, sinks) in zip(heads_of, local.memories, strict=False):
        removed = states[pick, heads]  # [B, removed heads, Q, D]
        for index in range(sinks.shape[2]):
            here = inside & (position == local.sink_positions[:, index, None])
            r, t = here.nonzero(as_tuple=True)
            sinks[r, :, index] = removed[r, :, t]
        ring[new_row, :, (new_at + local.shift) % local.size] = removed[new_row, :, new_token]


class PageWriter:
    """Writes tokens of any sequences into the same pages for the same membership, step by step.

    What does not change from step to step is checked and made once.

    Args:
        key_pages: ``[P, N, kept_keys, D]``, any strides but the last; of K's dtype or
            float8_e4m3fn (`ops.fp8`).
        value_pages: ``[P, N, kept_values, Dv]``, of the same.
        membership: tables of one row for all, or of any number with ``membership_ids``; kernels'
            tables may change where they lie in memory.
        local: takes K, and V, of the heads that far pages do not hold; its block table is not used.

    Raises:
        AttentionInputError: shapes or dtypes that do not fit together, or strided head dimensions.
    """

    def __init__(
        self,
        key_pages: Tensor,
        value_pages: Tensor,
        membership: Membership,
        local: LocalPages | None = None,
    ):
        groups = membership.kv_heads
        kept, kept_values = membership.kept_keys, membership.kept_values
        page, dim, value_dim = key_pages.shape[:2], key_pages.shape[3], value_pages.shape[3]
        fits = (
            key_pages.shape == (*page, kept, dim)
            and value_pages.shape == (*page, kept_values, value_dim)
            and (local is not None or not membership.streaming)
        )
        if local is not None:
            page = local.key.shape[:2]
            fits = (
                fits
                and local.key.shape == (*page, groups - kept, dim)
                and local.value.shape == (*page, groups - kept_values, value_dim)
                and {local.key.dtype, local.value.dtype} == {key_pages.dtype}
            )
        if not fits:
            raise AttentionInputError(
                f"{_described(key_pages, value_pages, membership)} do not fit, or local pages or "
                "places of the other heads are missing or do not fit"
            )
        _check_strides(key_pages, value_pages)
        self.membership = membership
        self._pages, self._local = (key_pages, value_pages), local
        self._sizes = groups, dim, value_dim
        self._is_fp8 = key_pages.dtype == value_pages.dtype == FLOAT8
        self._launch: PagedWrite | None = None
        if key_pages.device.type == "cuda":
            from chai_attention.ops.triton.write import PagedWrite

            self._launch = PagedWrite(key_pages, value_pages, membership, local)

    def write(
        self,
        key: Tensor,
        value: Tensor,
        slot_mapping: Tensor,
        membership_ids: Tensor | None = None,
        local_slot_mapping: Tensor | None = None,
        scales: tuple[float, float] = (1.0, 1.0),
        stored: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Write T tokens.

        Args:
            key: ``[T, G, D]``, all K/V heads in their natural order.
            value: ``[T, G, Dv]``.
            slot_mapping: ``[T]`` int64, ``page * N + place in the page``; -1 for tokens to leave
                out.
            membership_ids: ``[T]`` int32, each token's row of the membership's tables.
            local_slot_mapping: ``[T]`` int64, as ``slot_mapping`` for the local pages.
            scales: what K and V are divided by in 8-bit pages, far and local.
            stored: filled with `fp8.as_stored` of all of ``key`` and ``value``, also of tokens that
                are left out; of their shapes and dtypes. For 8-bit pages alone.

        Raises:
            AttentionInputError: shapes or dtypes that do not fit together, or strided head
                dimensions.
        """
        self._check(key, value, slot_mapping, membership_ids, local_slot_mapping, scales, stored)
        if self._launch is not None:
            self._launch(
                key, value, slot_mapping, membership_ids, local_slot_mapping, scales, stored
            )
            return
        member, local = self.membership, self._local
        if self._is_fp8:
            key, value = narrow(key, scales[0]), narrow(value, scales[1])
            if stored is not None:
                stored[0].copy_(key)
                stored[1].copy_(value)
        ids = torch.zeros(key.shape[0]) if membership_ids is None else membership_ids
        ids = ids.long()
        _put(key, self._pages[0], member.key_heads[ids], slot_mapping)
        _put(value, self._pages[1], member.value_heads[ids], slot_mapping)
        if local is not None and local_slot_mapping is not None:
            _put(key, local.key, member.removed_key_heads[ids], local_slot_mapping)
            _put(value, local.value, member.removed_value_heads[ids], local_slot_mapping)

    def _check(
        self,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
        ids: Tensor | None,
        local_slots: Tensor | None,
        scales: tuple[float, float],
        stored: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Refuse what `write` cannot take; cheap, as every layer asks in every step."""
        (groups, dim, value_dim), tokens = self._sizes, key.shape[0]
        row = (tokens,)
        fits = (
            key.shape == (tokens, groups, dim)
            and value.shape == (tokens, groups, value_dim)
            and slots.shape == row
            and (self.membership.batch == 1 if ids is None else ids.shape == row)
            and (self._local is None or (local_slots is not None and local_slots.shape == row))
            and (self._is_fp8 or (stored is None and scales == (1.0, 1.0)))
        )
        if stored is not None:
            for states, out in zip((key, value), stored, strict=True):
                fits = fits and (out.shape, out.dtype) == (states.shape, states.dtype)
                fits = fits and out.stride(-1) == 1
        keys, values = self._pages
        if not fits:
            raise AttentionInputError(
                f"new K {tuple(key.shape)} and V {tuple(value.shape)} do not fit "
                f"{_described(keys, values, self.membership)}, local pages or places of the other "
                "heads are missing or do not fit, or scales or memory for rounded ones are given "
                "for pages that are not of 8 bits"
            )
        if not self._is_fp8:
            _check_dtypes(key, value, keys, values)
        _check_strides(key, value)


def _put(states: Tensor, pages: Tensor, heads: Tensor, slots: Tensor) -> None:
    """Write ``heads [T, n]`` of ``states [T, G, D]`` to ``slots [T]`` of ``pages [P, N, n, D]``."""
    if not heads.shape[1]:
        return
    token = (slots >= 0).nonzero()[:, 0]
    slot, page = slots[token], pages.shape[1]
    pages[slot // page, slot % page] = states[token[:, None], heads[token]]


def _described(keys: Tensor, values: Tensor, membership: Membership) -> str:
    return (
        f"caches {tuple(keys.shape)} and {tuple(values.shape)} of {membership.batch} memberships "
        f"with {membership.kept_keys} kept K heads and {membership.kept_values} V heads"
    )


def _check_dtypes(key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> None:
    if key.dtype != keys.dtype or value.dtype != values.dtype:
        raise AttentionInputError(
            f"caches of {keys.dtype} and {values.dtype} cannot take {key.dtype} and {value.dtype}"
        )


def _check_strides(key: Tensor, value: Tensor) -> None:
    if key.stride(-1) != 1 or value.stride(-1) != 1:
        raise AttentionInputError("the numbers of a head must be consecutive in memory")
