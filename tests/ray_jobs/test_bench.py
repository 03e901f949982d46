"""`gsa bench`: what cannot be measured is refused before anything is, and what was measured is shown."""

import dataclasses
import json
import math
from typing import Any

import pytest
from rich.console import Console

from gsa.errors import RequestError
from kernels.bench import BenchConfig
from kernels.support import problem
from ray_jobs.bench import BenchReport, run_bench, show


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("lengths", (63,), "--length 63 must be from 64"),
        ("lengths", (2**21,), "--length 2097152 must be"),
        ("heads", 0, "--heads 0 must be"),
        ("kv_heads", 5, "--heads 32 is no multiple of --kv-heads 5"),
        ("kv_heads", 64, "--kv-heads 64 must be from 1 to 32"),
        ("head_dim", 96, "--head-dim 96 is none of 16, 32, 64, 128"),
        ("k", 0, "--k 0 must be"),
        ("overlaps", (0.5,), "--overlap 0.5 must be"),
        ("overlaps", (math.nan,), "--overlap nan must be"),
        ("batches", (8, -1), "--batch -1 must be"),
        ("operations", ("forward", "foward"), "--operation foward is none of forward, training, warmup, decode"),
    ],
)
def test_an_option_out_of_bounds_is_refused_by_name(setting: str, value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run_bench(dataclasses.replace(BenchConfig(), **{setting: value}))


@pytest.mark.skipif(problem() is None, reason="there is a GPU")
def test_a_machine_without_a_gpu_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="gsa bench needs a GPU: "):
        run_bench(BenchConfig())


def test_a_table_and_json_show_every_row() -> None:
    forward = {"operation": "forward", "T": 4096, "heads": "32/8x128", "k": 2048, "indexer": "1x128", "speedup": 2.0}
    forward |= {"u32": 2.5, "ours_ms": 1.0, "select_ms": 0.4, "attend_ms": 0.6, "peak_gib": 0.1}
    decode = {"operation": "decode", "T": 8192, "heads": "32/8x128", "k": 2048, "indexer": "4x64", "speedup": 9.5}
    rows = [
        forward | {"dense_ms": {"cudnn": 2.0, "flash": 3.0}},
        decode | {"ours_ms": 0.1, "dense_ms": {"flash": 0.95}},
    ]
    report = BenchReport("GPU", "2.11", "3.6", "2026-01-01", rows)
    assert json.loads(report.to_json())["rows"] == rows
    console = Console(record=True, width=200)
    show(report, console)
    text = console.export_text()
    assert all(word in text for word in ("cudnn", "flash", "2.00x", "9.50x", "8192", "1x128"))
