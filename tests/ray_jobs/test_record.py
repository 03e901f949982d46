"""The record gives back what was put in, in order, however its writer ended."""

from pathlib import Path

from ray_jobs.record import COMPLETE, FAIL, PRUNED, RUNNING, Entry, Event, Record
from tests.draw import Draw


def fill(record: Record, draw: Draw, trials: int = 6) -> None:
    """A sweep's worth of random events."""
    for i in range(trials):
        record.propose(Entry(f"t{i}", {"a": draw.random.random()}, {"b": [1, None]}, baseline=i == 0))
    for _ in range(30):
        record.result(f"t{draw.random.randrange(trials)}", draw.random.randrange(5), {"loss": draw.random.random()})
    record.propose(Entry("invalid", {}, {}, state=FAIL, reason="no", ran=False))
    for i, state in enumerate((COMPLETE, PRUNED, FAIL)):
        record.end(
            f"t{i}", state, [draw.random.random()] if state == COMPLETE else None, "why" if state == FAIL else ""
        )


def test_a_record_read_again_is_the_same(draw: Draw, tmp_path: Path) -> None:
    record = Record(tmp_path / "r.jsonl")
    fill(record, draw)
    again = Record(tmp_path / "r.jsonl")
    assert again.entries == record.entries
    assert [e["event"] for e in again.events] == [e["event"] for e in record.events]
    assert [e.trial_id for e in again.trials()] == [f"t{i}" for i in range(6)]
    assert [e.state for e in again.trials()] == [COMPLETE, PRUNED, FAIL, RUNNING, RUNNING, RUNNING]


def test_a_line_that_was_cut_short_is_dropped_and_writing_goes_on(draw: Draw, tmp_path: Path) -> None:
    fill(Record(tmp_path / "r.jsonl"), draw)
    content = (tmp_path / "r.jsonl").read_bytes()
    for _ in range(20):
        cut = draw.random.randrange(len(content))
        (tmp_path / "r.jsonl").write_bytes(content[:cut])
        record = Record(tmp_path / "r.jsonl")
        assert len(record.events) == content[:cut].count(b"\n")
        record.propose(Entry("new", {}, {}))
        assert Record(tmp_path / "r.jsonl").entries == record.entries


def test_a_step_that_is_repeated_is_recorded_once(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.jsonl")
    record.propose(Entry("t", {}, {}))
    for value in (1.0, 2.0):
        record.result("t", 10, {"loss": value})
    assert record.entries["t"].steps == {10: {"loss": 1.0}}
    assert len(record.events) == 2


def test_observers_hear_of_events_that_are_on_disk_already(tmp_path: Path) -> None:
    record, heard = Record(tmp_path / "r.jsonl"), []

    def observe(event: Event, entry: Entry) -> None:
        heard.append((event["event"], entry.trial_id))
        assert len(Record(tmp_path / "r.jsonl").events) == len(heard)

    record.subscribe(observe)
    record.propose(Entry("t", {}, {}))
    record.result("t", 1, {})
    record.end("t", PRUNED)
    assert heard == [("propose", "t"), ("result", "t"), ("end", "t")]
