"""Cache write: K and V of kept heads, and of others near the end, to their places; one launch."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.fp8 import LARGEST
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.rolling_buffer import RollingBuffer
from chai_attention.ops.triton.checks import by_row
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
        d = tl.arange(0, DVP)
        inside = (d < DV)[None, :]
        head = tl.load(v_head_ptr + ids * kept_values + place, mask=read, other=0)
        mask = read[:, None] & inside
        new = _load(v_ptr, row, head, token, stride_vb, stride_vh, stride_vs, d, mask)
        held = _narrow(new, value_inverse, value_ptr.dtype.element_ty, IS_NARROW)
        tl.store(
            value_ptr + place * stride_valueh + value_at[:, None] + d[None, :], held,
            mask=there[:, None] & inside,
        )  # fmt: skip
        if HAS_STORED:
            _store(v_stored_ptr, held, head, token, stride_vsh, stride_vss, d, mask)
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
            head = tl.load(v_removed_ptr + ids * removed_values + place, mask=read, other=0)
            d = tl.arange(0, DVP)
            inside = (d < DV)[None, :]
            mask = read[:, None] & inside
            new = _load(v_ptr, row, head, token, stride_vb, stride_vh, stride_vs, d, mask)
            held = _narrow(new, value_inverse, value_ptr.dtype.element_ty, IS_NARROW)
            if LOCAL_PAGE > 0:
                at = page * stride_vrb + place * stride_vrh + within * stride_vrs
                tl.store(
                    v_ring_ptr + at[:, None] + d[None, :], held, mask=there[:, None] & inside
                )  # fmt: skip
            if HAS_STORED:
                _store(v_stored_ptr, held, head, token, stride_vsh, stride_vss, d, mask)
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
            head = tl.load(v_removed_ptr + ids * removed_values + place, mask=there, other=0)
            d = tl.arange(0, DVP)
            mask = there[:, None] & (d < DV)[None, :]
            new = _load(v_ptr, row, head, token, stride_vb, stride_vh, stride_vs, d, mask)
            held = _narrow(new, value_inverse, value_ptr.dtype.element_ty, IS_NARROW)
            _remember(
                held, v_ring_ptr + row * stride_vrb + place * stride_vrh,
                v_first_ptr + row * stride_vfb + place * stride_vfh, sink_ptr + row * stride_sinks,
                position, at, in_ring, there, d, mask, stride_vrs, stride_vfs, SINKS,
            )  # fmt: skip


class _Places(NamedTuple):
    """Where new tokens are and where they go.

    Attributes:
        tokens: of a sequence; of all sequences for pages.
        batch: sequences; 1 for pages.
        strides: of new K, new V, the K and the V cache, of row or page, head and token each: 12.
        size: capacity of dense caches.
        start: ``[B]``, position of each sequence's first new token; of dense caches.
        page: tokens of a page; 0 for dense caches.
        slots: ``[T]`` of tokens in pages; `ops.cache_write.write_paged` says the next two, too.
        local_slots: ``[T]`` in local pages.
        membership_ids: ``[T]``.
        stored: K and V ``[T, G, D]`` as 8-bit pages hold them, to write to.
    """

    tokens: int
    batch: int
    strides: tuple[int, ...]
    size: int = 0
    start: Tensor | None = None
    page: int = 0
    slots: Tensor | None = None
    local_slots: Tensor | None = None
    membership_ids: Tensor | None = None
    stored: tuple[Tensor, Tensor] | None = None


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
    states = (key, value, keys, values)
    strides = tuple(stride for x in states for stride in x.stride()[:3])
    places = _Places(key.shape[2], key.shape[0], strides, size=keys.shape[2], start=start)
    _launch(states, membership, local, places)


def write_paged(
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    slot_mapping: Tensor,
    membership: Membership,
    membership_ids: Tensor | None = None,
    local: LocalPages | None = None,
    local_slot_mapping: Tensor | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
    stored: tuple[Tensor, Tensor] | None = None,
) -> None:
    """`ops.cache_write.write_paged` in one launch."""
    states = (key, value, key_pages, value_pages)
    token, head, _ = key.stride()
    value_token, value_head, _ = value.stride()
    strides = (
        0, head, token, 0, value_head, value_token,
        *_page_strides(key_pages), *_page_strides(value_pages),
    )  # fmt: skip
    places = _Places(
        key.shape[0], 1, strides, page=key_pages.shape[1], slots=slot_mapping,
        local_slots=local_slot_mapping, membership_ids=membership_ids, stored=stored,
    )  # fmt: skip
    _launch(states, membership, local, places, scales)


def _page_strides(pages: Tensor) -> tuple[int, int, int]:
    """Of page, head and token of ``[P, N, heads, D]``."""
    page, token, head, _ = pages.stride()
    return page, head, token


def _launch(
    states: tuple[Tensor, Tensor, Tensor, Tensor],
    membership: Membership,
    local: LocalPages | RollingBuffer | None,
    places: _Places,
    scales: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Write new K and V, the first two ``states``, into the caches, the others."""
    if not places.tokens:
        return
    dim, value_dim = states[0].shape[-1], states[1].shape[-1]
    kept, kept_values = membership.kept_keys, membership.kept_values
    removed = removed_values = local_page = 0
    ring = first = value_ring = value_first = sink_positions = None
    local_strides, stored_strides = [0] * 13, [0] * 4
    if places.stored is not None or isinstance(local, LocalPages):
        removed, removed_values = membership.kv_heads - kept, membership.kv_heads - kept_values
    if places.stored is not None:
        stored_strides = [x.stride(axis) for x in places.stored for axis in (1, 0)]
    if isinstance(local, LocalPages):
        ring, value_ring, local_page = local.key, local.value, local.page
        local_strides[:3], local_strides[6:9] = _page_strides(ring), _page_strides(value_ring)
    elif local is not None:
        removed = membership.kv_heads - kept
        ring, first, sink_positions = local.ring, local.sinks, by_row(local.sink_positions)
        local_strides[:6] = *ring.stride()[:3], *first.stride()[:3]
        local_strides[12] = sink_positions.stride(0)
        value_ring, value_first = local.value_ring, local.value_sinks
        if value_ring is not None and value_first is not None:
            removed_values = membership.kv_heads - kept_values
            local_strides[6:12] = *value_ring.stride()[:3], *value_first.stride()[:3]
    wide = power_of_2(max(dim, value_dim))
    block = min(max(1, ELEMENTS // wide), power_of_2(places.tokens))
    heads = kept + kept_values + removed + removed_values
    _write[(cdiv(places.tokens, block), heads, places.batch)](
        *states, *(places.stored or (None, None)), ring, first, value_ring, value_first,
        membership.key_heads.contiguous(), membership.value_heads.contiguous(),
        membership.removed_key_heads.contiguous() if removed else None,
        membership.removed_value_heads.contiguous() if removed_values else None,
        by_row(places.start), by_row(places.slots), by_row(places.membership_ids),
        sink_positions, by_row(places.local_slots),
        places.tokens, places.size, kept, kept_values, removed, removed_values,
        *((local.size, local.shift) if isinstance(local, RollingBuffer) else (1, 0)),
        1 / scales[0], 1 / scales[1], *places.strides, *stored_strides,
        *local_strides,
        0 if membership.batch == 1 else 1,
        D=dim, DP=power_of_2(dim), DV=value_dim,
        DVP=power_of_2(value_dim), BLOCK=block, PAGE=places.page,
        LOCAL_PAGE=local_page,
        SINKS=local.sinks.shape[2] if isinstance(local, RollingBuffer) else 0,
        HAS_IDS=places.membership_ids is not None,
        HAS_LOCAL=removed > 0, HAS_VALUE_RING=removed_values > 0,
        IS_NARROW=states[2].dtype.itemsize == 1, HAS_STORED=places.stored is not None,
        num_warps=4,
    )  # fmt: skip
