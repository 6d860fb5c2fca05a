"""One layer of a chat's next turn: few new tokens behind a long context in pages.

LLaMA-7B's and LLaMA-3-8B's layers, bfloat16, random K and V, one request. Our attention as the
plugin chooses it, with no more than so many parts of the context (`ops/triton/context_parts.py`;
with one part Hopper's own kernel, where there are 65 tokens or more), and vLLM's FlashAttention 3
over pages of 16 where vLLM is installed. Replays of a CUDA graph over four layers' pages. Outputs
are first compared with the reference in float32.

    python benchmarks/next_turn.py --out next-turn.json
    TRITON_INTERPRET=1 python benchmarks/next_turn.py --tiny --out tiny.json     # on a CPU
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chai_attention.benchmarking.timing import machine, time_calls
from chai_attention.integrations.vllm.layers import local_page
from chai_attention.membership import Membership
from chai_attention.ops.call import AttentionCall, PackedQueries, PagedKV
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.reference_backend import ReferenceBackend
from chai_attention.ops.triton import context_parts
from chai_attention.ops.triton.backend import of_device
from chai_attention.ops.windowed import head_offsets
from parts import Parts
from serving_kinds import KINDS, SHAPES, Shape, roles

FIRST = ["default", "streaming half", "k=8 window", "k=8", "grouped streaming"]
MOST_PARTS = (16, 11, 8, 5, 3, 2, 1)
PAGE, STOCK_PAGE = 64, 16
LAYERS = 4  # whose K and V do not fit an L2 cache together
Call = Callable[[], Any]


class Layer:
    """Pages of one layer with one request, whose last tokens are new.

    Args:
        name: of a kind of `serving_kinds`.
        shape: of its model.
        new: tokens.
        size: tokens of the request, with the new ones.
        device: "cuda", or "cpu" with Triton's interpreter.
    """

    def __init__(self, name: str, shape: Shape, new: int, size: int, device: str):
        kind, self.shape, self.new = KINDS[name], shape, new
        own, streaming = kind.layers(shape)[-1]
        rep, streams = roles(shape, own, streaming, 1)
        groups, dim = shape.kv_heads, shape.head_dim
        # made on the CPU, as the plugin makes it: kernels know how many head tiles there are
        self.member = Membership.from_representatives(
            torch.tensor([rep]), kv_heads=groups, streaming=streams
        ).to(device)
        kept, values = self.member.kept_keys, self.member.kept_values
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32

        def pages(tokens: int, heads: int) -> Tensor:
            count = -(-size // tokens)
            return torch.randn(count, tokens, heads, dim, device=device, dtype=self.dtype)

        def table(tokens: int) -> Tensor:
            return torch.randperm(-(-size // tokens), device=device).int()[None]

        local = None
        if kind.recent:
            tokens = local_page(PAGE, kept + values, 2 * groups - kept - values, kind.recent)
            local = LocalPages(
                pages(tokens, groups - kept), pages(tokens, groups - values), table(tokens),
                kind.recent, kind.sinks,
            )  # fmt: skip
        lengths = torch.tensor([size], dtype=torch.int32, device=device)
        far = pages(PAGE, kept), pages(PAGE, values)
        self.kv = PagedKV(*far, table(PAGE), lengths, local, size, {})
        query = 2 * torch.randn(new, shape.heads, dim, device=device, dtype=self.dtype)
        starts = torch.tensor([0, new], dtype=torch.int32, device=device)
        self.queries = PackedQueries(query, starts, new)
        self.call = AttentionCall(
            self.member, dim**-0.5, offset=head_offsets(None, self.member) if local else None
        )
        self.out = torch.empty_like(query)

    def attend(self) -> None:
        """As the plugin does."""
        of_device(self.out.device).packed_prefill(self.queries, self.kv, self.call, self.out, None)

    def reference(self) -> Tensor:
        """The same in float32."""
        kv, local = self.kv, self.kv.window
        if local is not None:
            local = LocalPages(
                local.key.float(), local.value.float(), local.block_table, local.recent, local.sinks
            )
        wide = PagedKV(kv.key.float(), kv.value.float(), kv.block_table, kv.seq_lens, local)
        query = PackedQueries(self.queries.query.float(), self.queries.query_start_loc, self.new)
        out = torch.empty_like(query.query)
        ReferenceBackend().packed_prefill(query, wide, self.call, out, None)
        return out


def flash(shape: Shape, new: int, size: int) -> Call | None:
    """Attention of such a layer by FlashAttention 3; None without vLLM."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    count = -(-size // STOCK_PAGE)
    like: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    return partial(
        flash_attn_varlen_func,
        q=torch.randn(new, shape.heads, shape.head_dim, **like),
        k=torch.randn(count, STOCK_PAGE, shape.kv_heads, shape.head_dim, **like),
        v=torch.randn(count, STOCK_PAGE, shape.kv_heads, shape.head_dim, **like),
        cu_seqlens_q=torch.tensor([0, new], dtype=torch.int32, device="cuda"),
        max_seqlen_q=new, max_seqlen_k=size, causal=True, fa_version=3,
        seqused_k=torch.tensor([size], dtype=torch.int32, device="cuda"),
        block_table=torch.randperm(count, device="cuda").int()[None],
    )  # fmt: skip


def measure(name: str, new: int, past: int, options: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of a layer by each number of parts, and how far outputs are from the reference.

    Raises:
        SystemExit: an output is more than 2% of the largest one away.
    """
    device, shape = options.device, SHAPES[KINDS[name].model]
    layers = [Layer(name, shape, new, past + new, device) for _ in range(LAYERS)]
    want = layers[0].reference()
    found: dict[str, Any] = {"us": {}, "difference": 0.0}
    usual = context_parts.MOST_PARTS, context_parts.WORTH_PARTS
    for most in ("chosen", *options.parts):
        if most != "chosen":
            context_parts.MOST_PARTS, context_parts.WORTH_PARTS = most, 2
        layers[0].attend()
        away = float((layers[0].out.float() - want).abs().max() / want.abs().max())
        found["difference"] = max(found["difference"], round(away, 5))
        if not away < 0.02:
            raise SystemExit(
                f"{name}, {new} behind {past}, {most} parts: {away:.3f} of the largest"
            )
        time = time_calls([layer.attend for layer in layers], device, options.seconds)
        found["us"][str(most)] = round(time.us, 1)
        context_parts.MOST_PARTS, context_parts.WORTH_PARTS = usual
    calls = [flash(shape, new, past + new) for _ in range(LAYERS)] if device == "cuda" else [None]
    known = [call for call in calls if call is not None]
    if known:
        found["us"]["FlashAttention 3"] = round(time_calls(known, device, options.seconds).us, 1)
    return found


def table(rows: dict[str, Any]) -> str:
    """The results in Markdown."""
    ways = list(dict.fromkeys(way for row in rows.values() for way in row["us"]))
    heads = [f"{way} parts" if way.isdecimal() else way for way in ways]
    lines = [f"| us of a layer | {' | '.join(heads)} |", "|---" * (len(ways) + 1) + "|"]
    for name, row in rows.items():
        cells = (str(row["us"].get(way, "-")) for way in ways)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not in the file yet, and print all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("next-turn.json"), help="results")
    parser.add_argument("--only", action="append", choices=KINDS, help="repeatable")
    parser.add_argument("--new", type=int, action="append", help="new tokens; repeatable")
    parser.add_argument("--past", type=int, action="append", help="tokens before; repeatable")
    parser.add_argument("--seconds", type=float, default=0.1, help="of each measurement")
    parser.add_argument("--tiny", action="store_true", help="short contexts: on a CPU")
    options = parser.parse_args()
    options.device = "cpu" if options.tiny else "cuda"
    options.parts = (3, 1) if options.tiny else MOST_PARTS
    torch.manual_seed(0)
    results = Parts(options.out, {"layers": LAYERS, "tiny": options.tiny})
    results.found |= {"machine": machine(options.device)}
    kept = results.found.setdefault("rows", {})
    for name in options.only or (FIRST[:1] if options.tiny else FIRST):
        for past in options.past or ([1100] if options.tiny else [8064, 32_000]):
            for new in options.new or ([5] if options.tiny else [40, 168, 256]):
                row = f"{name}, {new} behind {past:,}"
                if row not in kept:
                    results.add(row, measure(name, new, past, options), "rows")
                    print(row, json.dumps(kept[row]), flush=True)
    print(table(kept))


if __name__ == "__main__":
    main()
