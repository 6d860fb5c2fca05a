"""CUDA graphs of the decodes of steps that hold prompts, too.

Where all requests decode, vLLM replays a graph of the whole model. A step with a prompt runs from
Python, where launching the kernels of hundreds of decodes takes longer than they run. So a layer
captures them alone, for some numbers of requests, over memory that all layers share: such a step
copies Q there, replays the graph and copies the output back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from chai_attention.integrations.vllm.metadata import ChaiMetadata, SubBatch

LEAST, MOST = 4, 1024  # requests of the smallest and the largest graph

Attend = Callable[[SubBatch, Tensor, Tensor], None]  # batch, query, out
Replay = Callable[[], None]


def growing(most: int) -> tuple[int, ...]:
    """Numbers of requests up to ``most``, ascending; each at most half as large again as the last.

    Args:
        most: requests of a step.
    """
    steps = sorted([*(LEAST << n for n in range(12)), *(LEAST * 3 // 2 << n for n in range(11))])
    return (*(size for size in steps if size < most), most)


def sizes_of(most: int) -> tuple[int, ...]:
    """Numbers of requests to capture, for steps of ``most`` requests."""
    return growing(min(most, MOST))


class DecodeMemory:
    """What captured decodes read and write; all layers of a rank use it one after the other.

    Args:
        most: requests of a step.
        longest: tokens of a request.
        heads: H.
        dims: D and Dv.
        pages: tokens of a far page, and of a local one or None.
        dtype: of the model.
        device: of the cache.
    """

    def __init__(
        self,
        most: int,
        longest: int,
        heads: int,
        dims: tuple[int, int],
        pages: tuple[int, int | None],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.sizes = sizes_of(most)
        most = self.sizes[-1]

        def table(page: int) -> Tensor:
            return torch.zeros(most, -(-longest // page), dtype=torch.int32, device=device)

        self.query, self.out = (
            torch.zeros(most, heads, dim, dtype=dtype, device=device) for dim in dims
        )
        far, local = pages
        lengths = torch.zeros(2, most, dtype=torch.int32, device=device)
        self._all = SubBatch(
            start=0,
            tokens=slice(0, most),
            query_start_loc=torch.arange(most + 1, dtype=torch.int32, device=device),
            max_query_len=1,
            max_seq_len=longest,
            is_new=False,
            has_new=False,
            first_pages=lengths[0],
            block_table=table(far),
            seq_lens=lengths[1],
            local_table=None if local is None else table(local),
        )
        self._filled: ChaiMetadata | None = None  # the step that it holds the requests of
        self._size = 0
        self.step_query, self.step_out = self.query, self.out  # of the step's decodes
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def batch(self, size: int) -> SubBatch:
        """The first ``size`` requests."""
        here, local = self._all, self._all.local_table
        return here._replace(
            tokens=slice(0, size),
            query_start_loc=here.query_start_loc[: size + 1],
            first_pages=here.first_pages[:size],
            block_table=here.block_table[:size],
            seq_lens=here.seq_lens[:size],
            local_table=None if local is None else local[:size],
        )

    def fill(self, step: ChaiMetadata) -> int | None:
        """Take over a step's decodes, once for all layers.

        Returns:
            The number of requests of the graph to replay; those behind the step's have no tokens.
            None if there is none for so many.
        """
        count = step.num_decodes
        if not 0 < count <= self.sizes[-1]:
            return None
        if self._filled is not step:
            self._size = next(size for size in self.sizes if size >= count)
            here, decodes = self._all, step.decode_batch
            here.seq_lens[count : self._size].zero_()
            here.seq_lens[:count].copy_(decodes.seq_lens)
            here.first_pages[:count].copy_(decodes.first_pages)
            for mine, theirs in (
                (here.block_table, decodes.block_table),
                (here.local_table, decodes.local_table),
            ):
                if mine is not None and theirs is not None:
                    pages = min(mine.shape[1], theirs.shape[1])
                    mine[:count, :pages].copy_(theirs[:, :pages])
            self.step_query, self.step_out = self.query[:count], self.out[:count]
            self._filled = step
        return self._size


class DecodeGraphs:
    """One layer's graphs.

    Args:
        memory: of the rank.
        attend: attends with the decodes of a batch, from ``query [B, H, D]`` to ``out [B, H,
            Dv]``.
        capture: makes a replay of what it is given; for tests.
    """

    def __init__(
        self,
        memory: DecodeMemory,
        attend: Attend,
        capture: Callable[[Replay, DecodeMemory], Replay] | None = None,
    ):
        self._memory = memory
        # the largest first: the others find room in its memory
        self._replays = {
            size: (capture or _capture)(
                partial(attend, memory.batch(size), memory.query[:size], memory.out[:size]),
                memory,
            )
            for size in reversed(memory.sizes)
        }

    def run(self, step: ChaiMetadata, query: Tensor, out: Tensor) -> bool:
        """Attend with a step's decodes, ``query [T, H, D]`` to ``out [T, H, Dv]``, if it can."""
        if step.is_capture or step.is_warm_up:
            return False
        memory, count = self._memory, step.num_decodes
        size = memory.fill(step)
        if size is None:
            return False
        memory.step_query.copy_(query[:count])
        self._replays[size]()
        out[:count].copy_(memory.step_out)
        return True


def _capture(run: Replay, memory: DecodeMemory) -> Replay:
    """Capture what ``run`` launches."""
    run()  # kernels are loaded, which a capture may not do
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    aside = torch.cuda.Stream()
    aside.wait_stream(here)
    # torch.cuda.graph would collect garbage and give back memory each time, for hundreds of graphs
    with torch.cuda.stream(aside):
        graph.capture_begin(pool=memory.pool)
        try:
            run()
        finally:
            graph.capture_end()
    here.wait_stream(aside)
    return graph.replay
