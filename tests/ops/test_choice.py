"""What attends on the CPU: measured once for each kind of call, unless somebody says."""

from dataclasses import dataclass, field

import pytest
import torch

from chai_attention.errors import AttentionInputError
from chai_attention.ops import choice, cpu_attention
from chai_attention.ops.blocked import blocked_attention
from chai_attention.ops.dense import torch_attention
from chai_attention.ops.fused import torch_clustered_attention

KIND = choice.Kind(True, True, torch.float32, 16, long=False, threads=1)
KINDS = [
    choice.Kind(decode, clustered, torch.bfloat16, 16, long=long, threads=1)
    for decode in (True, False)
    for clustered in (True, False)
    for long in (True, False)
]


@dataclass
class Clock:
    """A clock that only calls move."""

    now: float = 0.0
    ran: list[str] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def call(self, name, seconds):
        times = iter(seconds)

        def run():
            self.ran.append(name)
            self.now += next(times)

        return run


def faster(blocked_seconds, torch_seconds):
    clock = Clock()
    calls = {
        choice.BLOCKED: clock.call("blocked", blocked_seconds),
        choice.TORCH: clock.call("torch", torch_seconds),
    }
    return choice.faster(calls, clock), clock.ran


@pytest.fixture
def fresh(monkeypatch):
    """Nothing measured yet, nothing said; the kinds that were measured."""
    asked = []

    def measured(kind):
        asked.append(kind)
        return choice.TORCH

    monkeypatch.setattr(choice, "_found", {})
    monkeypatch.setattr(choice, "measured", measured)
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    return asked


def test_the_shortest_of_some_trials_counts_and_the_first_does_not():
    name, ran = faster([9, 5, 5, 5], [1, 9, 4, 9])
    assert name == choice.TORCH
    assert ran == ["blocked", "torch"] * (1 + choice.TRIALS)
    assert faster([9, 5, 5, 5], [1, 9, 6, 9])[0] == choice.BLOCKED


def test_a_small_lead_is_noise():
    assert faster([1, 1, 1, 1], [1, 0.95, 0.95, 0.95])[0] == choice.BLOCKED


def test_a_kind_of_call_is_measured_once(fresh):
    assert [choice.chosen(KIND) for _ in range(3)] == [choice.TORCH] * 3
    choice.chosen(KIND._replace(long=True))
    assert fresh == [KIND, KIND._replace(long=True)]


def test_what_is_said_is_not_measured(fresh, monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "blocked")
    assert choice.chosen(KIND) == choice.BLOCKED
    with cpu_attention("torch"):
        assert choice.chosen(KIND) == choice.TORCH
        with cpu_attention("blocked"):
            assert choice.chosen(KIND) == choice.BLOCKED
    assert fresh == []
    with cpu_attention("auto"):
        choice.chosen(KIND)
    assert fresh == [KIND]


def test_other_names_are_refused(fresh, monkeypatch):
    with pytest.raises(AttentionInputError, match="takes auto, blocked or torch, not 'sdpa'"):
        cpu_attention("sdpa").__enter__()
    monkeypatch.setenv(choice.VARIABLE, "fast")
    with pytest.raises(AttentionInputError, match=r"CHAI_CPU_ATTENTION is auto, .* not 'fast'"):
        choice.chosen(KIND)


def test_nothing_is_measured_while_a_graph_is_traced(fresh, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choice.chosen(KIND) == choice.BLOCKED
    assert fresh == []


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_both_candidates_attend_to_the_same(kind, monkeypatch):
    """And neither draws random numbers, nor leaves a trace in the caller's modes."""
    seen = []

    def spying(attend):
        def spy(*args):
            out = attend(*args)
            seen.append((attend, out[0]))
            return out

        return spy

    run = {name: spying(attend) for name, attend in choice.RUN[kind.clustered].items()}
    monkeypatch.setitem(choice.RUN, kind.clustered, run)
    state = torch.get_rng_state()
    calls = choice.candidates(kind)
    for call in calls.values():
        call()
    assert torch.equal(torch.get_rng_state(), state)
    ran = [attend for attend, _ in seen]
    assert ran[0] is blocked_attention
    assert (torch_clustered_attention if kind.clustered else torch_attention) in ran
    for _, out in seen[1:]:
        torch.testing.assert_close(out.clone(), seen[0][1].clone())


def test_a_kind_is_few_or_many_queries_and_keys():
    few = choice.kind_of(torch.zeros(1, 2, 8, 4), 1024, clustered=True)
    assert (few.decode, few.long, few.head_dim, few.clustered) == (True, False, 4, True)
    many = choice.kind_of(torch.zeros(1, 2, 9, 4), 1025, clustered=False)
    assert (many.decode, many.long, many.clustered) == (False, True, False)


def test_results_that_must_not_depend_on_time_take_what_is_usual(monkeypatch):
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.setattr(choice, "_found", {})
    monkeypatch.setattr(choice, "measured", lambda kind: pytest.fail("measured"))

    @choice.reproducible()
    def asked(kind):
        return choice.chosen(kind)

    assert [asked(kind) for kind in KINDS] == [choice.usual(kind) for kind in KINDS]
    with cpu_attention("torch"):  # what somebody says counts
        assert {asked(kind) for kind in KINDS} == {"torch"}
    monkeypatch.setenv(choice.VARIABLE, "blocked")
    assert {asked(kind) for kind in KINDS} == {"blocked"}
    monkeypatch.setattr(choice, "measured", lambda kind: "torch")
    monkeypatch.delenv(choice.VARIABLE)
    assert choice.chosen(KIND) == "torch"  # and outside nothing has changed
