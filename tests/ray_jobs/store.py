"""Reading a store as a user of MLflow would: through its client alone."""

from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run


class Store:
    """The store of a folder, or the one that a client knows."""

    def __init__(self, where: Path | MlflowClient) -> None:
        self.client = MlflowClient(f"sqlite:///{where / 'mlflow.db'}") if isinstance(where, Path) else where

    def runs(self) -> list[Run]:
        experiment = self.client.get_experiment_by_name("gsa")
        return [] if experiment is None else list(self.client.search_runs([experiment.experiment_id], max_results=1000))

    def parent(self) -> Run:
        (parent,) = [run for run in self.runs() if "gsa.objectives" in run.data.tags]
        return parent

    def children(self) -> dict[str, Run]:
        """Trials by name; two runs of one trial would be an error."""
        parent = self.parent().info.run_id
        runs = [run for run in self.runs() if run.data.tags.get("mlflow.parentRunId") == parent]
        names = [str(run.info.run_name) for run in runs]
        assert len(set(names)) == len(names)
        return dict(zip(names, runs, strict=True))

    def steps(self, run: Run, metric: str) -> list[int]:
        return [m.step for m in self.client.get_metric_history(run.info.run_id, metric)]

    def artifacts(self, run: Run, folder: str | None = None) -> set[str]:
        return {Path(file.path).name for file in self.client.list_artifacts(run.info.run_id, folder)}

    def check_steps(self, expected: dict[str, list[int]], metric: str = "held_out_loss") -> None:
        """Every step of every trial is there, and once."""
        found: dict[str, Any] = {name: self.steps(run, metric) for name, run in self.children().items()}
        assert found == expected
