"""`ray job submit --working-dir . -- python -m ray_jobs.sweep CONFIG` against a token-protected local head."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.draw import Draw
from tests.ray_jobs.head import Head, link_project
from tests.ray_jobs.nodes import RAY
from tests.ray_jobs.small import write_sweep
from tests.ray_jobs.store import Store


def test_a_submitted_sweep_runs_on_the_cluster_and_its_results_are_in_mlflow(
    draw: Draw, tmp_path: Path, ray_head: Head
) -> None:
    path = write_sweep(tmp_path, draw.random.randrange(1000), num_samples=2)
    project = tmp_path / "project"  # as a user has it: the configuration lies beside the code
    (project / "configs/sweep").mkdir(parents=True)
    link_project(project)
    shutil.copy(path, project / "configs/sweep/mine.yaml")
    command = [RAY, "job", "submit", "--working-dir", ".", "--", "python", "-m", "ray_jobs.sweep"]
    command.append("configs/sweep/mine.yaml")

    def submit(**environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command, env=ray_head.environment | environment, cwd=project, capture_output=True, text=True, check=False
        )

    done = submit()
    while "No available agent" in done.stdout + done.stderr:  # a head that has just started takes no job yet
        done = submit()
    denied = submit(RAY_AUTH_TOKEN_PATH=os.devnull)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3/3 trials (3 finished)" in done.stdout
    assert denied.returncode != 0
    store = Store(tmp_path / "runs")
    assert store.parent().info.status == "FINISHED"
    store.check_steps({name: [4, 8, 10 if name.startswith("base") else 12] for name in store.children()})
    assert len(store.children()) == 3
