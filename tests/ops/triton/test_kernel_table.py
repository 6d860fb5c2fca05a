"""The table of kernel calls: every kernel against the definition, on a GPU if there is one.

Each shape runs with each of its sizes in one way, and in all others as an exhaustive case.
"""

import logging
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from chai_attention.ops.fp8 import FLOAT8
from kernel_calls import Config
from random_cases import Size, check_sizes

pytestmark = pytest.mark.usefixtures("nan_memory")
CUDA = torch.cuda.is_available()
HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter multiplies bfloat16 wrongly
PRODUCTS = FLOATS if CUDA else FLOATS[:2]
FLAG = (False, True)
# the interpreter's way of saying that a sequence without far keys has no largest score
quiet = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
needs_cuda = pytest.mark.skipif(not CUDA, reason="large shapes need a CUDA GPU")
needs_hopper = pytest.mark.skipif(
    not HOPPER, reason="needs a Hopper GPU: its instructions have no interpreter"
)

Sizes = list[Size]


def cases(
    kind: str, heads: list[tuple[int, ...]], sizes: list[Sizes], marks: Any = (), **options: Any
) -> Iterator[Any]:
    """Calls with all ``heads`` (heads, K/V heads, clusters, streaming, head size) and options.

    An option has one value, or a tuple of them.
    """
    options = {"dtype": torch.float32, "value_dim": None, **options}
    named = {name: x if isinstance(x, tuple) else (x,) for name, x in options.items()}
    most = max(map(len, named.values()))
    shapes = list(product(heads, sizes))
    for number, ((total, kv_heads, clusters, streaming, dim, *more), size) in enumerate(shapes):
        # each value of each option is met in make test, not each of one with each of another
        often = [n for n in range(most) if n % len(shapes) == number % most]
        daily = [tuple(x[n % len(x)] for x in named.values()) for n in often]
        for values in product(*named.values()):
            given = dict(zip(named, values, strict=True)) | (more[0] if more else {})
            given["value_dim"] = given["value_dim"] or dim
            config = Config(kind, total, kv_heads, clusters, dim, streaming=streaming, **given)
            name = f"{config}: {' '.join(f'{q}of{n}' for q, n, *_ in size)}"
            mark = [] if values in daily else [pytest.mark.exhaustive]
            yield pytest.param(config, size, id=name[:150], marks=[*mark, *marks])


def fresh(*queries: int) -> Sizes:
    """Prompts."""
    return [(n, n) for n in queries]


def behind(queries: list[int], contexts: list[int]) -> Sizes:
    """Queries behind contexts."""
    return [(q, q + c) for q, c in zip(queries, contexts, strict=True)]


def steps(*lengths: int) -> Sizes:
    """One query each."""
    return [(1, n) for n in lengths]


DENSE = [
    *cases("decode", [(9, 9, 1, 0, 48), (12, 12, 5, 0, 48), (32, 32, 32, 0, 48), (9, 3, 4, 0, 48),
                      (8, 1, 3, 0, 48)],
           [steps(1, 1), steps(63, 63), steps(129, 129)], dtype=FLOATS),
    *cases("prefill", [(9, 9, 1, 0, 48), (12, 12, 5, 0, 48), (9, 9, 9, 0, 48), (9, 3, 4, 0, 48)],
           [fresh(2, 2), fresh(63, 63), [(70, 129)] * 2], dtype=PRODUCTS),
    *cases("decode", [(12, 12, 4, 0, dim) for dim in (8, 64, 80, 128)], [steps(70, 70)],
           dtype=torch.float16),
    *cases("prefill", [(12, 12, 4, 0, dim) for dim in (8, 64, 80, 128)], [[(40, 70)] * 2],
           dtype=torch.float16),
    *cases("decode", [(9, 9, 4, 0, 64)], [[(1, 600), (1, 600, 200), (1, 600, 599)]],
           dtype=torch.float16, padded=FLAG, spare=FLAG, softcap=(None, 3.0), token_major=FLAG),
    *cases("prefill", [(9, 9, 4, 0, 64)], [[(33, 67), (33, 67, 22), (33, 67, 66)]],
           dtype=torch.float16, padded=FLAG, spare=FLAG, softcap=(None, 3.0), token_major=FLAG),
    *cases("decode", [(6, 6, 2, 0, 40)], [steps(30, 30)], value_dim=24),
    *cases("prefill", [(6, 6, 2, 0, 40)], [[(9, 30)] * 2], value_dim=24),
]  # fmt: skip


def window(recent: int, sinks: int, spare: int) -> dict[str, int]:
    return {"recent": recent, "sinks": sinks, "ring_spare": spare}


# windows longer than the context, longer than a step of the kernel, and over the sinks; some or all
# heads stream, with grouped queries also heads whose V others keep
RINGS = [
    (9, 9, 4, 0, 48, window(5, 3, 0)), (12, 12, 1, 0, 64, window(32, 4, 2)),
    (6, 6, 2, 0, 128, window(7, 0, 1)), (9, 3, 2, 0, 80, window(9, 2, 0)),
    (8, 8, 8, 0, 96, window(4, 1, 0)), (5, 5, 2, 0, 64, window(125, 4, 1)),
    (9, 9, 2, 4, 48, window(5, 3, 1)), (9, 3, 2, 5, 64, window(9, 0, 0)),
    (6, 2, 2, 3, 80, window(70, 2, 0)), (5, 5, 0, 5, 64, window(9, 4, 2)),
    (6, 3, 0, 6, 48, window(4, 1, 0)), (4, 4, 4, 0, 64, window(3, 1, 0)),
]  # fmt: skip
PADDED_STEPS = [[(1, 1), (1, 8, 2), (1, 63, 40), (1, 129, 126), (1, 0)]]
PAGES = [
    (9, 9, 4, 0, 48, {"page": 16}), (12, 12, 1, 0, 64, {"page": 8}),
    (32, 32, 5, 0, 128, {"page": 16}), (9, 3, 4, 0, 80, {"page": 32}),
    (8, 8, 8, 0, 96, {"page": 24}),
]  # fmt: skip
NARROW = [
    (9, 9, 4, 0, 48, {"page": 16}), (12, 12, 1, 0, 64, {"page": 32}),
    (32, 32, 5, 0, 128, {"page": 16}), (9, 3, 4, 0, 80, {"page": 64}),
]  # fmt: skip


def two(page: int, local_page: int, recent: int, sinks: int, **more: Any) -> dict[str, Any]:
    return {"page": page, "local_page": local_page, "recent": recent, "sinks": sinks, **more}


BOTH_PAGES = [
    (9, 9, 4, 0, 48, two(16, 48, 5, 3)), (9, 9, 2, 4, 64, two(64, 48, 70, 4)),
    (6, 2, 1, 3, 80, two(48, 16, 9, 0, softcap=5.0)), (9, 3, 2, 5, 64, two(16, 16, 40, 20)),
    (5, 5, 0, 5, 64, two(64, 16, 9, 4)), (6, 3, 0, 6, 48, two(16, 64, 200, 1, softcap=5.0)),
    (4, 4, 4, 0, 64, two(16, 16, 3, 1)), (6, 6, 1, 2, 128, two(32, 48, 33, 17, softcap=5.0)),
]  # fmt: skip
WINDOWED_DENSE = [
    case
    for heads, queries, size, recent in (
        ((5, 5, 2, 0), 1, 70, 4), ((6, 3, 3, 0), 1, 5, 4), ((5, 5, 2, 0), 33, 33, 9),
        ((6, 2, 3, 0), 20, 70, 32), ((7, 7, 2, 3), 1, 70, 4), ((7, 7, 2, 3), 40, 70, 9),
        ((6, 2, 2, 3), 33, 33, 5), ((6, 2, 1, 5), 1, 40, 8), ((5, 5, 0, 5), 37, 60, 4),
        ((5, 5, 0, 5), 1, 20, 3), ((7, 7, 2, 1), 20, 20, 64), ((5, 5, 2, 0), 20, 33, 9),
    )
    for case in cases(
        "window", [(*heads, 16)], [[(queries, size), (queries, size, size // 2)]], [quiet],
        recent=recent, sinks=3, padded=FLAG, softcap=3.0 if size == 33 and queries == 20 else None,
    )
]  # fmt: skip
STEPS = [
    *cases("local", RINGS, PADDED_STEPS, dtype=FLOATS, value_dim=40, spare=True, padded=FLAG),
    *cases("local op", RINGS, PADDED_STEPS, dtype=FLOATS, value_dim=40, spare=True, padded=FLAG),
    *cases("local", [(6, 6, 2, 0, 32), (6, 6, 2, 3, 32)], [[(1, 600), (1, 515, 3)]], recent=512,
           sinks=4, ring_spare=1, spare=True, padded=True, offsets=False),
    *cases("paged", PAGES, [steps(1, 63, 0, 129)], dtype=FLOATS, value_dim=40, one_buffer=FLAG,
           representatives=FLAG),
    *cases("paged", NARROW, [steps(1, 63, 0, 129)], dtype=FLOATS, value_dim=40, stored=FLOAT8),
    *cases("paged", [(6, 6, 2, 0, 32)], [steps(40, 7, 90)], tables=("shared",)),
    *cases("paged", [(6, 6, 2, 0, 32)], [steps(40, 7, 90)], tables="rows", softcap=3.0),
    *cases("paged local", [x for x in BOTH_PAGES if x[2]], [steps(1, 63, 0, 129)], dtype=FLOATS,
           value_dim=40),
    *cases("paged local", [x for x in BOTH_PAGES if not x[2]], [steps(1, 63, 0, 129)],
           dtype=(torch.float32, torch.float16, HALF), value_dim=40),
    *cases("paged local", [(6, 6, 2, 2, 64), (6, 2, 1, 2, 64), (4, 4, 0, 4, 64)],
           [steps(70, 5, 100)], stored=FLOAT8, **two(64, 48, 20, 4), offsets=False),
]  # fmt: skip

MANY_LENGTHS = [behind([q, 3], [c, 0]) for q in (1, 5, 63, 129) for c in (0, 1, 65, 150)]
PROMPTS = [  # heads and head sizes of prompts behind pages or not
    (9, 9, 4, 0, 48), (12, 12, 1, 0, 64), (32, 32, 5, 0, 128), (9, 3, 4, 0, 80), (8, 8, 8, 0, 96),
]  # fmt: skip
PROBED = [(9, 9, 3, 0, 32), (6, 2, 3, 0, 32)]
LONG = [300, 1, 0, 513, 77, 128]
LARGE = {
    "marks": [needs_cuda], "dtype": (torch.float16, torch.bfloat16), "probe_end": 32,
    "tables": "rows", "tail": 3,
}  # fmt: skip
LARGE_HEADS = [
    (*heads, 0, dim) for heads in ((32, 32, 4), (32, 32, 16), (12, 12, 12), (32, 8, 4))
    for dim in (64, 96, 128)
]  # fmt: skip
PREFILL = [
    *cases("paged prefill", [(*heads, {"page": page}) for heads, page in
                             zip(PROMPTS, (16, 16, 16, 32, 48), strict=True)],
           [behind([5, 1, 63, 0, 2], [0, 40, 30, 0, 0])], dtype=PRODUCTS, one_buffer=FLAG,
           representatives=FLAG, tables="rows", tail=3),
    *cases("paged prefill", [(9, 9, 3, 0, 64)], MANY_LENGTHS, dtype=HALF, tables="shared",
           representatives=FLAG, tail=3),
    # longer and shorter prompts than the probe's window, and a continued one, which is left alone
    *cases("paged prefill", PROBED, [behind([35, 3, 20], [0, 0, 7])], probe_end=(1, 5, 40),
           representatives=FLAG, tables="rows", tail=3),
    *cases("paged prefill", [(6, 6, 2, 0, 32)], [behind([20, 4], [0, 33])], value_dim=24,
           softcap=3.0, probe_end=5, representatives=FLAG, tables="rows", tail=3),
    # a row of padding in a batch of fixed size
    *cases("paged prefill", [(6, 6, 2, 0, 32)], [[(7, 27), (1, 0)]], tables="shared"),
    *cases("paged prefill", NARROW, [behind([70, 1, 33], [40, 128, 0])], dtype=PRODUCTS,
           stored=FLOAT8),
    *cases("paged prefill", LARGE_HEADS, [behind(LONG, [0, 700, 0, 1000, 3, 0])], one_buffer=True,
           representatives=FLAG, **LARGE),
    *cases("varlen", PROMPTS, [fresh(5, 1, 63, 0, 2)], dtype=PRODUCTS, natural=FLAG, tail=3),
    *cases("varlen", [(9, 9, 3, 0, 64)], [fresh(3, n, 2) for n in (1, 5, 63, 129)], dtype=HALF,
           tables="shared", tail=3),
    *cases("varlen", [(6, 3, 2, 0, 32)], [fresh(9, 2, 40)], natural=True, probe_end=5, softcap=3.0,
           tail=3),
    # tiles are found without the lengths on the host: sequences around the size of a tile, and more
    # of them than are looked at at a time
    *cases("varlen", [(4, 4, 2, 0, 16)], [fresh(15, 16, 17, 0, 0, 1, 31, 33, 16, 16, 2)],
           dtype=HALF, tables="shared", tail=3),
    *cases("varlen", [(2, 2, 1, 0, 16)], [fresh(*[1, 0, 2] * 45)], tail=3),
]  # fmt: skip

WINDOWED = [
    (9, 9, 4, 0, 48), (12, 12, 3, 5, 64), (32, 32, 5, 12, 128), (9, 3, 2, 4, 80), (6, 6, 0, 6, 32),
    (8, 2, 3, 5, 64), (6, 3, 0, 6, 32), (8, 8, 1, 7, 96),
]  # fmt: skip
WINDOWS = [
    (9, 9, 3, 2, 16, {"recent": recent, "sinks": sinks}) for recent, sinks in
    ((1, 0), (1, 4), (128, 4), (300, 0), (33, 1), (5, 40), (64, 16))
]  # fmt: skip
BASE = {"recent": 32, "sinks": 4, "tables": "rows", "tail": 3}
PREFILL_WINDOW = [
    *cases("paged window", WINDOWED, [behind([5, 1, 63, 0, 2], [0, 70, 30, 0, 129])],
           dtype=PRODUCTS, one_buffer=FLAG, **BASE),
    *cases("paged window", [(6, 6, 2, 2, 32, two(far, local, 17, 4)) for far, local in
                            ((16, 48), (64, 16), (64, 48), (48, 32), (16, 64))],
           [behind([40, 1, 3], [0, 100, 77])], tables="rows", tail=3),
    *cases("paged window", WINDOWS, [behind([130, 20, 35], [0, 150, 10])], tables="shared", tail=3),
    *cases("paged window", [(9, 9, 3, 4, 64)], MANY_LENGTHS,
           **{**BASE, "dtype": HALF, "tables": "shared"}),
    *cases("paged window", PROBED, [behind([35, 3, 20], [0, 0, 7])], probe_end=(1, 5, 40),
           **{**BASE, "recent": 8}),
    *cases("paged window", [(6, 6, 2, 0, 32)], [behind([50, 4], [0, 33])], softcap=3.0,
           offsets=False, value_dim=24, **{**BASE, "recent": 9}),
    *cases("paged window", [(12, 12, 3, 4, 64)], [behind([40, 1, 33], [40, 128, 0])],
           dtype=PRODUCTS, stored=FLOAT8, **BASE),
    *cases("paged window", [(2, 2, 1, 1, 16)], [behind([1, 0, 2] * 45, [0, 3, 20] * 45)], recent=4,
           sinks=1, tables="rows", tail=3),
    *cases("paged window", [(6, 6, 2, 2, 32)], [[(7, 27), (1, 0)]], recent=4, sinks=2,
           offsets=False),
    *cases("varlen window", WINDOWED, [fresh(5, 1, 83, 0, 40)], dtype=PRODUCTS, natural=True,
           **{**BASE, "recent": 20}),
    *cases("varlen window", WINDOWS, [fresh(130, 20, 35)], natural=True, tables="shared", tail=3),
    *cases("varlen window", PROBED, [fresh(35, 3, 20)], probe_end=(1, 5, 40), natural=True,
           **{**BASE, "recent": 8}),
    *cases("varlen window", [(6, 6, 2, 0, 32)], [fresh(50, 4)], softcap=3.0, offsets=False,
           natural=True, **{**BASE, "recent": 9}),
]  # fmt: skip


LARGE_DENSE = cases(
    "window", [(12, kv_heads, 3, 0, dim) for kv_heads in (12, 4) for dim in (64, 80, 128)],
    [[(q, n), (q, n, n // 2)] for q, n in ((300, 300), (1, 1000), (257, 900), (700, 720))],
    [needs_cuda], dtype=torch.bfloat16, recent=32, sinks=3, padded=FLAG,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "sizes"), [*DENSE, *WINDOWED_DENSE, *STEPS, *PREFILL, *PREFILL_WINDOW, *LARGE_DENSE]
)
def test_kernels_are_the_definition(config, sizes):
    check_sizes(config, sizes)


LARGE_WINDOWS = [
    *cases("varlen", LARGE_HEADS, [fresh(*LONG, 1000)], natural=FLAG,
           **{**LARGE, "tables": "each"}),
    *(
        case
        for heads, probe_end in (((32, 32, 4, 0), 32), ((32, 32, 8, 12), 0), ((12, 12, 0, 12), 0),
                                 ((32, 8, 4, 10), 0))
        for kind, sizes in (("varlen window", fresh(*LONG)),
                            ("paged window", behind(LONG, [0, 700, 0, 1000, 3, 0])))
        for case in cases(
            kind, [(*heads, dim) for dim in (64, 96, 128)], [sizes], natural=kind.startswith("v"),
            one_buffer=kind.startswith("p"), **{**LARGE, "probe_end": probe_end},
            **two(64, 48, 128, 4),
        )
    ),
    # head tiles of one and of two members and streaming ones, tiles with and without far keys
    *cases("paged window", [(12, 12, 5, 3, 128, two(far, local, recent, sinks)) for far, local in
                            ((64, 48), (16, 16), (48, 64), (128, 32)) for recent, sinks in
                            ((1, 0), (1, 1), (32, 4), (100, 16), (128, 4), (512, 0), (512, 4))],
           [behind([130, 1, 64, 0, 300, 65], [0, 900, 129, 0, 17, 500])], [needs_hopper],
           dtype=torch.bfloat16, tables="rows", tail=3),
    # programs of one member behind programs of two once took whatever Q was left in registers
    *(
        case
        for kind, sizes in (("varlen window", fresh(400, 65, 257)),
                            ("paged window", behind([400, 65, 257], [200, 0, 700])))
        for case in cases(
            kind, [(12, 12, clusters, 0, 128) for clusters in (1, 4, 11, 12)], [sizes],
            [needs_hopper], dtype=torch.bfloat16, natural=kind.startswith("v"), tables="rows",
            tail=3, **two(64, 48, 16, 1),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "sizes"), LARGE_WINDOWS)
def test_large_ones_take_the_kernel_of_the_device(config, sizes, caplog):
    with caplog.at_level(logging.DEBUG, "chai_attention"):
        check_sizes(config, sizes)
    # a tile of one head of 64 numbers is too narrow for it
    wide = config.dim != 96 and (config.recent or config.dim > 64 or config.clusters < config.heads)
    name = "packed Hopper prefill kernel" if HOPPER and wide else "packed prefill kernel"
    assert name + (" with a window" if config.recent else "") in caplog.text
