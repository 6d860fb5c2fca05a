"""Clustered attention of one layer under vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.vllm.backend import backend_of
from chai_attention.integrations.vllm.layers import ServedLayer
from chai_attention.integrations.vllm.memberships import PageMemberships
from chai_attention.integrations.vllm.options import refuse_layer
from chai_attention.integrations.vllm.per_request import Request, from_pages
from chai_attention.integrations.vllm.served import ServedModel
from chai_attention.integrations.vllm.step import Row, Step
from chai_attention.integrations.vllm.stock import stock_backend
from chai_attention.integrations.vllm.window import RecentPool
from chai_attention.membership import Membership
from chai_attention.ops import windowed
from chai_attention.ops.cache_write import write_paged
from chai_attention.ops.paged import paged_decode
from chai_attention.ops.paged_prefill import Probe, paged_prefill, varlen_prefill

LEAST_PROBE = 5  # tokens that a membership is decided on at least (the paper's window)


def runs_kernels(device: torch.device) -> bool:
    """Whether whole batches go to one operation, as kernels want it, or requests one by one."""
    return device.type == "cuda"


class ChaiAttention(AttentionImpl[Step]):
    """What vLLM's ``Attention`` calls for a layer; the arguments are vLLM's."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extras: Any,
    ):
        refuse_layer(
            "this model",
            alibi=alibi_slopes is not None,
            sliding_window=sliding_window is not None,
            decoder=attn_type == AttentionType.DECODER,
            shared=kv_sharing_target_layer_name is not None,
            extras=extras,
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.softcap = logits_soft_cap or None
        self.served = ServedModel.of(get_current_vllm_config())

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Find out which layer this is, choose its pages and take the memory of its window."""
        from vllm.model_executor.models.utils import extract_layer_index
        from vllm.platforms import current_platform

        config = self.served.config
        context = config.compilation_config.static_forward_context
        name, module = next(
            (name, module)
            for name, module in context.items()
            if getattr(module, "impl", None) is self
        )
        self.layer: ServedLayer = self.served.layers[extract_layer_index(name)]
        plan = self.layer.plan
        if (plan.heads, plan.kv_heads) != (self.num_heads, self.num_kv_heads):
            raise UnsupportedModelError(
                f"{name} has {self.num_heads} heads and {self.num_kv_heads} K/V heads, but the "
                f"config says {plan.heads} and {plan.kv_heads}"
            )
        stock = stock_backend(config, module, config.model_config.dtype)
        if plan.is_identity and stock is not None:
            self._give_way(module, stock, act_dtype)
            return
        self.layout = self.layer.layout(self.head_size, module.head_size_v)
        module.attn_backend = backend_of(self.layout)
        device = torch.device(current_platform.device_type)
        self._kernels = runs_kernels(device)
        self._memberships: PageMemberships | None = None
        self._fixed: Membership | None = None
        self._offset: Tensor | None = None
        if not plan.needs_probe:
            self._fixed = self.layer.membership(device)
            table = plan.offset_table(device)
            if table is not None and plan.has_recent_window:
                offset = windowed.head_offsets(table, self._fixed)
                self._offset = offset.repeat(self.served.rows, 1)
        self._pool: RecentPool | None = None
        if plan.has_recent_window:
            self._pool = RecentPool(
                self.layer,
                self.served.requests,
                self.head_size,
                self.served.drafts,
                config.model_config.dtype,
                device,
            )

    def _give_way(self, module: Any, stock: type[Any], act_dtype: torch.dtype) -> None:
        """Let vLLM's own backend run the layer."""
        module.attn_backend = stock
        module.backend = AttentionBackendEnum[stock.get_name()]
        module.impl = stock.get_impl_cls()(
            self.num_heads,
            self.head_size,
            self.scale,
            self.num_kv_heads,
            None,
            None,
            self.kv_cache_dtype,
            self.softcap,
            AttentionType.DECODER,
            None,
        )
        module.impl.process_weights_after_loading(act_dtype)

    def prepare(self, cache: Tensor) -> None:
        """Make the tables that belong to a cache, before any CUDA graph needs them."""
        if self.layer.plan.needs_probe and (
            self._memberships is None or self._memberships.pages != cache.shape[0]
        ):
            self._memberships = PageMemberships(self.layer, cache.shape[0], cache.device)
        if cache.is_cuda:
            # whatever kernels derive from a membership is made when they first need it
            pages = torch.zeros(1, dtype=torch.int32, device=cache.device)
            member, rows = self._membership(pages)
            _ = member.key_heads, member.value_heads, member.removed_key_heads, member.key_place
            keys, values = self.layout.split(cache)
            paged_decode(
                cache.new_zeros(1, self.num_heads, self.head_size), keys, values, pages[:, None],
                member, lengths=pages, scale=1.0, rows=rows,
            )  # fmt: skip

    def _membership(self, pages: Tensor) -> tuple[Membership, Tensor | None]:
        """Tables of the requests with these first pages, and the row of each in them."""
        if self._fixed is not None:
            return self._fixed, None
        assert self._memberships is not None
        return self._memberships.of(pages)

    # ---- one step

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the new tokens to their pages and attend.

        Args:
            layer: vLLM's ``Attention``.
            query: ``[T, H, D]``, perhaps with padding behind the step's tokens.
            key: ``[T, G, D]``.
            value: ``[T, G, Dv]``.
            kv_cache: ``[P, 1, N, numbers]``, the layer's pages.
            attn_metadata: the step; None while vLLM measures memory.
            output: ``[T, H, Dv]`` or ``[T, H * Dv]``, written to.
            output_scale: of a quantised output, which is not supported.
            output_block_scale: the same.
        """
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedModelError("clustered heads do not quantise attention's output")
        if attn_metadata is None:
            return output.fill_(0)
        step, tokens = attn_metadata, attn_metadata.tokens
        query, key, value = query[:tokens], key[:tokens], value[:tokens]
        out = output[:tokens].view(tokens, self.num_heads, -1)
        pages = self.layout.split(kv_cache)
        # Requests of one step may share pages that one of them is writing (prefix caching), so
        # every membership comes before any other read of the tables, and every write before reads
        if self.layer.plan.needs_probe:
            self._probe(step, query, key, value)
        before = self._before(step)
        member, lines = self._membership(step.token_pages)
        near = None if self._pool is None else self._pool.near
        lines = self._lines(lines, tokens, member)
        write_paged(
            key, value, pages[0], pages[1], step.slot_mapping, member, lines,
            near, step.positions, step.token_slots,
        )  # fmt: skip
        if self._kernels:
            self._together(step, query, key, value, pages, before, out)
        else:
            for row in step.rows:
                if row.tokens:
                    self._one(step, row, query, key, value, pages, before, out)
        return output

    @staticmethod
    def _lines(lines: Tensor | None, tokens: int, member: Membership) -> Tensor | None:
        """Row of each token in tables that have one row per token or one for all."""
        if lines is None and member.batch > 1:
            return torch.arange(tokens, dtype=torch.int32)
        return lines

    def _together(
        self,
        step: Step,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pages: tuple[Tensor, Tensor],
        before: dict[int, Tensor],
        out: Tensor,
    ) -> None:
        """Attend with all requests, by one operation for decode and one for prefill."""
        count = step.decodes
        if count:
            self._decode(step, query[:count], pages, out[:count])
        if not step.prefills:
            return
        if self._pool is not None:
            for row in step.prefills:
                self._one(step, row, query, key, value, pages, before, out)
            return
        plan, start = self.layer.plan, step.prefills[0].start
        stop = step.prefills[-1].stop
        probe = None
        if plan.needs_probe:
            probe = Probe(query[start:stop], key[start:stop], value[start:stop], plan.probe_end)
        member, rows = self._membership(step.pages[count:])
        options: dict[str, Any] = {
            "query_starts": step.query_starts[count:] - start,
            "most_queries": step.most_queries,
            "scale": self.scale,
            "softcap": self.softcap,
            "rows": rows,
            "probe": probe,
            "out": out[start:stop],
        }
        if all(row.context == 0 for row in step.prefills):
            varlen_prefill(
                query[start:stop], key[start:stop], value[start:stop], member,
                natural_order=True, **options,
            )  # fmt: skip
        else:
            paged_prefill(
                query[start:stop], *pages, step.block_table[count:], member,
                lengths=step.lengths[count:], **options,
            )  # fmt: skip

    def _decode(self, step: Step, query: Tensor, pages: tuple[Tensor, Tensor], out: Tensor) -> None:
        """Attend with one token of each of the first requests."""
        count = query.shape[0]
        member, rows = self._membership(step.pages[:count])
        window: dict[str, Any] = {}
        if self._pool is not None:
            assert step.slots is not None
            offset = self._offset
            if self._memberships is not None:
                offset = self._memberships.offsets(step.pages[:count])
            window = {
                "near": self._pool.near,
                "slots": step.slots[:count],
                "offset": None if offset is None else offset[:count],
            }
        paged_decode(
            query, *pages, step.block_table[:count], member, lengths=step.lengths[:count],
            scale=self.scale, softcap=self.softcap, rows=rows, out=out, most_keys=step.most_keys,
            **window,
        )  # fmt: skip

    def _one(
        self,
        step: Step,
        row: Row,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pages: tuple[Tensor, Tensor],
        before: dict[int, Tensor],
        out: Tensor,
    ) -> None:
        """Attend with the tokens of one request."""
        plan, tokens = self.layer.plan, slice(row.start, row.stop)
        member, lines = self._membership(step.pages[row.number : row.number + 1])
        if lines is not None:
            member = member.select(lines.long())
        q, k, v = (x[tokens].transpose(0, 1)[None] for x in (query, key, value))
        if row.context:
            table = step.block_table[row.number]
            keys, values = (from_pages(states, table, row.length) for states in pages)
        else:
            keys = k.index_select(1, member.key_heads[0])
            values = v[0].transpose(0, 1).index_select(1, member.value_heads[0])
            values = values.transpose(0, 1)[None]
        request = Request(q, k, v, keys, values, member, self.scale, self.softcap)
        if self._pool is None:
            out[tokens] = request.attend()
        else:
            assert step.host_slots is not None
            slot = step.host_slots[row.number]
            out[tokens] = request.attend_near(
                plan.recent,
                plan.sinks,
                self._offset_of(step, row),
                self._pool.first(slot, min(plan.sinks, row.length)),
                before.get(row.number, k[:, :0, :0]),
            )
        if plan.needs_probe and not row.context:
            own = min(plan.probe_end, row.tokens)
            out[row.start : row.start + own] = request.attend_fully(own)

    def _offset_of(self, step: Step, row: Row) -> Tensor | None:
        """``[1, H]`` offsets of one request."""
        if self._memberships is not None:
            return self._memberships.offsets(step.pages[row.number : row.number + 1])
        return None if self._offset is None else self._offset[:1]

    def _before(self, step: Step) -> dict[int, Tensor]:
        """K of removed heads that the rings hold now and will not after this step's write.

        By row of those requests that attend one by one and are under way.
        """
        if self._pool is None or step.host_slots is None:
            return {}
        rows = step.prefills if self._kernels else step.rows
        reach = self.layer.plan.recent - 1
        return {
            row.number: self._pool.last(
                step.host_slots[row.number], row.context, min(row.context, reach)
            )
            for row in rows
            if row.context
        }

    # ---- memberships

    def _probe(self, step: Step, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Cluster the heads of requests that begin, each on its own first tokens."""
        plan = self.layer.plan
        assert self._memberships is not None
        by_end: dict[int, list[Row]] = {}
        for row in step.fresh:
            by_end.setdefault(min(row.tokens, plan.probe_end), []).append(row)
        for end, rows in by_end.items():
            index = torch.tensor([row.number for row in rows], device=step.pages.device)
            pages = step.pages[index]
            if end - plan.probe_start < min(LEAST_PROBE, plan.window):
                member = self.layer.membership(pages.device).expand(len(rows))
            else:
                window = step.first_tokens(rows, plan.probe_start, end)
                q, k, v = (x[window].transpose(1, 2) for x in (query, key, value))
                found = plan.online_membership(q, k, v, self.scale, self.softcap)
                # how many K heads grouped queries need depends on the request; pages hold the most
                same = found.kept_keys == self.layer.kept
                member = found if same else self.layer.membership_of(found.representatives)
            self._memberships.publish(pages, member)
