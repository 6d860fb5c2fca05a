"""What ranks save of K and V, beside what the profile would save on one GPU."""

from __future__ import annotations

from dataclasses import dataclass

from chai_attention.integrations.vllm.layers import ServedLayer, served_layers
from chai_attention.profile import ClusterProfile
from chai_attention.ranks import copies
from chai_attention.runtime.shape import ModelShape

NOTICED = 0.0005  # share of a saving that is worth a word


@dataclass(frozen=True)
class Savings:
    """K,V heads per token, summed over layers.

    Attributes:
        ranks: of tensor parallelism.
        made_for: ranks that the profile was made for.
        full: heads that a rank would hold without clusters, K and V.
        kept: those that its far pages hold.
        one_rank: those that one rank with all heads would hold.
        copies: ranks that hold the same K/V head.
    """

    ranks: int
    made_for: int
    full: int
    kept: int
    one_rank: int
    copies: int

    @property
    def share(self) -> float:
        """Share of a rank's K,V bytes per token that is saved."""
        return 1 - self.kept / max(1, self.full)

    @property
    def share_on_one(self) -> float:
        """The same of one rank that holds all heads."""
        return 1 - self.one_rank * self.copies / max(1, self.full * self.ranks)

    @property
    def lost(self) -> float:
        """Share of what the profile saves on one GPU that ranks keep nevertheless."""
        saved = self.share_on_one
        return 1 - self.share / saved if saved > 0 else 0.0

    @property
    def line(self) -> str:
        """What is saved, and why it is less than on one GPU."""
        if self.ranks == 1:
            return f"{self.share:.1%} of the K,V bytes per token saved"
        line = f"{self.share:.1%} of the K,V bytes per token saved on each of {self.ranks} ranks"
        if self.lost > NOTICED:
            return (
                f"{line}, {self.share_on_one:.1%} on one GPU: pages of one size keep "
                f"{self.lost:.1%} of the saving; chai calibrate --tensor-parallel {self.ranks} "
                "chooses heads so that they keep nothing"
            )
        made = f" (the profile is made for {self.made_for})" if self.made_for > 1 else ""
        return f"{line}, as on one GPU{made}"


def savings(
    shape: ModelShape,
    profile: ClusterProfile,
    ranks: int,
    layers: tuple[ServedLayer, ...] | None = None,
) -> Savings:
    """Return what each of ``ranks`` saves.

    Args:
        shape: of the model.
        profile: for it.
        ranks: of tensor parallelism.
        layers: of one of them, where they are known.

    Raises:
        ProfileError: the profile does not fit the model, or the heads do not fit the ranks.
    """
    here = served_layers(shape, profile, ranks) if layers is None else layers
    return Savings(
        ranks,
        profile.tensor_parallel,
        sum(2 * layer.plan.kv_heads for layer in here),
        _held(here),
        _held(served_layers(shape, profile)),
        copies(shape.kv_heads, ranks),
    )


def _held(layers: tuple[ServedLayer, ...]) -> int:
    return sum(layer.kept + layer.kept_values for layer in layers)
