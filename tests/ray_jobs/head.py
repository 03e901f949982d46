"""A Ray head of a test's own, on free ports of this machine, that asks for a token."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from dashboards.services import free_ports, write_private
from tests.ray_jobs.test_sweep import wait_for

RAY = str(Path(sys.executable).with_name("ray"))


@contextlib.contextmanager
def running_head(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a client that holds its token."""
    port, dashboard, agent, client_port = free_ports(4)
    temporary = tempfile.mkdtemp(prefix="gsa-")  # Unix socket paths must be short
    write_private(folder / "token", secrets.token_hex(32))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["PATH"] = f"{Path(RAY).parent}:{environment['PATH']}"  # `python` of a node is the one with our packages
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "OMP_NUM_THREADS": "1"}
    command = [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    command += ["--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", f"--temp-dir={temporary}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client_port}"]
    command += ["--include-dashboard=true", "--disable-usage-stats", "--object-store-memory=100000000"]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(lambda: answers(address))
        yield environment | {"RAY_ADDRESS": address}
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=60)
        for one in alive:
            one.kill()
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=1).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
