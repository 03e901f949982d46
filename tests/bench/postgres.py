"""Many writers at once into MLflow on the shared services: nothing lost, and how soon the page of runs answers.

    python -m tests.bench.postgres

Starts the services in a folder of its own, and stops them. Each writer logs trials as a sweep does: a run, its results
in batches, its end.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import requests

from dashboards.services import Services
from gsa.spool import Row
from gsa.store import TrackingConfig
from gsa.tracking import connect

METRICS = 12
BATCH = 10  # results that a writer has waiting


def write(uri: str, trials: list[int], results: int) -> None:
    tracking = connect(TrackingConfig(uri, "bench"), ".")
    for trial in trials:
        run = tracking.create_run(f"bench/{trial}", f"trial-{trial}", None, {"gsa.trial_id": str(trial)})
        for first in range(0, results, BATCH):
            now = int(time.time() * 1000)
            rows = [
                Row(i, now + i, i, {f"m{m}": trial + i + m / 10 for m in range(METRICS)})
                for i in range(first, first + BATCH)
            ]
            tracking.log_rows(run, rows)
        tracking.finish(run, "finished")


def page_seconds(services: Services, experiment: str) -> float:
    """What MLflow's page of runs asks for."""
    asked: Any = {"experiment_ids": [experiment], "max_results": 100, "order_by": ["attributes.start_time DESC"]}
    auth = ("gsa", services.credentials["MLFLOW_TRACKING_PASSWORD"])
    began = time.perf_counter()
    answer = requests.post(f"{services.uri}/ajax-api/2.0/mlflow/runs/search", json=asked, auth=auth, timeout=60)
    answer.raise_for_status()
    assert len(answer.json()["runs"]) == 100
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--results", type=int, default=100)
    parser.add_argument("--writers", type=int, default=16)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o711)  # PostgreSQL may run as another user
        services = Services(Path(name) / "services")
        services.start()
        os.environ.update(services.credentials)
        try:
            tracking = connect(TrackingConfig(services.uri, "bench"), ".")
            context = multiprocessing.get_context("spawn")
            shares = [list(range(w, asked.trials, asked.writers)) for w in range(asked.writers)]
            writers = [context.Process(target=write, args=(services.uri, share, asked.results)) for share in shares]
            began = time.monotonic()
            for writer in writers:
                writer.start()
            for writer in writers:
                writer.join()
            took = time.monotonic() - began
            failed = [writer.exitcode for writer in writers if writer.exitcode]
            runs = tracking.client.search_runs([tracking.experiment_id], max_results=asked.trials + 1)
            lost = asked.trials * asked.results
            for run in runs:
                trial = int(run.data.tags["gsa.trial_id"])
                history = tracking.client.get_metric_history(run.info.run_id, "m3")
                lost -= sum(point.value == trial + point.step + 0.3 for point in history)
                lost += len(history) - len({point.step for point in history})  # doubled ones count too
            answers = [page_seconds(services, tracking.experiment_id) for _ in range(7)]
        finally:
            services.stop()
    total = asked.trials * asked.results
    print(
        f"{len(runs)} runs, {total} results of {METRICS} metrics by {asked.writers} writers in {took:.0f} s "
        f"({total / took:.0f} a second); writers that failed: {len(failed)}, results lost or doubled: {lost}; the page "
        f"of 100 runs answers in {statistics.median(answers):.2f} s ({min(answers):.2f} to {max(answers):.2f})"
    )


if __name__ == "__main__":
    main()
