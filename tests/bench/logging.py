"""Results per second into MLflow: our spool and writer, and Tune's `MLflowLoggerCallback`, on one store each.

python -m tests.bench.logging --trials 20 --results 40
"""

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from ray.air.integrations.mlflow import MLflowLoggerCallback

from gsa.spool import Spool
from gsa.store import TrackingConfig
from gsa.tracking import connect
from ray_jobs.mlflow_log import MlflowLog
from ray_jobs.record import COMPLETE, Entry, Record
from ray_jobs.runs import TrialContext, run_key

METRICS = 12


class StandIn:
    """What the callback looks at of Tune's trial."""

    def __init__(self, trial_id: str, folder: str) -> None:
        self.trial_id, self.local_path = trial_id, folder
        self.config: dict[str, Any] = {}
        self.evaluated_params: dict[str, Any] = {}

    def __str__(self) -> str:
        return self.trial_id


def ours(folder: Path, trials: int, results: int) -> float:
    """Results per second, from the first one in a spool to the last one in MLflow."""
    tracking = connect(TrackingConfig(), folder)
    parent = tracking.start_run(run_key("s"), "s")
    record = Record(folder / "record.jsonl")
    log = MlflowLog(tracking, record.path, TrialContext("s", {}, str(folder), parent, {}))
    began = time.perf_counter()
    for i in range(trials):
        record.propose(Entry(f"t{i}", {}, {}))
        spool = Spool(folder / "trials" / f"t{i}")
        for step in range(results):
            spool.append(step, drawn())
        spool.close()
        record.end(f"t{i}", COMPLETE, [0.0])
    while log.advance():
        pass
    return trials * results / (time.perf_counter() - began)


def stock(folder: Path, trials: int, results: int) -> float:
    """The same with Tune's callback, called as Tune calls it."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    connect(TrackingConfig(), folder)
    callback = MLflowLoggerCallback(tracking_uri=uri, experiment_name="stock")
    callback.setup()
    began = time.perf_counter()
    for i in range(trials):
        trial: Any = StandIn(f"t{i}", str(folder))
        callback.log_trial_start(trial)
        for step in range(results):
            callback.log_trial_result(step, trial, drawn() | {"training_iteration": step})
        callback.log_trial_end(trial)
    return trials * results / (time.perf_counter() - began)


def drawn() -> dict[str, float]:
    return {f"metric_{i}": random.random() for i in range(METRICS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--results", type=int, default=40)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        theirs = stock(Path(folder) / "stock", max(2, asked.trials // 5), asked.results)
        own = ours(Path(folder) / "ours", asked.trials, asked.results)
    print(f"MLflowLoggerCallback {theirs:.1f} results/s, ours {own:.0f} results/s: {own / theirs:.0f} times as many")


if __name__ == "__main__":
    main()
