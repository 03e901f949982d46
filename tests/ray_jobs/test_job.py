"""`ray job submit --working-dir . -- python -m ray_jobs.sweep CONFIG` against a token-protected local head."""

import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.draw import Draw
from tests.ray_jobs.head import running_head
from tests.ray_jobs.nodes import RAY
from tests.ray_jobs.store import Store
from tests.ray_jobs.test_sweep import ROOT, write_sweep


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, str]]:
    with running_head(tmp_path) as running:
        client = running.environment
        for _ in range(40):  # until its agent takes jobs
            job = subprocess.run([RAY, "job", "submit", "--", "true"], env=client, capture_output=True, check=False)
            if job.returncode == 0:
                break
            time.sleep(1)
        yield client


def test_a_submitted_sweep_runs_on_the_cluster_and_its_results_are_in_mlflow(
    draw: Draw, tmp_path: Path, head: dict[str, str]
) -> None:
    path = write_sweep(tmp_path, draw.random.randrange(1000), num_samples=2)
    config = ROOT / "configs/sweep" / f"job-{secrets.token_hex(4)}.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(path.read_text())))
    try:
        command = [RAY, "job", "submit", "--working-dir", ".", "--", "python", "-m", "ray_jobs.sweep"]
        command += [f"configs/sweep/{config.name}"]
        done = subprocess.run(command, env=head, cwd=ROOT, capture_output=True, text=True, check=False)
        denied = subprocess.run(
            command,
            env=head | {"RAY_AUTH_TOKEN_PATH": os.devnull},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        config.unlink()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3/3 trials (3 finished)" in done.stdout
    assert denied.returncode != 0
    store = Store(tmp_path / "runs")
    assert store.parent().info.status == "FINISHED"
    store.check_steps({name: [4, 8, 10 if name.startswith("base") else 12] for name in store.children()})
    assert len(store.children()) == 3
