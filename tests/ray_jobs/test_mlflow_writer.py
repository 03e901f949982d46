"""What MLflow is told: all of it and once, through outages, lost answers, crashes and restarts."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from gsa.spool import Spool
from gsa.store import TrackingConfig
from gsa.tracking import KEY, Tracking, connect
from ray_jobs.mlflow_writer import STATES, MlflowLog, MlflowWriter
from ray_jobs.record import COMPLETE, FAIL, PAUSED, PRUNED, RUNNING, Entry, Record
from ray_jobs.runs import TrialContext
from tests.draw import Draw

DESCRIPTION = {
    "params": {"model.layers[0].k": 3},
    "config": "a: 1\n",
    "fingerprint": "f" * 40,
    "corpus": {"source": "text"},
}


class Unreliable:
    """A tracking store that, now and then, does not answer, before or after it has done what it was asked."""

    def __init__(self, tracking: Tracking, draw: Draw, share: float) -> None:
        self.tracking, self.draw, self.share = tracking, draw, share

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.tracking, name)
        if not callable(found) or name == "state":
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            self._fail()
            result = found(*arguments, **named)
            self._fail()
            return result

        return call

    def _fail(self) -> None:
        if self.draw.random.random() < self.share:
            raise MlflowException("no answer")


class Sweep:
    """A record and spools that grow at random, and what MLflow should hold of them."""

    def __init__(self, folder: Path, draw: Draw) -> None:
        self.folder, self.draw = folder, draw
        self.tracking = connect(TrackingConfig(), folder)
        self.parent = self.tracking.start_run("s/", "s", tags={"gsa.objectives": "[]"})
        self.context = TrialContext("s", {}, str(folder / "s"), self.parent, {})
        self.record = Record(folder / "record.jsonl")
        self.steps: dict[str, list[int]] = {}

    def log(self, share: float = 0.0) -> MlflowLog:
        tracking: Any = Unreliable(self.tracking, self.draw, share)
        return MlflowLog(tracking, self.record.path, self.context)

    def grow(self, events: int) -> None:
        """Some more events, as trials of a sweep make them."""
        random = self.draw.random
        for _ in range(events):
            running = [e for e in self.record.trials() if e.state == RUNNING]
            paused = [e for e in self.record.trials() if e.state == PAUSED]
            if not running or random.random() < 0.2:
                name = f"t{len(self.record.entries)}"
                self.record.propose(Entry(name, {"a": 1}, {}, ran=random.random() < 0.9))
                self.steps.setdefault(name, [])
                continue
            if paused and random.random() < 0.2:
                self.record.promote(paused[0].trial_id, None)
                continue
            entry = random.choice(running)
            spool = Spool(Path(self.context.folder) / "trials" / entry.trial_id)
            if random.random() < 0.9:
                spool.describe(DESCRIPTION)
            for _ in range(random.randint(1, 30)):
                step = len(self.steps[entry.trial_id])
                spool.append(step, {f"m{i}": random.random() for i in range(12)})
                self.steps[entry.trial_id].append(step)
            spool.close()
            if random.random() < 0.3:
                if random.random() < 0.3:
                    self.record.pause(entry.trial_id)
                else:
                    self.record.end(entry.trial_id, random.choice([COMPLETE, PRUNED, FAIL]), reason="why")

    def check(self) -> None:
        """Every trial that ran has one run, in its state, with every step once."""
        runs = self.tracking.children(self.parent)
        by_key = {run.data.tags[KEY]: run for run in runs}
        assert len(by_key) == len(runs)
        assert set(by_key) == {f"s/{e.trial_id}" for e in self.record.trials()}
        for entry in self.record.trials():
            run = by_key[f"s/{entry.trial_id}"]
            assert self.tracking.state(run) == STATES[entry.state]
            for name in ("m0", "m11"):
                history = self.tracking.client.get_metric_history(run.info.run_id, name)
                assert [m.step for m in history] == self.steps[entry.trial_id]


def told(log: MlflowLog, last: bool = True) -> None:
    for _ in range(10_000):
        try:
            while log.advance(last):
                pass
        except MlflowException:
            continue
        return
    raise AssertionError("it never came through")


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_all_is_told_and_once_through_outages_and_new_lives(draw: Draw, tmp_path: Path, share: float) -> None:
    sweep = Sweep(tmp_path, draw)
    for _ in range(4):  # lives of the writer
        log = sweep.log(share)
        for _ in range(draw.random.randint(1, 4)):
            sweep.grow(draw.random.randint(1, 10))
            try:
                log.advance()
            except MlflowException as error:
                assert "no answer" in str(error)  # noqa: PT017 - an outage that may or may not come
    told(sweep.log(share))
    sweep.check()
    before = [run.info.end_time for run in sweep.tracking.children(sweep.parent)]
    told(sweep.log())  # of what is told already, nothing is told again
    sweep.check()
    ended = [e.state in (COMPLETE, PRUNED, FAIL, PAUSED) for e in sweep.record.trials()]
    after = [run.info.end_time for run in sweep.tracking.children(sweep.parent)]
    assert [t for t, done in zip(before, ended, strict=True) if done] == [
        t for t, done in zip(after, ended, strict=True) if done
    ]


def test_few_requests_are_made(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep(tmp_path, draw)
    sweep.record.propose(Entry("t0", {}, {}))
    spool = Spool(Path(sweep.context.folder) / "trials/t0")
    for step in range(800):
        spool.append(step, {f"m{i}": 1.0 for i in range(12)})
    requests: list[int] = []
    log = MlflowLog(sweep.tracking, sweep.record.path, sweep.context)
    batch = sweep.tracking.client.log_batch

    def counted(*arguments: Any, **named: Any) -> None:
        requests.append(1)
        batch(*arguments, **named)

    monkeypatch.setattr(sweep.tracking.client, "log_batch", counted)
    log.advance()
    assert len(requests) == 10  # 800 rows of 12 metrics and how far it is, 1000 at once


def test_a_run_that_mlflow_refuses_for_good_does_not_hold_up_the_others(draw: Draw, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, draw)
    for name in ("t0", "t1"):
        sweep.record.propose(Entry(name, {}, {}))
        sweep.steps[name] = [0]
        Spool(Path(sweep.context.folder) / "trials" / name).append(0, {f"m{i}": 1.0 for i in range(12)})
    log = sweep.log()
    log.advance()
    first = sweep.tracking.find_run("s/t0")
    assert first is not None
    sweep.tracking.client.delete_run(first.info.run_id)
    for name in ("t0", "t1"):
        sweep.record.end(name, PRUNED)
    told(log)
    assert set(log.refused) == {"s/t0"}
    second = sweep.tracking.find_run("s/t1")
    assert second is not None
    assert sweep.tracking.state(second) == "stopped_early"


@pytest.mark.slow
def test_the_process_tells_the_rest_when_the_sweep_is_over_and_does_not_mind_ctrl_c(draw: Draw, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, draw)
    writer = MlflowWriter(sweep.tracking, sweep.record.path, sweep.context)
    writer.start()
    sweep.grow(15)
    assert writer._process.pid is not None
    os.kill(writer._process.pid, signal.SIGINT)
    sweep.grow(15)
    assert writer.finish(60) == ""
    sweep.check()
    run = sweep.tracking.children(sweep.parent)[0]
    assert json.loads(run.data.tags["gsa.params"]) == {"a": 1}
