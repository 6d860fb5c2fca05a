"""Clustered attention of one layer under vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.vllm import warm_up
from chai_attention.integrations.vllm.attend import StepAttention
from chai_attention.integrations.vllm.backend import (
    PACKED_LAYOUTS,
    ChaiBackend,
    backend_of,
    common_layouts,
    limited_to,
    native_backend,
    run_natively,
    with_far_pages,
)
from chai_attention.integrations.vllm.copies import DequantisationWorkspace
from chai_attention.integrations.vllm.flash import FlashStepAttention, HeadKinds, flash_kernels
from chai_attention.integrations.vllm.layers import LayerShard, Pages
from chai_attention.integrations.vllm.memberships import FixedMembership, PageMemberships
from chai_attention.integrations.vllm.metadata import ChaiMetadata
from chai_attention.integrations.vllm.model_state import ModelState
from chai_attention.integrations.vllm.options import EIGHT_BITS, refuse_layer
from chai_attention.membership import Membership
from chai_attention.ops.cache_write import PageWriter
from chai_attention.ops.fp8 import FLOAT8, as_stored


class ChaiAttention(AttentionImpl[ChaiMetadata]):
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
        self.is_fp8 = kv_cache_dtype in EIGHT_BITS
        self._scales = (1.0, 1.0)  # K and V in pages are divided by these
        self.softcap = logits_soft_cap or None
        self.model_state = ModelState.of(get_current_vllm_config())
        self._name: str | None = None  # of the layer, once its weights are loaded
        # views of far pages and the local ones beside them, for as long as the far pages are there
        self._viewed: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._is_prepared = False  # for a cache

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Find out which layer this is, and choose its pages.

        vLLM calls this again when it reloads weights or wakes up. By then running requests and CUDA
        graphs use what was made, so it stays.
        """
        if self._name is not None:
            self._weights_changed()
            return
        from vllm.model_executor.models.utils import extract_layer_index
        from vllm.platforms import current_platform

        config = self.model_state.config
        context = config.compilation_config.static_forward_context
        name, module = next(
            (name, module)
            for name, module in context.items()
            if getattr(module, "impl", None) is self
        )
        self._name = name
        self.layer: LayerShard = self.model_state.layers[extract_layer_index(name)]
        plan = self.layer.plan
        if (plan.heads, plan.kv_heads) != (self.num_heads, self.num_kv_heads):
            raise UnsupportedModelError(
                f"{name} has {self.num_heads} heads and {self.num_kv_heads} K/V heads, but the "
                f"config says {plan.heads} and {plan.kv_heads}"
            )
        native = native_backend(config, module, config.model_config.dtype)
        some = any(each.plan.is_identity for each in self.model_state.layers)
        own = PACKED_LAYOUTS if self.model_state.has_local_pages else ChaiBackend.layouts
        layouts = common_layouts(own, native if some else None)
        self.model_state.add_local_layer(module, layouts)
        probe_end = self.model_state.far_probe
        if plan.is_identity and native is not None:
            # local pages are kept in layouts that vLLM's attention reads but does not name
            if (
                config.parallel_config.pipeline_parallel_size > 1
                or self.model_state.has_local_pages
            ):
                native = limited_to(native, layouts)
            if probe_end is not None:
                native = with_far_pages(native, probe_end)
            run_natively(module, native, act_dtype)
            return
        self.layout = self.layer.layout(self.head_size, module.head_size_v)
        module.attn_backend = backend_of(self.layout, layouts, probe_end)
        device = torch.device(current_platform.device_type)
        self._workspace: DequantisationWorkspace | None = None
        if self.is_fp8 and self.layer.needs_workspace:
            self._workspace = self.model_state.workspace(self.layer, module.head_size_v, device)
        self._held = self.model_state.hold(self.layer, device)
        self._kinds = None if self.is_fp8 else HeadKinds.of(self.layer)
        self._flash = None
        if self._kinds is not None:
            dtype = config.model_config.dtype
            self._flash = flash_kernels(device, dtype, self.head_size, module.head_size_v)
            if self._flash is not None:
                counts = len(self._kinds.kept), self._kinds.kv_heads
                self.model_state.schedules(self.softcap is not None).add(*counts)
        self.local_layout = self.layer.local_layout(self.head_size, module.head_size_v)

    def _weights_changed(self) -> None:
        """Go on with other weights, or with the same ones put back.

        Raises:
            UnsupportedModelError: the scales of 8-bit pages are others; kernels have them built in.
        """
        if self._is_prepared and self._checkpoint_scales() != self._scales:
            raise UnsupportedModelError(
                f"the new weights of {self._name} have other scales of K and V in 8 bits: start "
                "the server anew with them"
            )

    def _checkpoint_scales(self) -> tuple[float, float]:
        """The scales of K and V in 8-bit pages; known once all weights are processed."""
        if not self.is_fp8:
            return 1.0, 1.0
        module = self.model_state.config.compilation_config.static_forward_context[self._name]
        return module._k_scale_float, module._v_scale_float

    def prepare(self, cache: Tensor) -> None:
        """Make the tables that belong to a cache, before any CUDA graph needs them."""
        device, plan = cache.device, self.layer.plan
        self._scales = self._checkpoint_scales()
        self._is_prepared = True
        # caches before that are for trials, but for one by which vLLM measures CUDA graphs
        is_planned = cache.shape[0] == self.model_state.config.cache_config.num_gpu_blocks
        self._viewed.clear()
        if is_planned:
            self._held = None  # what is made now was counted
            # a view of the tensor itself would keep it, and vLLM lets a cache go after a trial
            own = cache.new_empty(0).set_(
                cache.untyped_storage(), cache.storage_offset(), cache.shape, cache.stride()
            )
            self._viewed[cache] = self._local_cache(), self._view(own)._replace(shared={})
        self._memberships: FixedMembership | PageMemberships = (
            PageMemberships(self.layer, cache.shape[0], device)
            if plan.needs_probe
            else FixedMembership(self.layer, self.model_state.max_requests, device)
        )
        if self._kinds is not None and self._flash is not None:
            assert isinstance(self._memberships, FixedMembership)
            self._attention: StepAttention = FlashStepAttention(
                self.layer, self._kinds, self._flash, self._memberships,
                self.model_state.max_requests, self.scale, self.softcap, device,
            )  # fmt: skip
        else:
            self._attention = StepAttention(
                plan, self._memberships, self.scale * self._scales[0], self.softcap, self._workspace
            )
        if cache.is_cuda:
            # whatever kernels derive from a membership is made when they first need it
            self._run(cache, next(warm_up.decodes(self.model_state, cache, [1])))
            kind = type(self._attention), self.layer.kind
            if kind not in self.model_state.warmed:
                self.model_state.warmed.add(kind)
                for step in warm_up.steps(self.model_state, cache):
                    self._run(cache, step)
            if is_planned and self.model_state.has_graphs:
                self._attention.capture(self._pages(cache), self.model_state.decode_memory(cache))

    def _run(self, cache: Tensor, step: ChaiMetadata) -> None:
        """Run a step of random tokens."""
        heads, groups, dim = self.num_heads, self.num_kv_heads, self.head_size
        dtype = self.model_state.config.model_config.dtype
        fused = torch.randn(
            step.num_actual_tokens, heads + 2 * groups, dim, dtype=dtype, device=cache.device
        )
        query, key, value = fused.split([heads, groups, groups], 1)
        value = value[..., : self.layout.value_dim]
        out = query.new_empty(step.num_actual_tokens, heads, value.shape[2])
        self.forward(None, query, key, value, cache, step, out)

    def begin(self, step: ChaiMetadata) -> None:
        """Give a membership to requests whose first tokens are too few to cluster heads on.

        That is not left to `forward`: vLLM's older model runner decodes prompts of one token by a
        CUDA graph, in which no membership can be set.
        """
        if isinstance(self._memberships, PageMemberships):
            self._memberships.begin(step)

    # ---- one step

    def _pages(self, cache: Tensor) -> Pages:
        """View the layer's pages, far and local: always the same views of a planned cache."""
        found: tuple[Tensor | None, Pages] | None = self._viewed.get(cache)
        if found is not None and found[0] is self._local_cache():
            return found[1]
        return self._view(cache)

    def _local_cache(self) -> Tensor | None:
        if self.local_layout is None or self.model_state.local is None:
            return None
        return self.model_state.local.kv_cache

    def _view(self, cache: Tensor) -> Pages:
        dtype = FLOAT8 if self.is_fp8 else cache.dtype
        far = self.layout.split(cache.view(dtype) if self.is_fp8 else cache)
        if self.local_layout is None or self.model_state.local is None or self._name is None:
            return Pages(far[0], far[1])
        local = self.model_state.local.split(self._name, dtype)
        return Pages(far[0], far[1], local[0], local[1])

    def _writer(self, pages: Pages, member: Membership, step: ChaiMetadata) -> PageWriter:
        """What writes to the pages: the same for all steps, where pages and membership are."""
        shared: dict[Any, Any] = {} if pages.shared is None else pages.shared
        writer: PageWriter | None = shared.get(PageWriter)
        if writer is None or writer.membership is not member:
            table = None if step.local is None else step.local.block_table
            local = self._attention.local_pages(pages, table, step.block_table)
            writer = shared[PageWriter] = PageWriter(pages.key, pages.value, member, local)
        return writer

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: ChaiMetadata | None,
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
            kv_cache: ``[P, 1, N, numbers]``, the layer's pages; uint8 where they hold 8-bit floats.
            attn_metadata: of the step; None while vLLM measures memory.
            output: ``[T, H, Dv]`` or ``[T, H * Dv]``, written to.
            output_scale: of a quantised output, which is not supported.
            output_block_scale: the same.
        """
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedModelError("clustered heads do not quantise attention's output")
        if attn_metadata is None:
            if self.is_fp8:
                _room_for(key, value)
            return output.fill_(0)
        step, tokens = attn_metadata, attn_metadata.num_actual_tokens
        out = output
        if query.shape[0] != tokens:
            query, key, value, out = query[:tokens], key[:tokens], value[:tokens], output[:tokens]
        if out.ndim == 2:
            out = out.view(tokens, self.num_heads, -1)
        pages = self._pages(kv_cache)
        scales, stored = self._scales, None
        # Requests of a step may share pages that one of them is writing (prefix caching). So first
        # all memberships are decided, then all pages are written, and then requests read either.
        if isinstance(self._memberships, PageMemberships):
            if self.is_fp8 and step.new:
                # decided on what others read in pages, which is not written yet
                key, value = as_stored(key, scales[0]), as_stored(value, scales[1])
                scales = (1.0, 1.0)
            self._memberships.probe(
                step, query, key, value, self._attention.scale, self.softcap
            )  # fmt: skip
        elif self.is_fp8 and self._attention.reads_new(step):
            stored = _room_for(key, value)
        member, ids = self._memberships.of(step.token_pages)
        if ids is None and member.batch > 1:
            ids = torch.arange(tokens, dtype=torch.int32)
        self._writer(pages, member, step).write(
            key, value, step.slot_mapping, ids, self._attention.local_slots(step, pages), scales,
            stored,
        )  # fmt: skip
        if stored is not None:  # new tokens have to be what others read in pages
            key, value = stored
        self._attention.run(step, query, key, value, pages, out)
        if self._scales[1] != 1:
            out.mul_(self._scales[1])
        return output


def _room_for(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Room for new K and V as pages hold them.

    They are not rounded in place: what vLLM compiles around attention takes them for unchanged.
    """
    return key.new_empty(key.shape), value.new_empty(value.shape)
