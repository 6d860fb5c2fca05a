"""Profiles of all kinds for the tiny model that engines run, and prompts for it."""

import random

from chai_attention.profile import ClusterProfile

HEADS, LAYERS, PAGE = 8, 3, 32
CLUSTERS = (3, 8, 5)
REPRESENTATIVES = [[0, 1, 0, 3, 1, 1, 3, 0], list(range(8)), [0, 1, 2, 3, 4, 0, 3, 2]]


def prompts_of(sizes: list[int], vocabulary: int = 256, seed: int = 0) -> list[list[int]]:
    chosen = random.Random(seed)
    return [[chosen.randrange(3, vocabulary) for _ in range(size)] for size in sizes]


def table(seed: int) -> list[list[list[float]]]:
    chosen = random.Random(seed)
    heads = range(HEADS)
    return [
        [[0.0 if a == b else chosen.random() for b in heads] for a in heads] for _ in range(LAYERS)
    ]


STATIC = ClusterProfile(CLUSTERS, "static", representatives=REPRESENTATIVES)
WINDOW = {"recent": 9, "sinks": 3, "offsets": table(1)}
PROFILES = {
    "static": STATIC,
    "online": ClusterProfile(CLUSTERS, window=8),
    "blend": ClusterProfile(
        CLUSTERS, "blend", window=8, probe_start=2, features="value", blend=1.0, costs=table(2)
    ),
    "static window": ClusterProfile(CLUSTERS, "static", representatives=REPRESENTATIVES, **WINDOW),
    "online window": ClusterProfile(CLUSTERS, window=8, **WINDOW),
    # some heads stream beside clusters, all of a layer do, and none
    "streaming": ClusterProfile(
        (3, 8, 0),
        "static",
        representatives=[[0, 1, 0, 3, 4, 1, 3, 7], *[list(range(8))] * 2],
        streaming=[(4, 7), (), tuple(range(8))],
        recent=40,
        sinks=20,
        offsets=table(3),
    ),
    "online streaming": ClusterProfile(
        (2, 8, 4), window=8, streaming=[(0, 3, 4, 7), (), (1, 2)], **WINDOW
    ),
}
# for 8 heads of 4 K/V heads; heads 2 and 3 of the first layer stream, and 7 of another K/V head
GROUPED = {
    "static": ClusterProfile(
        (3, 8, 4), "static", streaming=[(2, 3, 7), (), ()], **WINDOW,
        representatives=[[0, 0, 2, 3, 4, 5, 4, 7], list(range(8)), [0, 1, 0, 1, 0, 1, 6, 7]],
    ),
    "online": ClusterProfile(
        (4, 8, 2), target="k-bytes", window=8, streaming=[(2, 3), (), (0, 1, 6, 7)], **WINDOW
    ),
}  # fmt: skip
