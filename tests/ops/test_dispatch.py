"""Which implementation runs, what is refused, and what the reference serves with a warning."""

import logging
import sys
import warnings

import pytest
import torch

from chai_attention.errors import AttentionInputError, ChaiError
from chai_attention.membership import Membership
from chai_attention.ops import (
    AttentionCall,
    DenseKV,
    attention,
    choice,
    cpu_attention,
    dispatch,
    reference,
    reference_backend,
)
from chai_attention.ops.blocked import blocked_attention
from chai_attention.ops.dense import torch_attention
from chai_attention.ops.fused import torch_clustered_attention
from chai_attention.ops.reference_backend import ReferenceBackend
from helpers import clustered_inputs, random_membership

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(heads=6, clusters=3, queries=1, size=9, dim=16, dtype=torch.float32, batch=2):
    member = random_membership(heads, clusters, batch).to(DEVICE)
    states = (torch.randn(batch, heads, n, dim, dtype=dtype) for n in (queries, size, size))
    return [*clustered_inputs(member, *(x.to(DEVICE) for x in states)), member]


@pytest.fixture
def forget(monkeypatch):
    """As in a fresh process: nothing imported by the dispatch, no warning given."""
    monkeypatch.setattr(reference_backend, "_warned", set())
    dispatch._cuda.cache_clear()
    yield
    dispatch._cuda.cache_clear()


def chosen(device, query, key, value, plain=False):
    heads = value.shape[1]
    member = Membership.identity(heads) if plain else random_membership(heads, 1)
    call = AttentionCall(member, scale=1.0)
    return dispatch.choose(torch.device(device), query, DenseKV(key, value), call)


@pytest.mark.parametrize(
    ("name", "plain", "runs"),
    [
        ("blocked", False, blocked_attention),
        ("blocked", True, blocked_attention),
        ("torch", False, torch_clustered_attention),
        ("torch", True, torch_attention),
    ],
)
@pytest.mark.parametrize("queries", [1, 40])
def test_the_cpu_has_two(name, plain, runs, queries):
    q, k, v, _ = inputs(queries=queries, size=40)
    member = Membership.identity(6) if plain else random_membership(6, 3)
    with cpu_attention(name):
        assert choice.fastest(q, DenseKV(k, v), AttentionCall(member, scale=1.0)) is runs
    assert chosen("cpu", q, k, v, plain=plain) is dispatch.CPU


def test_cuda_runs_kernels_and_torch_where_nothing_is_clustered(forget, monkeypatch):
    pytest.importorskip("triton")
    from chai_attention.ops.triton import backend

    monkeypatch.setattr(backend, "capability", lambda device: (8, 0))
    q, k, v, _ = inputs(queries=5)
    assert chosen("cuda", q, k, v) is backend.TRITON
    assert chosen("cuda", q, k, v, plain=True) is dispatch.TORCH
    q, k, v, _ = inputs(queries=1)
    assert chosen("cuda", q, k, v, plain=True) is backend.TRITON
    dispatch._cuda.cache_clear()
    monkeypatch.setattr(backend, "capability", lambda device: (9, 0))
    assert chosen("cuda", q, k, v) is backend.HOPPER


@pytest.mark.parametrize(
    ("device", "options", "reason"),
    [
        ("cuda", {"dim": 257}, "head size 257 is more than the 256"),
        ("cuda", {"dtype": torch.float64}, "no kernel for float64"),
        ("mps", {}, "no kernel for device 'mps'"),
    ],
)
def test_what_has_no_kernel_goes_to_the_reference(forget, monkeypatch, device, options, reason):
    if device == "cuda":
        pytest.importorskip("triton")
        from chai_attention.ops.triton import backend

        monkeypatch.setattr(backend, "capability", lambda device: (8, 0))
    q, k, v, _ = inputs(queries=5, **options)
    found = chosen(device, q, k, v)
    assert isinstance(found, ReferenceBackend)
    assert reason in found.missing


def test_cuda_without_triton_says_how_to_get_it(forget, monkeypatch):
    monkeypatch.setitem(sys.modules, "chai_attention.ops.triton.backend", None)
    q, k, v, _ = inputs()
    found = chosen("cuda", q, k, v)
    assert isinstance(found, ReferenceBackend)
    assert "pip install triton" in found.missing
    with pytest.raises(ImportError, match="pip install triton"):
        dispatch.backend_of(torch.device("cuda"))


def test_the_warning_names_the_cost_once(forget, monkeypatch):
    q, k, v, member = inputs(queries=4, size=9)
    monkeypatch.setattr(dispatch, "choose", lambda *a: ReferenceBackend("there is none"))
    lengths = torch.tensor([9, 7], device=DEVICE)
    v[1, :, 7:] = torch.nan  # capacity that is not in use
    with pytest.warns(UserWarning, match="because there is none.* 1.7e-06 GB for this call"):
        got, _ = attention(q, k, v, member, scale=0.2, lengths=lengths)
    assert got.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(q, k, v, member, scale=0.2)


def test_large_heads_on_a_gpu_are_right(forget):
    if DEVICE == "cpu":
        pytest.skip("needs a GPU: the CPU has no limit on head sizes")
    q, k, v, member = inputs(queries=5, dim=320)
    with pytest.warns(UserWarning, match="head size 320"):
        got, _ = attention(q, k, v, member, scale=0.1)
    want, _ = reference.clustered_attention(q.double(), k.double(), v.double(), member, scale=0.1)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)


def test_the_log_says_what_runs(caplog):
    q, k, v, member = inputs(queries=3)
    with caplog.at_level(logging.DEBUG, "chai_attention"):
        attention(q, k, v, member, scale=0.2)
    if DEVICE == "cpu":
        assert "on the CPU: blocked_attention" in caplog.text
    name = "cpu" if DEVICE == "cpu" else dispatch.backend_of(q.device).name
    assert f"attention by {name}: " in caplog.text
    assert "query (2, 3, 3, 16), key (2, 3, 9, 16)" in caplog.text


def strided(x):
    return x.mT.contiguous().mT


def test_strided_heads_are_refused_where_kernels_cannot_read_them(forget, monkeypatch):
    pytest.importorskip("triton")
    from chai_attention.ops.triton import backend

    monkeypatch.setattr(backend, "capability", lambda device: (8, 0))
    q, k, v, member = inputs(queries=3)
    with pytest.raises(AttentionInputError, match=r"of value are not consecutive.*contiguous"):
        chosen("cuda", q, k, strided(v))
    if DEVICE == "cpu":
        got, _ = attention(q, k, strided(v), member, scale=0.2)
        want, _ = reference.clustered_attention(q, k, v, member, scale=0.2)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, m: (q, k, v.half(), m), "one dtype.*not float32, float32, float16"),
        (lambda q, k, v, m: (q.int(), k.int(), v.int(), m), "one dtype.*not int32"),
        (lambda q, k, v, m: (q[0], k, v, m), "four dimensions"),
        (lambda q, k, v, m: (q[:, :2], k, v, m), r"query has shape \[2, 2, 1, 16\], needed is"),
        (lambda q, k, v, m: (q, k[:, :2], v, m), "key has shape"),
        (lambda q, k, v, m: (q, k[..., :8], v, m), "key has shape"),
        (lambda q, k, v, m: (q, k, v[:, :, :8], m), "value has shape"),
        (lambda q, k, v, m: (q, k, v[:, :3], m), "value has shape"),
        (lambda q, k, v, m: (q, k, v, m.select(torch.tensor([0]))), "representatives has shape"),
        (
            lambda q, k, v, m: (q, k, v, Membership(m.representatives.to("meta"), 3, 6, 3)),
            "representatives is on meta",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message):
    with pytest.raises(AttentionInputError, match=message):
        attention(*change(*inputs()), scale=0.2)


def test_lengths_and_valid_need_their_shapes():
    q, k, v, member = inputs()
    with pytest.raises(AttentionInputError, match="lengths has shape"):
        attention(q, k, v, member, scale=0.2, lengths=torch.ones(3, device=DEVICE))
    valid = torch.ones(2, 8, dtype=torch.bool, device=DEVICE)
    with pytest.raises(AttentionInputError, match="valid has shape"):
        attention(q, k, v, member, scale=0.2, valid=valid)


def test_the_error_is_ours_and_a_value_error():
    assert issubclass(AttentionInputError, ChaiError)
    assert issubclass(AttentionInputError, ValueError)
