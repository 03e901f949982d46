"""Sweeps of invented trials on real Ray Tune: everything is real but the training."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from gsa.config import TrainConfig, build
from gsa.store import TrackingConfig
from gsa.tracking import OBJECTIVES, Tracking, connect
from ray_jobs.halving import Halving, SchedulerConfig
from ray_jobs.mlflow_writer import MlflowWriter
from ray_jobs.objectives import Aims, ObjectiveConfig
from ray_jobs.record import Proposal, Record
from ray_jobs.runs import TrialContext, run_key
from ray_jobs.searcher import GsaSearcher
from ray_jobs.space import Space
from ray_jobs.studies import SearcherConfig, Studies
from ray_jobs.tuning import run_trials
from tests.bench.trial import RATE

SPACE = {
    RATE: {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
    "model.attention.controller.k": {
        "type": "int",
        "low": 256,
        "high": 2048,
        "step": 64,
    },  # from k_min on: none is refused
    "model.attention.gates.places": {"type": "categorical", "choices": [[], ["G1"], ["G2"], ["G1", "G2"]]},
    "model.attention.indexer.num_heads": {"type": "categorical", "choices": [1, 2, 4]},
}
BASE = dataclasses.asdict(build(TrainConfig, {}))


class InventedSweep:
    """One sweep, new or continued, in a folder."""

    def __init__(self, folder: Path, trials: int, sampler: str = "random", tracking: Tracking | None = None) -> None:
        self.folder = folder
        self.tracking = tracking or connect(TrackingConfig(), folder)
        self.parent = self.tracking.start_run(run_key("s"), "s", tags={OBJECTIVES: "[]"})
        self.record = Record(folder / "record.jsonl")
        aims = Aims([ObjectiveConfig()])
        halving = Halving(SchedulerConfig("none"), 1, aims)
        studies = Studies(Space(SPACE, BASE), aims, SearcherConfig(sampler), [], 0, self.record)
        self.searcher = GsaSearcher(studies, halving, self.record, trials, max_failures=3)
        self.context = TrialContext("s", BASE, str(folder), self.parent, {})

    def run(
        self, trainable: Callable[[Proposal], None], concurrent: int = 2, resources: dict[str, float] | None = None
    ) -> str:
        """Run it to its end; what MLflow was not told."""
        writer = MlflowWriter(self.tracking, self.record.path, self.context)
        writer.start()
        try:
            self.record.begin()
            run_trials(trainable, self.searcher, self.folder, concurrent, resources or {"CPU": 1})
        finally:
            late = writer.finish(600)
        return late

    def check(self, results: int) -> dict[str, int]:
        """Counts of what is in MLflow against what should be."""
        runs = self.tracking.children(self.parent)
        names = [run.data.tags["gsa.trial_id"] for run in runs]
        complete = [e for e in self.record.trials() if e.state == "COMPLETE"]
        steps = [self._steps(run.info.run_id) for run in runs if self.tracking.state(run) == "finished"]
        wanted = list(range(1, results + 1))
        return {
            "trials": len(self.record.trials()),
            "complete": len(complete),
            "runs": len(runs),
            "doubled runs": len(names) - len(set(names)),
            "lost steps": sum(len(set(wanted) - set(found)) for found in steps),
            "doubled steps": sum(len(found) - len(set(found)) for found in steps),
        }

    def _steps(self, run_id: str) -> list[int]:
        return [m.step for m in self.tracking.client.get_metric_history(run_id, "metric_0")]


def rss() -> float:
    """MiB that this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
