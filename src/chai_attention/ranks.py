"""How tensor parallelism divides the heads of a layer among ranks, as in vLLM.

Every rank holds H / N neighbouring query heads and the G / N K/V heads that they read. With fewer
K/V heads than ranks every rank holds one, and several ranks hold the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def rank_problem(heads: int, kv_heads: int, ranks: int) -> str | None:
    """Why a layer's heads cannot be dealt to so many ranks; None if they can."""
    able = [n for n in range(1, heads + 1) if not heads % n and not (kv_heads % n and n % kv_heads)]
    if ranks in able:
        return None
    of = f"{heads} heads" if heads == kv_heads else f"{heads} heads of {kv_heads} K/V heads"
    return f"{of} cannot be dealt to {ranks} ranks: choose {', '.join(map(str, able))}"


def distinct_ranks(kv_heads: int, ranks: int) -> int:
    """Ranks that hold other K/V heads than each other."""
    return min(kv_heads, ranks)


def copies(kv_heads: int, ranks: int) -> int:
    """Ranks that hold the same K/V head."""
    return ranks // distinct_ranks(kv_heads, ranks)


def spare(
    representatives: Sequence[int], streaming: Sequence[int], kv_heads: int, ranks: int
) -> Iterator[str]:
    """Say why ranks could not give back all that a layer's membership saves.

    Args:
        representatives: ``[H]``; a streaming head's entry is itself.
        streaming: heads that see local keys only.
        kv_heads: G.
        ranks: to which the heads can be dealt.
    """
    heads = len(representatives)
    own, group, local = heads // ranks, heads // kv_heads, set(streaming)
    held = []
    for rank in range(ranks):
        far = [h for h in range(rank * own, (rank + 1) * own) if h not in local]
        for head in far:
            chosen = representatives[head]
            if chosen // own != rank:
                yield f"head {head} uses the scores of head {chosen} on another rank"
                return
        keys, values = (
            {h // group for h in used} for used in ([representatives[h] for h in far], far)
        )
        held.append((len(keys), len(values)))
    for what, counts in zip(("K", "V"), zip(*held, strict=True), strict=True):
        if len(set(counts)) > 1:
            yield f"ranks keep {', '.join(map(str, counts))} {what} heads"
