"""`ray job submit --working-dir . -- python -m ray_jobs.sweep CONFIG` against a token-protected local head."""

import os
import random
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.draw import Draw
from tests.ray_jobs.store import Store
from tests.ray_jobs.test_sweep import write_sweep

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Ray head of its own on free ports of this machine; the environment of a client that holds its token."""
    port, dashboard, agent, client_port = (free_port() for _ in range(4))
    temporary = Path("/tmp") / f"gsa-{random.SystemRandom().randrange(10**9)}"  # Unix socket paths must be short
    (tmp_path / "token").write_text(secrets.token_hex(32))
    (tmp_path / "token").chmod(0o600)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["PATH"] = f"{Path(RAY).parent}:{environment['PATH']}"  # `python` of a node is the one with our packages
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    command = [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    command += ["--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", f"--temp-dir={temporary}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client_port}"]
    command += ["--include-dashboard=true", "--disable-usage-stats", "--object-store-memory=100000000"]
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)
    try:
        client = environment | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        for _ in range(40):  # until its agent takes jobs
            job = subprocess.run([RAY, "job", "submit", "--", "true"], env=client, capture_output=True, check=False)
            if job.returncode == 0:
                break
            time.sleep(1)
        yield client
    finally:
        process.terminate()
        process.wait(timeout=60)


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
