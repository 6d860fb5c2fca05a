"""Benchmark reports as tables and plots."""

import pytest

from chai_attention.cli.tables import render
from chai_attention.errors import ChaiError
from chai_attention.reports.bench import (
    attention_plot,
    attention_tables,
    duration,
    model_plot,
    model_tables,
    size,
)

MACHINE = {"device": "cuda", "gpu": "Some GPU"}
CEILINGS = {"bfloat16": {"read_gb_s": 3000.0, "matmul_tflop_s": 800.0}}
DRIFT = {"bfloat16": 1.0}
CASE = {"kind": "decode", "batch": 16, "tokens": 8192, "dtype": "bfloat16"}
TIMES = {"us": 400.0, "iqr_us": 8.0, "repeats": 20}
ROW = {
    **CASE, **TIMES, "clusters": 4, "kept_keys": 4, "bytes": 1.2e9, "flops": 1e9,
    "ideal_us": 390.0, "of_ideal": 0.975, "baseline": "SDPA cuDNN", "baseline_us": 700.0,
    "speedup": 1.75, "ideal_speedup": 1.78, "error": 0.0, "allowed_error": 0.1,
}  # fmt: skip


def attention_report(*others, row=ROW):
    return {
        "machine": MACHINE, "ceilings": CEILINGS, "drift": DRIFT, "layout": "dense",
        "results": [row],
        "shape": {"name": "x", "heads": 32, "kv_heads": 32, "head_dim": 128},
        "baselines": [
            {**CASE, **TIMES, "us": 700.0, "baseline": "SDPA cuDNN", "fused": True},
            {**CASE, "baseline": "FlashInfer", "fused": True, "missing": "not installed"},
            *others,
        ],
    }  # fmt: skip


def model_row(run, **other):
    row = {"batch": 1, "tokens": 2048, "run": run, "kv_bytes": 10**9, "peak_bytes": None}
    for name in ("ttft", "tpot"):
        row |= {f"{name}_us": 2e4, f"ideal_{name}_us": 1e4}
        for base in ("unfused", "fused"):
            row |= {f"{name}_vs_{base}": None, f"ideal_{name}_vs_{base}": None}
    return {**row, **other}


def model_report(*rows):
    model = {"name": "x", "layers": 2, "heads": 32, "head_dim": 128}
    return {
        "machine": MACHINE, "ceilings": CEILINGS, "drift": DRIFT, "dtype": "bfloat16",
        "profile": "p", "model": model, "steps": "steps", "results": list(rows),
    }  # fmt: skip


def text_of(tables):
    return " ".join(" ".join(render(table, width=140) for table in tables).split())


def test_attention_table():
    text = text_of(attention_tables(attention_report()))
    assert "decode 16 x 8,192 bfloat16 4 400 us ±2% 3,000 GB/s 390 us 98%" in text
    assert "SDPA cuDNN 700 us 1.75x 1.78x" in text
    assert "FlashInfer not installed" in text
    assert "3,000 GB/s, 800,000 GFLOP/s in bfloat16" in text
    assert "not fused was faster" not in text


def test_faster_attention_that_is_not_fused_is_said():
    unfused = {**CASE, **TIMES, "us": 500.0, "baseline": "unfused", "fused": False}
    text = text_of(attention_tables(attention_report(unfused)))
    assert "was faster in decode 16 x 8,192 bfloat16 (unfused, 500 us)" in text


def test_an_unsteady_machine_is_said():
    for report, tables in (
        (attention_report(), attention_tables), (model_report(model_row("CHAI")), model_tables)
    ):  # fmt: skip
        assert "DO NOT TRUST" not in text_of(tables(report))
        report["drift"] = {"bfloat16": 1.05, "float32": 2.5}
        assert "the machine was 2.5 times faster at one end" in text_of(tables(report))


def test_without_a_baseline_there_is_no_ratio(tmp_path):
    row = {**ROW, "baseline": None, "baseline_us": None, "speedup": None}
    report = attention_report(row=row)
    assert "390 us 98% - - - 1.78x" in text_of(attention_tables(report))
    with pytest.raises(ChaiError, match="no speed-up to plot"):
        attention_plot(report, tmp_path / "a.png")


def test_model_table():
    chai = model_row("CHAI", ttft_vs_fused=1.04, ideal_ttft_vs_fused=1.1, peak_bytes=2 * 10**9)
    rows = (model_row("fused"), chai, {**model_row("unfused"), "missing": "out of memory"})
    text = text_of(model_tables(model_report(*rows)))
    assert "1 x 2,048 CHAI 20 ms 10 ms - 1.04x (1.10x) 20 ms 10 ms - - 1.00 GB 2.00 GB" in text
    assert "unfused out of memory" in text


def test_plots(tmp_path):
    for draw, report in (
        (attention_plot, attention_report()),
        (model_plot, model_report(model_row("fused"), model_row("CHAI"))),
    ):
        path = draw(report, tmp_path / "new" / "plot.png")
        assert path.read_bytes().startswith(b"\x89PNG")
    gone = model_report({**model_row("CHAI"), "missing": "out of memory"})
    with pytest.raises(ChaiError, match="nothing to plot"):
        model_plot(gone, tmp_path / "b.png")
    with pytest.raises(ChaiError, match="cannot write"):
        model_plot(model_report(model_row("CHAI")), tmp_path)


@pytest.mark.parametrize(
    ("us", "text"),
    [(None, "-"), (4.567, "4.57 us"), (456.7, "457 us"), (1234.5, "1.23 ms"), (2e6, "2 s")],
)
def test_durations(us, text):
    assert duration(us) == text


def test_sizes():
    assert [size(n) for n in (5, 2 * 10**6, 3 * 10**9)] == ["5 B", "2.00 MB", "3.00 GB"]
