"""A run's rows on disk: in order, once, whole, whatever ended who wrote them."""

from pathlib import Path

import pytest

from gsa import spool
from gsa.errors import RunError
from gsa.spool import Spool
from tests.draw import Draw


def test_rows_come_back_in_order_and_a_repeated_step_is_dropped(draw: Draw, tmp_path: Path) -> None:
    first = Spool(tmp_path)
    expected = []
    for step in range(0, 50, 5):
        metrics = {"loss": draw.random.random(), "k": float("nan")}
        first.append(step, metrics)
        expected.append((step, metrics["loss"]))
        first.sample({"cpu": 1.0})
    again = Spool(tmp_path)  # goes on from a checkpoint of step 25
    for step in range(25, 80, 5):
        value = draw.random.random()
        again.append(step, {"loss": value})
        if step >= 50:
            expected.append((step, value))
    again.sample({"cpu": 2.0})
    rows = list(spool.rows(tmp_path))
    assert [(r.step, r.metrics["loss"]) for r in rows if not spool.of_system(r)] == expected
    assert [r.step for r in rows if spool.of_system(r)] == list(range(11))
    assert [r.sequence for r in rows] == list(range(len(rows)))
    assert all(set(r.metrics) == {"system/cpu"} for r in rows if spool.of_system(r))


def test_a_cut_off_line_is_neither_read_nor_kept(draw: Draw, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = Spool(tmp_path)
    for step in range(30):
        whole.append(step, {"loss": draw.random.random()})
    content = path.read_bytes()
    for _ in range(20):
        cut = draw.random.randrange(len(content))
        path.write_bytes(content[:cut])
        lines = content[:cut].count(b"\n")
        assert len(list(spool.rows(tmp_path))) == lines
        after = Spool(tmp_path)
        assert after.last_step == lines - 1
        after.append(1000, {"loss": 0.0})
        assert [r.step for r in spool.rows(tmp_path)] == [*range(lines), 1000]


def test_a_reader_sees_each_row_once_however_small_its_bites(draw: Draw, tmp_path: Path) -> None:
    written, offset, seen = Spool(tmp_path), 0, []
    for step in range(200):
        written.append(step, {"loss": draw.random.random()})
        if draw.random.random() < 0.2:
            rows, offset = spool.read(tmp_path, offset, limit=draw.random.choice([500, 1 << 20]))
            seen += rows
    while rows:
        rows, offset = spool.read(tmp_path, offset)
        seen += rows
    assert [r.step for r in seen] == list(range(200))
    assert offset == spool.size(tmp_path)
    assert spool.read(tmp_path / "none", 0) == ([], 0)


def test_a_run_says_once_what_it_is(tmp_path: Path) -> None:
    assert spool.description(tmp_path) is None
    Spool(tmp_path).describe({"params": {"a": 1}})
    Spool(tmp_path).describe({"params": {"a": 2}})
    assert spool.description(tmp_path) == {"params": {"a": 1}}


def test_the_machines_use_is_sampled_as_mlflow_names_it(tmp_path: Path) -> None:
    written = Spool(tmp_path)
    with spool.system_metrics(written, interval=0.05):
        while not written.count:
            pass
    names = {name for row in spool.rows(tmp_path) for name in row.metrics}
    assert "system/cpu_utilization_percentage" in names


@pytest.mark.parametrize("line", [b"", b"garbage", b"\xff", b"[1]", b'{"sequence": 0}', b'{"a": 1}'])
def test_a_damaged_line_is_named_by_file_and_place(tmp_path: Path, line: bytes) -> None:
    spool = Spool(tmp_path)
    spool.append(1, {"loss": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(RunError, match=rf"{tmp_path}/metrics\.jsonl, byte {size}: the line is damaged"):
        Spool(tmp_path)
