"""What is printed can be read on a terminal of any width: nothing is cut, and a row stays a row."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from gsa.evaluation.layers import SHARES
from gsa.evaluation.report import CheckpointReport
from gsa.evaluation.retrieval import Retrieval
from ray_jobs import bench, checkpoint_tables, leaderboard, proposal
from ray_jobs.bench import BenchReport
from ray_jobs.report import Report, read_report, value_text
from tests.draw import Draw
from tests.ray_jobs.fake_sweep import BITS, STATES, aims, fake_sweep
from tests.seeds import seed_of

WIDTHS = (60, 80, 120, 200)


def printed(show: Any, found: Any, width: int) -> list[str]:
    output = io.StringIO()
    show(found, Console(file=output, width=width))
    lines = output.getvalue().splitlines()
    assert "…" not in output.getvalue()
    assert max(map(len, lines)) <= width
    return lines


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    draw = Draw(seed_of("terminal"))
    objectives = aims(BITS, "held_out_selected_fraction", "tokens_per_second")
    tracking = fake_sweep(tmp_path_factory.mktemp("sweep"), draw, [*STATES, *STATES], objectives, confirm=2)
    return read_report(tracking, "fake")


@pytest.mark.parametrize("width", WIDTHS)
def test_a_leaderboard_keeps_every_value_on_its_trials_line(report: Report, width: int) -> None:
    lines = printed(leaderboard.show, report, width)
    for trial in report.trials:
        own = [line.split() for line in lines if trial["trial_id"] in line.split()[:2]]
        words = [word for line in own for word in line]
        for objective in report.objectives:
            if objective["metric"] in trial["metrics"]:
                assert f"{trial['metrics'][objective['metric']]:.4f}" in words
        for value in trial["params"].values():
            assert value_text(value) in words
    tables = [line for line in lines if re.match(r"[*! ]*\d{5}-[0-9a-f]{8}  ", line)]
    each = len(tables) / len(report.trials)
    assert each <= (2 if width == 200 else 12)


def rows() -> list[dict[str, Any]]:
    common = {"heads": "32/8x128", "k": 2048}
    forward = common | {"operation": "forward", "T": 131072, "indexer": "1x128", "speedup": 2.0, "u32": 2.5}
    forward |= {"ours_ms": 1.0, "select_ms": 0.4, "attend_ms": 0.6, "peak_gib": 0.1}
    decode = common | {"operation": "decode", "T": 8192, "batch": 8, "indexer": "4x64", "speedup": 9.5, "ours_ms": 0.1}
    return [
        forward | {"dense_ms": {"cudnn": 123.0, "flash": 3.0, "efficient": 4.0}},
        decode | {"dense_ms": {"flash": 0.95}},
    ]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_benchmark_keeps_every_column(width: int) -> None:
    lines = printed(bench.show, BenchReport("NVIDIA H200", "2.11.0", "3.6.0", "2026-01-01", rows()), width)
    text = "\n".join(lines)
    assert all(word in text for word in ("cudnn", "flash", "efficient", "selection", "attention", "operation", "GiB"))
    forward = [word for line in lines if line.strip().startswith("forward ") for word in line.split()]
    assert {"131072", "1x128", "2.5", "1", "0.4", "0.6", "123", "3", "4", "2.00x", "0.1"} <= set(forward)
    assert "heads: 32/8x128" in text  # the same in every row


@pytest.mark.parametrize("width", WIDTHS)
def test_a_checkpoints_tables_keep_every_column(draw: Draw, width: int) -> None:
    names = ["loss", "mass_kept", "selected_fraction", "first_token_mass", "gate_g1_mean", "k_mean", "indexer_kl"]
    layers = [{name: draw.random.random() for name in names} for _ in range(4)]
    losses = {"held_out_loss": 1.5, "held_out_bits_per_byte": 2.1}
    found = CheckpointReport(12, losses, layers, [Retrieval(0.5, 1.0, 0.1, 4.0)], "")
    lines = printed(checkpoint_tables.show, found, width)
    for i, row in enumerate(layers):
        words = [word for line in lines if line.split()[:1] == [str(i)] for word in line.split()]
        assert {f"{value:.4f}" for value in row.values()} <= set(words)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_proposal_keeps_every_column(width: int) -> None:
    row = {
        "u32": 2.5,
        "mass_kept": 0.9123,
        "k_99": 12345,
        "first_token_mass": 0.01,
        "k_mean": 1,
        "selected_fraction": 1,
    }
    row |= {f"share_{share}_lost": 0.0123 for share in SHARES}
    found = proposal.Proposal({"model.layers[0].k": {"type": "int", "low": 1, "high": 2}}, {}, [row], ["k from 1 to 2"])
    lines = printed(proposal.show, found, width)
    words = [word for line in lines if line.split()[:1] == ["0"] for word in line.split()]
    assert {"1.23", "2.50", "91.23", "12345", "1.00"} <= set(words)
    assert "layer 0: k from 1 to 2" in lines
