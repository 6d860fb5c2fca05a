"""Cache write: K and V of kept heads, and of others near the end, to their places; one launch."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.fp8 import LARGEST
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.rolling_buffer import RollingBuffer
from chai_attention.ops.triton.checks import by_row, page_strides
from chai_attention.ops.triton.repeated import Launches, Repeated, aligned
from chai_attention.ops.triton.sizes import cdiv, power_of_2

ELEMENTS = 4096  # numbers a program copies
MOST = tl.constexpr(LARGEST)


@triton.jit
def _load(ptr, row, head, token, stride_b, stride_h, stride_s, d, mask):
    """New K or V of tokens ``[BLOCK]``, whose heads may differ: ``[BLOCK, WIDE]``."""
    at = row * stride_b + head * stride_h + token.to(tl.int64) * stride_s
    return tl.load(ptr + at[:, None] + d[None, :], mask=mask)


@triton.jit
def _store(ptr, states, head, token, stride_h, stride_s, d, mask):
    """Write tokens ``[BLOCK, WIDE]`` of a sequence where `_load` would read them."""
    at = head * stride_h + token.to(tl.int64) * stride_s
    tl.store(ptr + at[:, None] + d[None, :], states.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _narrow(new, inverse, dtype: tl.constexpr, IS_NARROW: tl.constexpr):
    """What 8-bit pages hold (`ops.fp8.narrow`)."""
    if IS_NARROW:
        x = new.to(tl.float32) * inverse
        x = tl.maximum(x, -MOST, propagate_nan=tl.PropagateNan.ALL)
        new = tl.minimum(x, MOST, propagate_nan=tl.PropagateNan.ALL).to(dtype)
    return new


@triton.jit
def _remember(
    held, ring_ptr, first_ptr, sink_ptr, position, at, in_ring, there, d, mask,
    stride_rs, stride_fs, SINKS: tl.constexpr,
):  # fmt: skip
    """Write new tokens to a head's place in a ring, and in the sinks if they are such."""
    held = held.to(ring_ptr.dtype.element_ty)
    tl.store(
        ring_ptr + (at * stride_rs)[:, None] + d[None, :], held, mask=in_ring[:, None] & mask
    )  # fmt: skip
    for j in tl.static_range(SINKS):
        here = there & (position == tl.load(sink_ptr + j))
        one = (position * 0)[:, None] + d[None, :]  # only one token is a sink's
        tl.store(first_ptr + j * stride_fs + one, held, mask=here[:, None] & mask)


@triton.jit(
    do_not_specialize=[
        "tokens", "size", "kept", "kept_values", "removed", "removed_values", "ring_size",
        "ring_shift",
    ]
)  # fmt: skip
def _write(
    k_ptr, v_ptr, key_ptr, value_ptr, k_stored_ptr, v_stored_ptr, ring_ptr, first_ptr, v_ring_ptr,
    v_first_ptr, k_head_ptr, v_head_ptr, removed_ptr, v_removed_ptr, start_ptr, slot_ptr, ids_ptr,
    sink_ptr, local_slot_ptr,
    tokens, size, kept, kept_values, removed, removed_values, ring_size, ring_shift,
    key_inverse, value_inverse,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_keyb, stride_keyh, stride_keys, stride_valueb, stride_valueh, stride_values,
    stride_ksh, stride_kss, stride_vsh, stride_vss,
    stride_rb, stride_rh, stride_rs, stride_fb, stride_fh, stride_fs,
    stride_vrb, stride_vrh, stride_vrs, stride_vfb, stride_vfh, stride_vfs, stride_sinks, stride_t,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BLOCK: tl.constexpr, PAGE: tl.constexpr, LOCAL_PAGE: tl.constexpr, SINKS: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_LOCAL: tl.constexpr, HAS_VALUE_RING: tl.constexpr,
    IS_NARROW: tl.constexpr, HAS_STORED: tl.constexpr,
):  # fmt: skip
    """BLOCK new tokens of one place: of K, of V, of the removed heads' K, or of their V.

    With pages, ``slot_ptr`` holds each token's slot in them. With local pages, ``ring_ptr`` and
    ``v_ring_ptr`` are those, and ``local_slot_ptr`` holds its slot there. ``*_stored_ptr`` gets
    what 8-bit pages hold in the dtype of new K and V, of all heads and tokens.
    """
    place, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    given = token < tokens
    there = given
    if PAGE == 0:
        position = tl.load(start_ptr + row).to(tl.int32) + token
        there = there & (position >= 0) & (position < size)
        key_at = row * stride_keyb + position.to(tl.int64) * stride_keys
        value_at = row * stride_valueb + position.to(tl.int64) * stride_values
        ids = row * stride_t + tl.zeros([BLOCK], tl.int64)
    else:
        slot = tl.load(slot_ptr + token, mask=there, other=-1).to(tl.int64)
        there = there & (slot >= 0)
        slot = tl.maximum(slot, 0)
        key_at = slot // PAGE * stride_keyb + slot % PAGE * stride_keys
        value_at = slot // PAGE * stride_valueb + slot % PAGE * stride_values
        ids = tl.zeros([BLOCK], tl.int64)
        if HAS_IDS:
            ids += tl.load(ids_ptr + token, mask=given, other=0)
    read = there
    if HAS_STORED:
        read = given
    if place < kept:
        d = tl.arange(0, DP)
        inside = (d < D)[None, :]
        head = tl.load(k_head_ptr + ids * kept + place, mask=read, other=0)
        mask = read[:, None] & inside
        new = _load(k_ptr, row, head, token, stride_kb, stride_kh, stride_ks, d, mask)
        held = _narrow(new, key_inverse, key_ptr.dtype.element_ty, IS_NARROW)
        tl.store(
            key_ptr + place * stride_keyh + key_at[:, None] + d[None, :], held,
            mask=there[:, None] & inside,
        )  # fmt: skip
        if HAS_STORED:
            _store(k_stored_ptr, held, head, token, stride_ksh, stride_kss, d, mask)
    elif place < kept + kept_values:
        place -= kept
        v_d = tl.arange(0, DVP)
        v_inside = (v_d < DV)[None, :]
        v_head = tl.load(v_head_ptr + ids * kept_values + place, mask=read, other=0)
        v_mask = read[:, None] & v_inside
        v_new = _load(v_ptr, row, v_head, token, stride_vb, stride_vh, stride_vs, v_d, v_mask)
        v_held = _narrow(v_new, value_inverse, value_ptr.dtype.element_ty, IS_NARROW)
        tl.store(
            value_ptr + place * stride_valueh + value_at[:, None] + v_d[None, :], v_held,
            mask=there[:, None] & v_inside,
        )  # fmt: skip
        if HAS_STORED:
            _store(v_stored_ptr, v_held, v_head, token, stride_vsh, stride_vss, v_d, v_mask)
    elif LOCAL_PAGE > 0 or HAS_STORED:
        place -= kept + kept_values
        page = tl.zeros([BLOCK], tl.int64)
        within = page
        if LOCAL_PAGE > 0:
            slot = tl.load(local_slot_ptr + token, mask=given, other=-1).to(tl.int64)
            there = slot >= 0
            slot = tl.maximum(slot, 0)
            page, within = slot // LOCAL_PAGE, slot % LOCAL_PAGE
            if not HAS_STORED:
                read = there
        if place < removed:
            head = tl.load(removed_ptr + ids * removed + place, mask=read, other=0)
            d = tl.arange(0, DP)
            inside = (d < D)[None, :]
            mask = read[:, None] & inside
            new = _load(k_ptr, row, head, token, stride_kb, stride_kh, stride_ks, d, mask)
            held = _narrow(new, key_inverse, key_ptr.dtype.element_ty, IS_NARROW)
            if LOCAL_PAGE > 0:
                at = page * stride_rb + place * stride_rh + within * stride_rs
                tl.store(
                    ring_ptr + at[:, None] + d[None, :], held, mask=there[:, None] & inside
                )  # fmt: skip
            if HAS_STORED:
                _store(k_stored_ptr, held, head, token, stride_ksh, stride_kss, d, mask)
        elif HAS_VALUE_RING:
            place -= removed
            v_head = tl.load(v_removed_ptr + ids * removed_values + place, mask=read, other=0)
            v_d = tl.arange(0, DVP)
            v_inside = (v_d < DV)[None, :]
            v_mask = read[:, None] & v_inside
            v_new = _load(v_ptr, row, v_head, token, stride_vb, stride_vh, stride_vs, v_d, v_mask)
            v_held = _narrow(v_new, value_inverse, value_ptr.dtype.element_ty, IS_NARROW)
            if LOCAL_PAGE > 0:
                at = page * stride_vrb + place * stride_vrh + within * stride_vrs
                tl.store(
                    v_ring_ptr + at[:, None] + v_d[None, :], v_held, mask=there[:, None] & v_inside
                )  # fmt: skip
            if HAS_STORED:
                _store(v_stored_ptr, v_held, v_head, token, stride_vsh, stride_vss, v_d, v_mask)
    elif HAS_LOCAL:  # else no program comes here
        place -= kept + kept_values
        in_ring = there & (token >= tokens - ring_size)  # later ones stand in older ones' place
        at = ((position + ring_shift) % ring_size).to(tl.int64)
        if place < removed:
            head = tl.load(removed_ptr + ids * removed + place, mask=there, other=0)
            d = tl.arange(0, DP)
            mask = there[:, None] & (d < D)[None, :]
            new = _load(k_ptr, row, head, token, stride_kb, stride_kh, stride_ks, d, mask)
            held = _narrow(new, key_inverse, key_ptr.dtype.element_ty, IS_NARROW)
            _remember(
                held, ring_ptr + row * stride_rb + place * stride_rh,
                first_ptr + row * stride_fb + place * stride_fh, sink_ptr + row * stride_sinks,
                position, at, in_ring, there, d, mask, stride_rs, stride_fs, SINKS,
            )  # fmt: skip
        elif HAS_VALUE_RING:
            place -= removed
            v_head = tl.load(v_removed_ptr + ids * removed_values + place, mask=there, other=0)
            v_d = tl.arange(0, DVP)
            v_mask = there[:, None] & (v_d < DV)[None, :]
            v_new = _load(v_ptr, row, v_head, token, stride_vb, stride_vh, stride_vs, v_d, v_mask)
            v_held = _narrow(v_new, value_inverse, value_ptr.dtype.element_ty, IS_NARROW)
            _remember(
                v_held, v_ring_ptr + row * stride_vrb + place * stride_vrh,
                v_first_ptr + row * stride_vfb + place * stride_vfh, sink_ptr + row * stride_sinks,
                position, at, in_ring, there, v_d, v_mask, stride_vrs, stride_vfs, SINKS,
            )  # fmt: skip


def write_dense(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    membership: Membership,
    start: Tensor,
    local: RollingBuffer | None = None,
) -> None:
    """`ops.cache_write.write_dense` in one launch."""
    (batch, _, tokens, dim), value_dim = key.shape, value.shape[3]
    if not tokens:
        return
    kept, kept_values = membership.kept_keys, membership.kept_values
    removed = removed_values = 0
    ring = first = value_ring = value_first = sink_positions = None
    strides = [0] * 13
    if local is not None:
        removed = membership.kv_heads - kept
        ring, first, sink_positions = local.ring, local.sinks, by_row(local.sink_positions)
        strides[:6] = *ring.stride()[:3], *first.stride()[:3]
        strides[12] = sink_positions.stride(0)
        value_ring, value_first = local.value_ring, local.value_sinks
        if value_ring is not None and value_first is not None:
            removed_values = membership.kv_heads - kept_values
            strides[6:12] = *value_ring.stride()[:3], *value_first.stride()[:3]
    block = min(_block(dim, value_dim), power_of_2(tokens))
    heads = kept + kept_values + removed + removed_values
    _write[(cdiv(tokens, block), heads, batch)](
        key, value, keys, values, None, None, ring, first, value_ring, value_first,
        membership.key_heads.contiguous(), membership.value_heads.contiguous(),
        membership.removed_key_heads.contiguous() if removed else None,
        membership.removed_value_heads.contiguous() if removed_values else None,
        by_row(start), None, None, sink_positions, None,
        tokens, keys.shape[2], kept, kept_values, removed, removed_values,
        *((1, 0) if local is None else (local.size, local.shift)), 1.0, 1.0,
        *(stride for x in (key, value, keys, values) for stride in x.stride()[:3]),
        0, 0, 0, 0, *strides, 0 if membership.batch == 1 else 1,
        **_constants(dim, value_dim, block),
        PAGE=0, LOCAL_PAGE=0, SINKS=0 if local is None else local.sinks.shape[2],
        HAS_IDS=False, HAS_LOCAL=removed > 0, HAS_VALUE_RING=removed_values > 0,
        IS_NARROW=False, HAS_STORED=False,
    )  # fmt: skip


class PagedWrite:
    """`ops.cache_write.PageWriter` in one launch; arguments and meaning are those there."""

    def __init__(
        self,
        key_pages: Tensor,
        value_pages: Tensor,
        membership: Membership,
        local: LocalPages | None,
    ):
        self._pages = key_pages, value_pages
        self._membership, self._local = membership, local
        self._kinds = Launches()

    def __call__(
        self,
        key: Tensor,
        value: Tensor,
        slot_mapping: Tensor,
        membership_ids: Tensor | None,
        local_slot_mapping: Tensor | None,
        scales: tuple[float, float],
        stored: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Launch, of arguments that fit together."""
        tokens = key.shape[0]
        if not tokens:
            return
        member, local = self._membership, self._local
        block = min(_block(key.shape[2], value.shape[2]), power_of_2(tokens))
        strides = (*key.stride()[1::-1], *value.stride()[1::-1])
        stored_key = stored_value = None
        stored_strides: tuple[int, ...] = (0, 0, 0, 0)
        if stored is not None:
            stored_key, stored_value = stored
            stored_strides = (*stored_key.stride()[1::-1], *stored_value.stride()[1::-1])
        slots, ids, local_slots = (
            by_row(slot_mapping), by_row(membership_ids), by_row(local_slot_mapping)
        )  # fmt: skip
        given = [x for x in (key, value, slots, ids, local_slots, *(stored or ())) if x is not None]
        kind = (block, strides, stored_strides, scales, *(x.dtype for x in given), ids is None)
        found = self._kinds.get(kind)
        if found is None:
            has_ids, is_stored = ids is not None, stored is not None
            found = self._kinds[kind] = self._kind(
                key.shape[2], value.shape[2], block, strides, stored_strides, scales, has_ids,
                is_stored,
            )  # fmt: skip
        launch, numbers, heads = found
        removed, removed_values = numbers[3:5]
        launch(
            (cdiv(tokens, block), heads, 1), aligned(*given),
            key, value, *self._pages, stored_key, stored_value,
            None if local is None else local.key, None, None if local is None else local.value,
            None, member.key_heads.contiguous(), member.value_heads.contiguous(),
            # without any, a table that is not read: the kernel has to compile all the same
            (member.removed_key_heads if removed else member.key_heads).contiguous(),
            (member.removed_value_heads if removed_values else member.value_heads).contiguous(),
            None, slots, ids, None, local_slots, tokens, *numbers,
        )  # fmt: skip

    def _kind(
        self,
        dim: int,
        value_dim: int,
        block: int,
        strides: tuple[int, ...],
        stored_strides: tuple[int, ...],
        scales: tuple[float, float],
        has_ids: bool,
        is_stored: bool,
    ) -> tuple[Repeated, tuple[Any, ...], int]:
        """Launches of a kind, the kernel's last arguments, and how many heads are read."""
        member, local, (keys, values) = self._membership, self._local, self._pages
        kept, kept_values = member.kept_keys, member.kept_values
        removed = removed_values = 0
        local_strides = [0] * 13
        if is_stored or local is not None:
            removed, removed_values = member.kv_heads - kept, member.kv_heads - kept_values
        if local is not None:
            local_strides[:3] = page_strides(local.key)
            local_strides[6:9] = page_strides(local.value)
        head, token, value_head, value_token = strides
        numbers = (
            0, kept, kept_values, removed, removed_values, 1, 0, 1 / scales[0], 1 / scales[1],
            0, head, token, 0, value_head, value_token,
            *page_strides(keys), *page_strides(values), *stored_strides, *local_strides,
            0 if member.batch == 1 else 1,
        )  # fmt: skip
        launch = Repeated(
            _write, **_constants(dim, value_dim, block),
            PAGE=keys.shape[1], LOCAL_PAGE=0 if local is None else local.page, SINKS=0,
            HAS_IDS=has_ids, HAS_LOCAL=removed > 0, HAS_VALUE_RING=removed_values > 0,
            IS_NARROW=keys.dtype.itemsize == 1, HAS_STORED=is_stored,
        )  # fmt: skip
        return launch, numbers, kept + kept_values + removed + removed_values


def _block(dim: int, value_dim: int) -> int:
    """Tokens that a program copies at most."""
    return max(1, ELEMENTS // power_of_2(max(dim, value_dim)))


def _constants(dim: int, value_dim: int, block: int) -> dict[str, Any]:
    """What all launches of the kernel are compiled for."""
    return {
        "D": dim, "DP": power_of_2(dim), "DV": value_dim, "DVP": power_of_2(value_dim),
        "BLOCK": block, "num_warps": 4,
    }  # fmt: skip
