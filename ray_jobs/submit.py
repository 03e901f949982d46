"""A sweep as a Ray job: checked here, run on a cluster, followed from here.

The job goes on whatever becomes of who submitted it. `ray job list`, `logs` and `stop` know it by its id.
"""

import asyncio
import dataclasses
import logging
import os
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import aiohttp
import ray
import requests
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.runtime_env.packaging import create_package
from ray.dashboard.modules.job.common import JobStatus
from ray.dashboard.modules.job.sdk import JobSubmissionClient
from rich.console import Console

from gsa.config import check_name
from gsa.errors import ConfigError, RequestError, RunError, one_line
from gsa.reach import unreachable
from ray_jobs.commands import command_line
from ray_jobs.space import Space
from ray_jobs.sweep import read_sweep

logger = logging.getLogger(__name__)

MIB = 2**20
STOP_SECONDS = 120  # that a stopped sweep has to end its trials and tell MLflow; Ray's own 3 cut that short
PATIENCE = 5.0  # seconds that a head has to answer
START = 60.0  # seconds after which a head that has just started takes jobs


@dataclasses.dataclass(frozen=True)
class Submission:
    """What is to run."""

    sweep: str
    storage: str  # the cluster's folder of runs
    entrypoint: str
    working_dir: Path


def new_sweep(path: Path, overrides: list[str], working_dir: Path, storage: str | None = None) -> Submission:
    """Run a new sweep.

    Args:
        path: of its configuration.
        overrides: of its settings.
        working_dir: what is uploaded.
        storage: the cluster's folder of runs; `None` is the configuration's.

    Raises:
        RequestError: the configuration is wrong, or lies outside what is uploaded.
    """
    inside = _inside(path, working_dir)
    config = read_sweep(path, overrides, storage)
    Space(config.space, dataclasses.asdict(config.train))
    options = {} if storage is None else {"--storage": storage}
    command = command_line(("python", "-m", "ray_jobs.sweep"), [inside, *overrides], options)
    return Submission(config.name, config.train.storage, command, working_dir)


def resumed_sweep(name: str, storage: str, overrides: list[str], working_dir: Path) -> Submission:
    """Continue a sweep that stands in the cluster's storage."""
    check_name("name", name)
    options = {"--resume": name, "--storage": storage}
    command = command_line(("python", "-m", "ray_jobs.cli", "sweep"), overrides, options)
    return Submission(name, storage, command, working_dir)


def submit(submission: Submission, address: str) -> tuple[JobSubmissionClient, str]:
    """Upload and start; returns the job's id.

    Raises:
        RequestError: the upload is too large, or there is no head that takes it.
    """
    client = connected(address)
    refuse_large(submission.working_dir)
    job = f"{submission.sweep}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
    environment = {
        "working_dir": str(submission.working_dir),
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
    }
    metadata = {"gsa.sweep": submission.sweep}
    deadline = time.monotonic() + START
    while True:
        try:
            client.submit_job(
                entrypoint=submission.entrypoint, submission_id=job, runtime_env=environment, metadata=metadata
            )
            break
        except (RuntimeError, requests.RequestException) as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise RequestError(f"--address {address}: did not take the job ({one_line(error)})") from error
            time.sleep(1)
    return client, job


def follow(client: JobSubmissionClient, job: str, console: Console) -> None:
    """Print what a job prints until it ends; after a broken connection, from where that broke.

    Raises:
        RunError: it failed, was stopped, or its head has been started anew and knows it no more.
    """
    shown, away = 0, False

    async def print_rest() -> None:
        nonlocal shown
        seen = 0
        async for text in client.tail_job_logs(job):  # from the first character on
            console.print(text[max(0, shown - seen) :], end="", markup=False, highlight=False, soft_wrap=True)
            seen += len(text)
            shown = max(shown, seen)

    while True:
        try:
            asyncio.run(print_rest())
            status = client.get_job_status(job)
        except (RuntimeError, OSError, aiohttp.ClientError, requests.RequestException) as error:
            if "status code 404" in str(error):
                raise RunError(f"job {job}: the head knows it no more ({one_line(error)})") from error
            if not away:
                logger.warning("the head does not answer; the job goes on if the cluster does (%s)", one_line(error))
            away = True
            time.sleep(PATIENCE)
            continue
        away = False
        if status.is_terminal():
            break
        time.sleep(1)
    if status == JobStatus.SUCCEEDED:
        return
    reason = (client.get_job_info(job).message or "").strip().splitlines()
    raise RunError(f"job {job}: {status.value.lower()}{f' ({reason[0]})' if reason else ''}")


def connected(address: str) -> JobSubmissionClient:
    """A client of the head at an address.

    Raises:
        RequestError: none answers there, or it wants another token.
    """
    if not address.startswith(("http://", "https://")):
        raise RequestError(f"--address {address}: must be http://HOST:PORT of the head's dashboard, 8265 by default")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # else Ray takes the environment's before ours
    if reason := unreachable(address, PATIENCE):
        raise RequestError(f"--address {address}: no Ray head answers there ({reason})")
    try:
        client = JobSubmissionClient(address)
    except ray.exceptions.AuthenticationError as error:
        how = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token"
        raise RequestError(f"--address {address}: the head refused the token, or there was none; {how}") from error
    except (ConnectionError, RuntimeError, requests.RequestException) as error:
        raise RequestError(f"--address {address}: is not a Ray head ({one_line(error)})") from error
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they tell of each file that an upload leaves out
    return client


def refuse_large(working_dir: Path) -> None:
    """Raises RequestError where the upload is larger than Ray takes; it names the largest parts."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package.zip"
        create_package(str(working_dir), package, include_gitignore=True, logger=logging.getLogger("ray"))
        size, parts = package.stat().st_size, Counter[str]()
        with zipfile.ZipFile(package) as packed:
            for entry in packed.infolist():
                top, _, below = entry.filename.partition("/")
                parts[f"{top}/" if below else top] += entry.compress_size
    if size >= DASHBOARD_CLIENT_MAX_SIZE:
        largest = ", ".join(f"{name} {n / MIB:.1f} MiB" for name, n in parts.most_common(3))
        allowed = f"{size / MIB:.0f} MiB packed, Ray takes {DASHBOARD_CLIENT_MAX_SIZE / MIB:.0f}"
        raise RequestError(f"--working-dir {working_dir}: {allowed}; largest: {largest}: name them in .rayignore")


def _inside(path: Path, working_dir: Path) -> Path:
    if not working_dir.is_dir():
        raise RequestError(f"--working-dir {working_dir}: is not a folder")
    try:
        return path.resolve().relative_to(working_dir.resolve())
    except ValueError:
        raise ConfigError(
            "CONFIG", str(path), f"must be below --working-dir {working_dir}, which is uploaded"
        ) from None
