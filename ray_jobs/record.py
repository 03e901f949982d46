"""The record of a sweep: one line of JSON for everything that happened, in order, written before it counts.

- It is the only memory of a sweep: the searcher's studies, the rungs, what is still to run, what was spent and what
  MLflow has to be told are all rebuilt from it.
- Plain data: nothing that is read back can run code. A last line that a crash cut short is dropped; any other line that
  is damaged, missing, doubled or out of order is refused by its number, before anything is written.
- Whoever wants to know of events as they happen subscribes, or follows the file from another process.

| event | says |
|---|---|
| `life` | a driver has begun; the first also holds the settings that the sweep keeps |
| `propose` | a trial, all of its entry |
| `result` | an evaluation: objectives and constraints by name, and the seconds spent so far |
| `pause` | a trial stands at a rung and waits for others, or for ever |
| `promote` | it goes on |
| `end` | it has ended |
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gsa.errors import RequestError
from gsa.spool import open_whole
from ray_jobs.events import Event, parse

Params = dict[str, Any]
Proposal = dict[str, Any]  # trial_id, params, settings, baseline, until: what Tune hands to a trial

RUNNING, PAUSED, COMPLETE, PRUNED, FAIL = "RUNNING", "PAUSED", "COMPLETE", "PRUNED", "FAIL"


@dataclasses.dataclass
class Entry:
    """One trial."""

    trial_id: str
    params: Params
    settings: dict[str, Any]  # the same as settings of a training configuration
    baseline: bool = False  # a trial to compare with, not proposed by the searcher
    confirms: str | None = None  # the trial that this one repeats with another seed
    imported: str | None = None  # the MLflow run that it was taken from; it never runs here
    state: str = RUNNING
    until: int | None = None  # step of the rung at which it pauses; None: it runs to its end
    steps: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)  # objectives, constraints by step
    values: list[float] | None = None  # objectives at full length
    reason: str = ""  # why it failed
    ran: bool = True  # false for a proposal that was not even valid
    seconds: float = 0.0  # of training
    sampler: dict[str, Any] = dataclasses.field(default_factory=dict)  # what Optuna's sampler noted of it

    @property
    def searched(self) -> bool:
        """Whether the searcher proposed it, in this sweep."""
        return not self.baseline and self.confirms is None and self.imported is None

    def proposal(self) -> Proposal:
        return {name: getattr(self, name) for name in ("trial_id", "params", "settings", "baseline", "until")}


class Record:
    """Events of a sweep and the trials they add up to.

    Args:
        path: of the file; made where there is none.
        clock: seconds since 1970.

    Raises:
        RequestError: as `read`.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path, self.clock = path, clock
        self.events, self.entries = read(path) if path.exists() else ([], {})
        self._observers: list[Callable[[Event, Entry], None]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_whole(path)
        self._size = path.stat().st_size

    def subscribe(self, observer: Callable[[Event, Entry], None]) -> None:
        """Call `observer` with every new event of a trial and its entry, after it is written."""
        self._observers.append(observer)

    def begin(self, config: dict[str, Any] | None = None) -> None:
        """A driver has begun to work on the sweep.

        Args:
            config: the settings that the sweep keeps, as plain data; they are recorded once, by the first driver.
        """
        known = config is None or frozen_config(self.events) is not None
        self._append({"event": "life"} | ({} if known else {"config": config}))

    def propose(self, entry: Entry) -> None:
        """A new trial; `entry.ran` is false where it was refused before it could run."""
        self._append({"event": "propose", **dataclasses.asdict(entry)})

    def result(self, trial_id: str, step: int, values: dict[str, float], seconds: float = 0.0) -> None:
        """An evaluation. One of a step that is known already, by a trial that went back to a checkpoint, is dropped."""
        known = self.entries[trial_id].steps
        if step not in known:
            event = {"event": "result", "trial_id": trial_id, "sequence": len(known), "step": step}
            self._append(event | {"values": values, "seconds": seconds}, synced=True)

    def pause(self, trial_id: str) -> None:
        """A trial has come to its rung."""
        self._append({"event": "pause", "trial_id": trial_id})

    def promote(self, trial_id: str, until: int | None) -> None:
        """A paused trial goes on to the next rung, or to its end."""
        self._append({"event": "promote", "trial_id": trial_id, "until": until})

    def end(self, trial_id: str, state: str, values: list[float] | None = None, reason: str = "") -> None:
        """A trial has ended, once and for all."""
        self._append({"event": "end", "trial_id": trial_id, "state": state, "values": values, "reason": reason})

    def trials(self) -> list[Entry]:
        """The trials that ran, baselines among them."""
        return [entry for entry in self.entries.values() if entry.ran]

    def _append(self, event: Event, synced: bool = False) -> None:
        """Write an event: no death of this process loses it.

        A result is synced too, and all before it: where the machine loses power it cannot be had again, once the
        trial's checkpoint is past it. A lost proposal is drawn again, the same; a trial that has lost its end comes to
        it again at once.
        """
        event = {"line": len(self.events) + 1, "time": round(self.clock(), 3)} | event
        self._write(json.dumps(event).encode() + b"\n")
        if synced:
            os.fsync(self._file.fileno())
        self.events.append(event)
        entry = apply(self.entries, event)
        if entry is not None:
            for observer in self._observers:
                observer(event, entry)

    def _write(self, line: bytes) -> None:
        """Append a line, or nothing of it: where the disk is full, the next line must not stand behind half of this."""
        try:
            written = os.pwrite(self._file.fileno(), line, self._size)
            while written < len(line):
                written += os.pwrite(self._file.fileno(), line[written:], self._size + written)
        except OSError:
            os.truncate(self._file.fileno(), self._size)
            raise
        self._size += len(line)


def read(path: Path) -> tuple[list[Event], dict[str, Entry]]:
    """The events of a record and the trials they add up to; the file is not changed.

    A last line without its end, which a crash cut short, is left out.

    Raises:
        RequestError: a line is not an event, or cannot follow those before it; file and line are named.
    """
    events: list[Event] = []
    entries: dict[str, Entry] = {}
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(lines, 1):
        try:
            event = parse(line)
            _refuse_gap(event, events, number)
            apply(entries, event)
        except ValueError as error:
            remedy = "restore it from a copy, or start the sweep under another name"
            raise RequestError(f"{path}, line {number}: {error}; the record is damaged: {remedy}") from error
        events.append(event)
    return events, entries


def _refuse_gap(event: Event, before: list[Event], number: int) -> None:
    """Raise ValueError where lines before this one were lost, added or moved, as far as they are numbered."""
    if "line" not in event:
        if before and "line" in before[-1]:
            raise ValueError("has no number, which the line before has")
    elif event["line"] != number:
        raise ValueError(f"was line {event['line']} when it was written")


def frozen_config(events: Iterable[Event]) -> dict[str, Any] | None:
    """The settings that a sweep keeps, as its record holds them; `None` in one of an earlier version."""
    return next((event["config"] for event in events if "config" in event), None)


def apply(entries: dict[str, Entry], event: Event) -> Entry | None:
    """Bring entries by trial up to date with an event; the entry it is about.

    Raises:
        ValueError: the event cannot follow those before it, and nothing was changed.
    """
    kind = event["event"]
    if kind == "life":
        return None
    if kind == "propose":
        fields = {name: value for name, value in event.items() if name not in ("event", "time", "line")}
        fields["steps"] = {int(step): values for step, values in fields.get("steps", {}).items()}
        entry = Entry(**fields)
        _refuse_proposal(entry, entries)
        entries[entry.trial_id] = entry
        return entry
    trial_id = event["trial_id"]
    if trial_id not in entries:
        raise ValueError(f"{kind} of trial {trial_id!r}, which was never proposed")
    entry = entries[trial_id]
    expected = PAUSED if kind == "promote" else RUNNING
    if entry.state != expected or not entry.ran or entry.imported is not None:
        raise ValueError(f"{kind} of trial {trial_id!r}, which is {entry.state} then, not {expected}")
    if kind == "result":
        if event["sequence"] != len(entry.steps) or event["step"] in entry.steps:
            told = f"result {event['sequence']}, of step {event['step']}"
            raise ValueError(f"{told}, of trial {trial_id!r}, which has {len(entry.steps)} results then")
        entry.steps[event["step"]] = event["values"]
        entry.seconds = max(entry.seconds, event["seconds"])
    elif kind == "pause":
        entry.state = PAUSED
    elif kind == "promote":
        entry.state, entry.until = RUNNING, event["until"]
    else:
        if event["state"] not in (COMPLETE, PRUNED, FAIL):
            raise ValueError(f"end of trial {trial_id!r} as {event['state']}, which is no end")
        entry.state, entry.values, entry.reason = event["state"], event["values"], event["reason"]
    return entry


def _refuse_proposal(entry: Entry, entries: dict[str, Entry]) -> None:
    """Raise ValueError for what no driver proposes."""
    alone = not entry.params and not entry.settings and not entry.baseline  # a run that no sweep started: it goes on
    if entry.trial_id in entries and not alone:
        raise ValueError(f"trial {entry.trial_id!r} is proposed a second time")
    allowed = (FAIL,) if not entry.ran else (COMPLETE, PAUSED) if entry.imported is not None else (RUNNING,)
    if entry.state not in allowed:
        raise ValueError(f"trial {entry.trial_id!r} is proposed as {entry.state}")


def follow(path: Path) -> Iterator[Event | None]:
    """The events of a record that another process writes, for ever; None where there is no new one yet."""
    offset = 0
    while True:
        content = b""
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read()
        whole = content.rfind(b"\n") + 1
        for line in content[:whole].splitlines():
            yield json.loads(line)
        offset += whole
        if not whole:
            yield None
