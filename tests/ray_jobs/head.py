"""A Ray head of a test's own, on free ports of this machine, that asks for a token."""

import contextlib
import dataclasses
import os
import secrets
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from dashboards.services import free_ports, write_private
from tests.ray_jobs.commands import ROOT, wait_for
from tests.ray_jobs.nodes import ENVIRONMENT, RAY, write_configuration


@dataclasses.dataclass(frozen=True)
class Head:
    environment: dict[str, str]  # of a client that holds its token
    gcs_address: str  # HOST:PORT
    folder: Path  # Ray's own, with its logs


@contextlib.contextmanager
def running_head(folder: Path, nodes: int = 0, cpus: int = 2) -> Iterator[Head]:
    """A head that runs for as long as the context does.

    Args:
        folder: of its token and its log.
        nodes: how many its autoscaler may start; with any, nothing runs on the head itself.
        cpus: of a node.
    """
    port, dashboard, agent, client_port = free_ports(4)
    gcs_address = f"127.0.0.1:{port}"
    temporary = tempfile.mkdtemp(prefix="gsa-")  # Unix socket paths must be short
    write_private(folder / "token", secrets.token_hex(32))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["PATH"] = f"{Path(RAY).parent}:{environment['PATH']}"  # `python` of a node is the one with our packages
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "OMP_NUM_THREADS": "1"}
    address = f"http://127.0.0.1:{dashboard}"
    environment["RAY_API_SERVER_ADDRESS"] = address  # Ray's own actors ask it, and guess among several heads
    command = [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += ["--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", f"--temp-dir={temporary}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client_port}"]
    command += ["--include-dashboard=true", "--disable-usage-stats", "--object-store-memory=100000000"]
    command += [f"--num-cpus={0 if nodes else cpus}"]
    if nodes:
        environment |= ENVIRONMENT
        write_configuration(folder / "nodes.yaml", nodes, cpus, gcs_address, temporary)
        command += [f"--autoscaling-config={folder / 'nodes.yaml'}"]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        wait_for(lambda: answers(address))
        client = {key: value for key, value in environment.items() if key not in ENVIRONMENT}
        yield Head(client | {"RAY_ADDRESS": address}, gcs_address, Path(temporary))
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=60)
        for one in alive:
            one.kill()
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def link_project(folder: Path) -> None:
    """Put what a job needs of this project in a folder that is uploaded."""
    for part in ("gsa", "kernels", "ray_jobs"):
        (folder / part).symlink_to(ROOT / part)


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=1).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
