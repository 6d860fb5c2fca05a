"""What a second pass of costs on the already reduced model brings, and what a refit does.

usage: python benchmarks/second_pass.py MODEL --text calibration.txt --test test.txt --out folder/

The folder is that of `streaming_quality.py`, whose evidence is used if it is there. The first pass
takes costs of the model as it is. The second one takes them with the first one's choice made:
gradients and activations are those of the reduced model, and every head is asked again what it
would cost to share or to stream. Each choice is measured on the test text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.calibration import costs, load_texts, windows_of
from chai_attention.calibration.costs import GRADIENT, Costs, ExactWindow, collect_costs
from chai_attention.calibration.perplexity import paired_rise, token_loss
from chai_attention.errors import ChaiError
from chai_attention.integrations.transformers import enabled
from chai_attention.integrations.transformers.intervene import (
    Callback,
    LayerCall,
    MaskedCall,
    replaced_attention,
)
from chai_attention.ops.reference import recent_attention
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.plan import LayerPlan, layer_plans
from streaming_quality import Bench, bench_parser

WINDOWS = 64  # of test text


class Passes:
    """Profiles for one budget and context, and what they cost."""

    def __init__(self, bench: Bench, context: int):
        self.bench, self.context = bench, context
        texts = load_texts(bench.options.test, tokens=400_000)
        self.test = windows_of(texts, bench.tokenizer, WINDOWS, context, bench.options.seed)
        self.plain = token_loss(bench.model, self.test, batch_size=8)
        self.rows: list[dict[str, Any]] = []

    def run(self, save: float) -> None:
        """Measure one pass, two passes, their mean, and refits."""
        asked = {"recipe": "default", "save": save, "context": self.context, "measure": False}
        first = self.bench.calibrated(**asked)
        self.measure(save, "one pass", lambda: first)
        self.measure(
            save, "one pass, no text to recall from",
            lambda: self.bench.calibrated(**asked, recall=0.0),
        )  # fmt: skip
        asked["recent"] = first.recent  # costs of the second pass are for this window
        self.measure(save, "one pass, refit", lambda: self.refit(asked))
        known = self.bench.store._costs
        key = (GRADIENT, first.recent, first.sinks)
        one, two = known[key], self.second(first)
        assert one.streaming is not None
        assert two.streaming is not None
        mean = Costs((one.sharing + two.sharing) / 2, (one.streaming + two.streaming) / 2)
        for name, found in (("second pass", two), ("mean of both", mean)):
            known[key] = found
            self.measure(save, name, lambda: self.bench.calibrated(**asked))
        self.measure(save, "mean of both, refit", lambda: self.refit(asked))
        known[key] = one

    def refit(self, asked: dict[str, Any]) -> ClusterProfile:
        """The same choice with output weights refit."""
        return self.bench.calibrated(**asked, refit="output")

    def second(self, profile: ClusterProfile) -> Costs:
        """Costs per head on the model that the profile makes."""
        window = (profile.recent, profile.sinks)
        offsets = self.bench.store._offsets.get(window)
        around = reduced(layer_plans(self.bench.shape, profile))
        with mock.patch.object(costs, "capture", around):
            (found,) = collect_costs(
                self.bench.model, self.bench.windows, GRADIENT,
                exact=[ExactWindow(*window, offsets)],
                batch_size=4,
            )  # fmt: skip
        return found

    def measure(self, save: float, name: str, make: Callable[[], ClusterProfile]) -> None:
        """Add a row and write all."""
        try:
            profile = make()
        except ChaiError as error:
            self.bench.say(f"{name} at {save:.0%}: {error}")
            return
        with enabled(self.bench.model, profile):
            found = paired_rise(
                self.plain, token_loss(self.bench.model, self.test, batch_size=8)
            )  # fmt: skip
        self.rows.append(
            {
                "asked": save,
                "what": name,
                "recent": profile.recent,
                "saved": profile.saved(self.bench.shape, self.context),
                "rise": found.rise,
                "standard error": found.standard_error,
            }
        )
        self.bench.say(json.dumps(self.rows[-1]))
        file = self.bench.out / f"second-{self.context}.json"
        self.bench.write(file, {"about": self.bench.about(), "rows": self.rows})


def reduced(plans: tuple[LayerPlan, ...]) -> Callable[..., Any]:
    """`capture` of a model whose attention is clustered by the definition, with gradients."""

    @contextmanager
    def capture(model: PreTrainedModel, callback: Callback) -> Iterator[None]:
        def attend(call: MaskedCall) -> Tensor:
            plan = plans[call.layer]
            out = call.plain() if plan.is_identity else _clustered(plan, call)
            q, k, v = (x.detach() for x in (call.query, call.key, call.value))
            callback(LayerCall(call.layer, q, k, v, call.scale, call.softcap), out)
            return out

        with replaced_attention(model, attend):
            yield

    return capture


def _clustered(plan: LayerPlan, call: MaskedCall) -> Tensor:
    member = plan.fixed_membership(call.query.shape[0], call.query.device)
    return recent_attention(
        call.query, call.key, call.value, member, recent=plan.recent, sinks=plan.sinks,
        scale=call.scale, offsets=plan.offset_table(call.query.device), softcap=call.softcap,
    )  # fmt: skip


def main() -> None:
    """Measure all budgets."""
    parser = bench_parser(__doc__)
    # contexts decide which windows there are costs for; these are the ones of the frontiers
    parser.set_defaults(contexts=[256, 1024, 2048])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--budgets", default="30,37")
    options = parser.parse_args()
    passes = Passes(Bench(options), options.context)
    for budget in options.budgets.split(","):
        passes.run(float(budget) / 100)


if __name__ == "__main__":
    main()
