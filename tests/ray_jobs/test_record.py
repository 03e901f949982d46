"""The record gives back what was put in, in order, however its writer ended."""

import json
import resource
import signal
from pathlib import Path

import pytest

from gsa.errors import RequestError
from ray_jobs.events import Event
from ray_jobs.record import COMPLETE, FAIL, PRUNED, RUNNING, Entry, Record, frozen_config, read
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


LINES = [  # of a trial that goes through all events, as earlier versions wrote them: without numbers
    {"time": 1.0, "event": "life"},
    {"time": 2.0, "event": "propose", "trial_id": "t", "params": {"a": 1}, "settings": {"a": 1}, "until": 10},
    {"time": 3.0, "event": "result", "trial_id": "t", "sequence": 0, "step": 10, "values": {"loss": 2}, "seconds": 1},
    {"time": 4.0, "event": "pause", "trial_id": "t"},
    {"time": 5.0, "event": "promote", "trial_id": "t", "until": None},
    {"time": 6.0, "event": "result", "trial_id": "t", "sequence": 1, "step": 20, "values": {"loss": 1}, "seconds": 2},
    {"time": 7.0, "event": "end", "trial_id": "t", "state": COMPLETE, "values": [1], "reason": ""},
]


@pytest.mark.parametrize("place", range(1, len(LINES)))
@pytest.mark.parametrize("numbered", [False, True])
def test_a_record_that_lacks_or_repeats_a_line_is_refused_and_stays_as_it_is(
    tmp_path: Path, place: int, numbered: bool
) -> None:
    lines = [{"line": i} | event for i, event in enumerate(LINES, 1)] if numbered else LINES
    path = tmp_path / "r.jsonl"
    for changed in ([*lines[:place], *lines[place + 1 :]], [*lines[:place], lines[place], *lines[place:]]):
        doubled = len(changed) > len(lines)
        content = "".join(json.dumps(event) + "\n" for event in changed)
        path.write_text(content + '{"time": 8.0, "ev')  # cut short by a crash
        # what cannot be told without numbers: a result before an end, and whether the last event came
        if not doubled and (place == len(lines) - 1 or (place == len(lines) - 2 and not numbered)):
            assert read(path)[1]["t"].until is None
            continue
        for attempt in (read, Record):
            with pytest.raises(RequestError, match=f"{path}, line {place + 1 + doubled if numbered else ''}"):
                attempt(path)
        assert path.read_text() == content + '{"time": 8.0, "ev'


def test_records_of_earlier_versions_are_read_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in LINES))
    record = Record(path)
    assert record.entries["t"].state == COMPLETE
    assert record.entries["t"].steps == {10: {"loss": 2}, 20: {"loss": 1}}
    record.begin({"seed": 3})
    record.begin({"seed": 4})
    assert frozen_config(read(path)[0]) == {"seed": 3}
    assert [event.get("line") for event in Record(path).events] == [None] * 7 + [8, 9]


def test_a_run_that_no_sweep_started_is_proposed_again_where_it_goes_on(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.jsonl")
    for _ in range(2):
        record.propose(Entry("run", {}, {}))
        record.end("run", COMPLETE)
    record.propose(Entry("run", {}, {}))
    assert Record(tmp_path / "r.jsonl").entries["run"].state == RUNNING


def test_a_full_disk_leaves_no_half_line_and_writing_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """A real file-size limit of the process stands in for the disk: writing fails in the kernel."""
    record = Record(tmp_path / "r.jsonl")
    record.propose(Entry("t", {"a": 1}, {"a": 1}))
    size = (tmp_path / "r.jsonl").stat().st_size
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            record.result("t", 1, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert (tmp_path / "r.jsonl").stat().st_size == size
    record.result("t", 1, {"loss": 1.0})
    assert Record(tmp_path / "r.jsonl").entries == record.entries
    assert record.entries["t"].steps == {1: {"loss": 1.0}}
