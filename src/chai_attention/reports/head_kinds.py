"""The three kinds of heads in a profile (keep, share, forget), named alike in all reports."""

from __future__ import annotations

from chai_attention.profile import ClusterProfile

KEEP, SHARE, FORGET = "keep", "share", "forget"
KINDS = (KEEP, SHARE, FORGET)
MEANING = {
    KEEP: "its own scores for all keys",
    SHARE: "another head's scores for far keys",
    FORGET: "local keys only (streaming)",
}


def head_kinds(profile: ClusterProfile) -> list[list[str]] | None:
    """Return "keep", "share" or "forget" for every layer and head.

    None where each request decides which heads keep and which share.
    """
    if profile.representatives is None:
        return None
    return [
        [
            FORGET if head in profile.streaming_heads(layer) else KEEP if rep == head else SHARE
            for head, rep in enumerate(row)
        ]
        for layer, row in enumerate(profile.representatives)
    ]


def kind_numbers(profile: ClusterProfile, heads: int) -> list[dict[str, int]]:
    """How many heads of each layer keep, share and forget, of any profile.

    Args:
        profile: online ones too, whose numbers do not depend on the request.
        heads: H of the model.
    """
    found = []
    for layer, clusters in enumerate(profile.clusters):
        forget = len(profile.streaming_heads(layer))
        found.append({KEEP: clusters, SHARE: heads - clusters - forget, FORGET: forget})
    return found
