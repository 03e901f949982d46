"""What MLflow is told: all of it and once, through outages, lost answers, crashes and restarts."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import ClientError
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import OperationalError

from gsa.spool import Spool
from gsa.store import TrackingConfig
from gsa.tracking import KEY, ArtifactError, Tracking, connect, read_json
from ray_jobs import mlflow_writer
from ray_jobs.mlflow_log import STATES, MlflowLog, _is_lasting
from ray_jobs.mlflow_writer import MlflowWriter
from ray_jobs.record import COMPLETE, FAIL, PAUSED, PRUNED, RUNNING, Entry, Record
from ray_jobs.runs import TrialContext
from tests.draw import Draw
from tests.mlflow_store import new_tracking

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
        self.tracking = new_tracking(folder)
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
                ran = random.random() < 0.9
                self.record.propose(Entry(name, {"a": 1}, {}, ran=ran, state=RUNNING if ran else FAIL))
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


@pytest.mark.slow
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
    assert log.refused == {"s/t0": "its run was deleted"}
    second = sweep.tracking.find_run("s/t1")
    assert second is not None
    assert sweep.tracking.state(second) == "stopped_early"
    told(sweep.log())  # the sweep goes on: the run is restored
    sweep.check()
    restored = sweep.tracking.find_run("s/t0")
    assert restored is not None
    assert restored.info.run_id == first.info.run_id


def test_what_was_refused_as_the_experiment_was_deleted_is_told_once_that_is_restored(
    draw: Draw, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, draw)
    sweep.grow(10)
    log = sweep.log()
    log.advance()
    sweep.tracking.client.delete_experiment(sweep.tracking.experiment_id)
    sweep.grow(10)
    told(log)
    assert log.refused
    assert set(log.refused.values()) == {"the experiment 'gsa' was deleted"}
    connect(TrackingConfig(), tmp_path)
    told(sweep.log())
    sweep.check()


def test_a_checkpoint_that_cannot_be_stored_holds_up_no_other_run(draw: Draw, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, draw)
    for name in ("t0", "t1"):
        sweep.record.propose(Entry(name, {}, {}))
        sweep.steps[name] = [0]
        folder = Path(sweep.context.folder) / "trials" / name
        Spool(folder).append(0, {f"m{i}": 1.0 for i in range(12)})
        (folder / "step-1").mkdir()
        (folder / "step-1" / "model").write_text("weights")
    artifacts = tmp_path / "artifacts"
    artifacts.write_text("in the way")
    log = sweep.log()
    sweep.record.end("t0", COMPLETE)
    sweep.record.end("t1", PRUNED)
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"step-1: (FileExists|NotADirectory)Error: "):
            log.advance()
    runs = {str(run.info.run_name): run for run in sweep.tracking.children(sweep.parent)}
    assert [sweep.tracking.state(runs[name]) for name in ("t0", "t1")] == ["running", "stopped_early"]
    assert runs["t0"].data.metrics["m0"] == 1.0
    assert not log.refused
    artifacts.unlink()
    told(log)
    sweep.check()
    assert sweep.tracking.download(runs["t0"].info.run_id, "checkpoint").joinpath("model").read_text() == "weights"


def test_a_checkpoint_that_is_removed_meanwhile_is_missed(tmp_path: Path) -> None:
    tracking = new_tracking(tmp_path)
    with pytest.raises(ArtifactError, match="step-1"):
        tracking.upload(tracking.start_run("s/", "s"), tmp_path / "step-1", "checkpoint")


@pytest.mark.parametrize(("status", "lasting"), [(403, True), (404, True), (408, False), (429, False), (503, False)])
def test_what_an_object_store_refuses_for_good_is_told_by_its_status(status: int, lasting: bool) -> None:
    answer = requests.Response()
    answer.status_code = status
    by_boto = ClientError({"ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")
    for cause in (by_boto, requests.HTTPError(response=answer)):
        error = ArtifactError("step-1")
        error.__cause__ = S3UploadFailedError("step-1")
        error.__cause__.__context__ = cause
        assert _is_lasting(error) == lasting
    assert not _is_lasting(ArtifactError("step-1"))


def test_a_damaged_spool_is_its_runs_alone(draw: Draw, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, draw)
    for name in ("t0", "t1"):
        sweep.record.propose(Entry(name, {}, {}))
        Spool(Path(sweep.context.folder) / "trials" / name).append(0, {"m0": 1.0})
    spool = Path(sweep.context.folder) / "trials" / "t0" / "metrics.jsonl"
    spool.write_bytes(b"\0\0\0\n" + spool.read_bytes())
    log = sweep.log()
    told(log)
    assert list(log.refused) == ["s/t0"]
    assert str(spool) in log.refused["s/t0"]
    run = sweep.tracking.find_run("s/t1")
    assert run is not None
    assert run.data.metrics["m0"] == 1.0


def test_a_setting_that_mlflow_cannot_change_costs_no_value(draw: Draw, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, draw)
    sweep.record.propose(Entry("t0", {}, {}))
    spool = Spool(Path(sweep.context.folder) / "trials" / "t0")
    spool.describe(DESCRIPTION)
    told(sweep.log(), last=False)
    changed = Path(sweep.context.folder) / "trials" / "t0" / "run.json"
    changed.write_text(json.dumps(DESCRIPTION | {"params": {"model.layers[0].k": 4}}))
    spool.append(0, {"m0": 1.0})
    log = sweep.log()
    told(log)
    assert "model.layers[0].k = '4'" in log.refused["s/t0"]
    run = sweep.tracking.find_run("s/t0")
    assert run is not None
    assert (run.data.metrics["m0"], sweep.tracking.state(run)) == (1.0, "killed")


def test_parameters_of_many_layers_are_read_back_whole(draw: Draw, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, draw)
    params = {f"model.layers[{i}].controller.ratio": draw.random.random() for i in range(1024)}
    sweep.record.propose(Entry("t0", params, {}))
    told(sweep.log())
    run = sweep.tracking.find_run("s/t0")
    assert run is not None
    assert read_json(run, "gsa.params", dict) == params


class Failing:
    """A log whose first calls fail."""

    def __init__(self, failures: list[Exception]) -> None:
        self.failures = failures

    def advance(self, last: bool) -> bool:
        if self.failures:
            raise self.failures.pop(0)
        return True


def test_each_kind_of_failure_is_one_line_however_often_it_comes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_writer, "PAUSES", (0.0,))
    full = [OSError(28, "No space left on device") for _ in range(3)]
    locked = [OperationalError("INSERT", {}, Exception("database is locked")) for _ in range(3)]
    artifact = [ArtifactError("step-1: NoCredentialsError: none") for _ in range(2)]
    log: Any = Failing([*full, *locked, *artifact, *full])
    stop, _theirs = multiprocessing.Pipe(duplex=False)
    heard, say = multiprocessing.Pipe(duplex=False)
    mlflow_writer._advance(log, os.getppid(), False, stop, say)
    lines = [record.message for record in caplog.records]
    waits = "MLflow does not answer; results wait on disk and are logged later"
    assert [line.startswith(waits) for line in lines] == [True, True, True, False]
    assert lines[0] == f"{waits} ([Errno 28] No space left on device)"
    assert lines[-1] == "MLflow answers again: what waited is logged"
    assert not any("\n" in line for line in lines)
    said = []
    while heard.poll():
        said.append(heard.recv())
    assert said[0] == "[Errno 28] No space left on device"
    assert said[-1] == ""


@pytest.mark.slow
def test_the_process_tells_the_rest_though_it_is_killed_and_does_not_mind_ctrl_c(
    draw: Draw, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = Sweep(tmp_path, draw)
    writer = MlflowWriter(sweep.tracking, sweep.record.path, sweep.context)
    writer.start()
    sweep.grow(15)
    first = writer._process.pid
    assert first is not None
    os.kill(first, signal.SIGINT)
    deadline = time.monotonic() + 60
    while not sweep.tracking.children(sweep.parent) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert writer._process.pid == first
    os.kill(first, signal.SIGKILL)
    while writer._process.pid == first and time.monotonic() < deadline:
        time.sleep(0.1)
    sweep.grow(15)
    sweep.record.propose(Entry("t0x", {"a": 1}, {}))
    while (run := sweep.tracking.find_run("s/t0x")) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert run is not None
    sweep.tracking.client.delete_run(run.info.run_id)
    sweep.steps["t0x"] = []
    sweep.record.end("t0x", FAIL)
    assert writer.finish(100) == f"{sweep.tracking.uri} refused a part: s/t0x: its run was deleted"
    told(sweep.log())  # the same sweep again
    assert [r.message for r in caplog.records if "died" in r.message] == [
        "the process that logs to MLflow died (exit code -9): started again; nothing is lost"
    ]
    sweep.check()
    run = sweep.tracking.children(sweep.parent)[0]
    assert json.loads(run.data.tags["gsa.params"]) == {"a": 1}
