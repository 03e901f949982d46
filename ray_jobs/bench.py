"""`gsa bench`: the kernels' benchmark, checked before it starts and shown when it has ended."""

import dataclasses
import datetime
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import triton
from rich.console import Console

from gsa.attention.fused import HEAD_SIZES
from gsa.data.packing import prepare
from gsa.errors import RequestError
from gsa.evaluation.speed import layer_rows
from gsa.store import TrackingConfig
from gsa.training import checkpoint
from kernels.bench import OPERATIONS, BenchConfig, Row, rows
from kernels.support import problem
from ray_jobs.tables import Column, show_columns

LONGEST, WIDEST, MOST = 2**20, 1024, 512  # tokens, heads, sequences


@dataclasses.dataclass
class BenchReport:
    gpu: str
    torch: str
    triton: str
    date: str
    rows: list[Row]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


def check(config: BenchConfig) -> None:
    """Refuse what cannot be measured.

    Raises:
        RequestError: an option out of bounds.
    """
    for name, values, low, high in (
        ("length", config.lengths, 64, LONGEST),
        ("heads", (config.heads,), 1, WIDEST),
        ("kv-heads", (config.kv_heads,), 1, config.heads),
        ("k", (config.k,), 1, LONGEST),
        ("overlap", config.overlaps, 1, 32),
        ("batch", config.batches, 1, MOST),
    ):
        for value in values:
            if not low <= value <= high:
                raise RequestError(f"gsa bench: --{name} {value} must be from {low} to {high}")
    if config.heads % config.kv_heads:
        raise RequestError(f"gsa bench: --heads {config.heads} is no multiple of --kv-heads {config.kv_heads}")
    if config.head_dim not in HEAD_SIZES:
        raise RequestError(f"gsa bench: --head-dim {config.head_dim} is none of {', '.join(map(str, HEAD_SIZES))}")
    for name in config.operations:
        if name not in OPERATIONS:
            raise RequestError(f"gsa bench: --operation {name} is none of {', '.join(OPERATIONS)}")


def run_bench(
    config: BenchConfig, console: Console | None = None, measured: Callable[[], Iterable[Row]] | None = None
) -> BenchReport:
    """Measure what `config` says, or what `measured` gives; with a console, say what has been measured as it is.

    Raises:
        RequestError: an option out of bounds, or no GPU to measure on.
    """
    check(config)
    reason = problem()
    if reason is not None:
        raise RequestError(f"gsa bench needs a GPU: {reason}")
    found = []
    for row in rows(config) if measured is None else measured():
        found.append(row)
        if console is not None:
            console.print(
                f"{row['operation']}, {row['T']} tokens, {row['indexer']}: {row['speedup']:.2f}x", markup=False
            )
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return BenchReport(torch.cuda.get_device_name(), torch.__version__, triton.__version__, date, found)


def checkpoint_rows(source: str, length: int | None, tracking: TrackingConfig, storage: Path) -> Iterator[Row]:
    """`layer_rows` of a checkpoint on its own held-out text.

    Args:
        source: a folder, `runs:/<run_id>` or a run id.
        length: tokens of text; `None` for the context length it was trained with.
        tracking, storage: where runs are found, and where tokenized text is cached.

    Raises:
        RequestError: there is no such checkpoint, its held-out text is too short, or the kernels cannot run a layer.
    """
    source = checkpoint.named(source)
    found = checkpoint.find(source, tracking, storage)
    config = found.config()
    windows = prepare(config.data, storage / "data").held_out
    wanted = length or config.data.context_length
    count = -(-wanted // config.data.context_length)
    if count > len(windows):
        most = len(windows) * config.data.context_length
        raise RequestError(f"{source}: its held-out text has {most} tokens, fewer than the {wanted} asked for")
    tokens = windows.batch(range(count)).tokens.reshape(1, -1)[:, :wanted]
    yield from layer_rows(checkpoint.load(found).cuda().eval(), tokens.cuda())


def show(report: BenchReport, console: Console) -> None:
    """Print a table; what is the same in every row stands above it."""
    console.print(
        f"{report.gpu}, torch {report.torch}, Triton {report.triton}, {report.date}; milliseconds", markup=False
    )
    rows = report.rows
    key = [
        Column("operation", [row["operation"] for row in rows]),
        Column("T", [str(row["T"]) for row in rows], right=True),
        Column("batch", [str(row.get("batch", 1)) for row in rows], right=True),
        Column("heads", [row["heads"] for row in rows]),
        Column("indexer", [row["indexer"] for row in rows]),
        Column("u(32)", [_text(row.get("u32")) for row in rows], right=True),
    ]
    for column in list(key[2:]):
        if len(set(column.values)) == 1:
            key.remove(column)
            if column.values[0]:
                console.print(f"{column.header}: {column.values[0]}", markup=False, highlight=False)
    measured = [
        Column("ours", [_text(row["ours_ms"]) for row in rows], right=True),
        *(Column(name, [_text(row["dense_ms"].get(name)) for row in rows], right=True) for name in _backends(report)),
        Column("against\nthe best", [f"{row['speedup']:.2f}x" for row in rows], right=True),
        Column("selection", [_text(row.get("select_ms")) for row in rows], right=True),
        Column("attention", [_text(row.get("attend_ms")) for row in rows], right=True),
        Column("peak,\nGiB", [_text(row.get("peak_gib")) for row in rows], right=True),
    ]
    show_columns(console, "", key, [column for column in measured if any(column.values)])


def _backends(report: BenchReport) -> list[str]:
    return list(dict.fromkeys(name for row in report.rows for name in row["dense_ms"]))


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
