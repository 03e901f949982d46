"""The record of a sweep: one line of JSON for everything that happened, in order, on disk before it counts.

- It is the only memory of a sweep: the searcher's study, the scheduler's rungs, what is still to run and what was
  told to MLflow are all rebuilt from it.
- Plain data: nothing that is read back can run code. A last line that a crash cut short is dropped.
- Whoever wants to know of events as they happen subscribes.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Params = dict[str, Any]
Proposal = dict[str, Any]  # trial_id, params, settings, baseline: what Tune hands to a trial
Event = dict[str, Any]

RUNNING, COMPLETE, PRUNED, FAIL = "RUNNING", "COMPLETE", "PRUNED", "FAIL"


@dataclasses.dataclass
class Entry:
    """One trial."""

    trial_id: str
    params: Params
    settings: dict[str, Any]  # the same as settings of a training configuration
    baseline: bool = False  # a trial to compare with, not proposed by the searcher
    state: str = RUNNING
    steps: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)  # objectives by step
    values: list[float] | None = None  # objectives at full length
    reason: str = ""  # why it failed
    ran: bool = True  # false for a proposal that was not even valid

    def proposal(self) -> Proposal:
        return {name: getattr(self, name) for name in ("trial_id", "params", "settings", "baseline")}


class Record:
    """Events of a sweep and the trials they add up to.

    Args:
        path: of the file; made where there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.events: list[Event] = []
        self._observers: list[Callable[[Event, Entry], None]] = []
        whole = 0
        if path.exists():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            for line in content[:whole].splitlines():
                self._apply(json.loads(line))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(whole)
        self._file.seek(whole)

    def subscribe(self, observer: Callable[[Event, Entry], None]) -> None:
        """Call `observer` with every new event and its trial, after it is on disk."""
        self._observers.append(observer)

    def propose(self, entry: Entry) -> None:
        """A new trial; `entry.ran` is false where it was refused before it could run."""
        self._append({"event": "propose", **dataclasses.asdict(entry)})

    def result(self, trial_id: str, step: int, values: dict[str, float]) -> None:
        """An evaluation. One of a step that is known already, by a trial that went back to a checkpoint, is dropped."""
        if step not in self.entries[trial_id].steps:
            self._append({"event": "result", "trial_id": trial_id, "step": step, "values": values})

    def end(self, trial_id: str, state: str, values: list[float] | None = None, reason: str = "") -> None:
        """A trial has ended, once and for all."""
        self._append({"event": "end", "trial_id": trial_id, "state": state, "values": values, "reason": reason})

    def trials(self) -> list[Entry]:
        """The trials that ran, baselines among them."""
        return [entry for entry in self.entries.values() if entry.ran]

    def _append(self, event: Event) -> None:
        self._file.write(json.dumps(event).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        entry = self._apply(event)
        for observer in self._observers:
            observer(event, entry)

    def _apply(self, event: Event) -> Entry:
        self.events.append(event)
        if event["event"] == "propose":
            entry = Entry(**{name: value for name, value in event.items() if name != "event"})
            self.entries[entry.trial_id] = entry
            return entry
        entry = self.entries[event["trial_id"]]
        if event["event"] == "result":
            entry.steps[event["step"]] = event["values"]
        else:
            entry.state, entry.values, entry.reason = event["state"], event["values"], event["reason"]
        return entry
