"""Bytes of two ways to keep local K and V of the exact window in vLLM's pages.

*In the page*: every page has w + s more places for K and V of heads that it does not keep; w of
them are a ring, not longer than the page. *Local pages*: a request has as many other pages as its
window needs, from the same blocks (`estimate.Blocks`).

    python benchmarks/local_store.py
"""

from __future__ import annotations

from chai_attention.integrations.vllm.estimate import Blocks
from chai_attention.integrations.vllm.layers import local_page

SINKS = 4
LENGTHS = (300, 2048, 8192, 32768)
WINDOWS = (32, 128, 256)
PAGES = (64, 128, 256, 512)
# heads whose K, or V, is kept for all tokens, and only in the window; of 32 K and 32 V heads
RECIPES = {"k=8": (40, 24), "default": (28, 36)}


def in_the_page(page: int, far: int, local: int, recent: int, length: int) -> float:
    """Numbers per token, of a head's size."""
    each = page * far + (recent + SINKS) * local
    return -(-length // page) * each / length


def local_pages(page: int, far: int, local: int, recent: int, length: int) -> float:
    """The same with local pages."""
    tokens = local_page(page, far, local, recent)
    blocks = Blocks(page, tokens, page * far, tokens * local, recent, SINKS)
    return blocks.of_request(length) * blocks.block_bytes / length


def main() -> None:
    """Print the share of a full cache's bytes that either way takes."""
    for name, (far, local) in RECIPES.items():
        full = far + local
        print(f"| {name}, w | way | {' | '.join(f'{n:,} tokens' for n in LENGTHS)} |")
        print("|---|---|" + "---|" * len(LENGTHS))
        for recent in WINDOWS:
            for page in PAGES:
                if recent > page:
                    continue
                shares = (in_the_page(page, far, local, recent, n) / full for n in LENGTHS)
                cells = " | ".join(f"{share:.1%}" for share in shares)
                print(f"| {recent} | in pages of {page} | {cells} |")
            for page in PAGES[:2]:
                shares = (local_pages(page, far, local, recent, n) / full for n in LENGTHS)
                cells = " | ".join(f"{share:.1%}" for share in shares)
                tokens = local_page(page, far, local, recent)
                print(f"| {recent} | local pages of {tokens} beside {page} | {cells} |")
        print(f"| any | nothing for the window | {' | '.join([f'{far / full:.1%}'] * 4)} |")
        print()


if __name__ == "__main__":
    main()
