"""The Ray cluster: started in this process, or joined; and whether a run can ever fit on it."""

import logging
import math
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import ray._private.state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gsa.errors import ConfigError, RequestError, one_line
from gsa.training.workers import WorkersConfig

logger = logging.getLogger(__name__)

PROBE = 30  # seconds that a node has to say what its GPUs are


@contextmanager
def running() -> Iterator[None]:
    """Join the cluster that `RAY_ADDRESS` names (a submitted job has it set), or start one on this machine.

    What this starts, it stops.

    Raises:
        RequestError: no cluster answers at that address.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # 2 s: a nested trainer starts much later
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # MLflow holds the metrics
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "60")  # nobody restores from Tune's own state
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a trial that failed reports why, not a loss
    # Tune looks for result files that it was told not to write
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _refuse_unreachable(address)
        # a head that dies right now: Ray's own twenty tries take twelve minutes
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "2")
        try:
            ray.init(logging_level=logging.WARNING)
        except ConnectionError as error:
            hint = "where it asks for a token, set RAY_AUTH_MODE=token"
            raise RequestError(f"RAY_ADDRESS = {address!r}: no cluster to join ({one_line(error)}); {hint}") from error
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # nothing large goes through the object store: text is memory-mapped, checkpoints are files
        ray.init(
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            object_store_memory=200_000_000,
        )
    try:
        yield
    finally:
        ray.shutdown()


def _refuse_unreachable(address: str) -> None:
    """Ray itself tries for minutes before it says so."""
    scheme, _, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    if scheme not in ("", "ray") or not host or not port.isdigit():
        return  # `auto`, `local` and the like, which Ray looks into by itself
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            pass
    except OSError as error:
        raise RequestError(f"RAY_ADDRESS = {address!r}: no Ray head answers there ({one_line(error)})") from error


def worker_memory(workers: WorkersConfig) -> int | None:
    """Bytes of GPU memory for one worker: its share of the smallest GPU that is there now.

    `None` where workers have no GPU, where none is there yet, or where its driver does not tell.
    """
    share = workers.gpus_per_worker
    there = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0)]
    if not share or not there:
        return None
    ask = ray.remote(num_cpus=0, max_calls=1)(_gpu_bytes)
    nodes = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in there]
    try:
        found = ray.get([ask.options(scheduling_strategy=node).remote() for node in nodes], timeout=PROBE)
    except ray.exceptions.RayError as error:
        logger.warning("the memory of the GPUs is not known, a step will show whether trials fit (%s)", one_line(error))
        return None
    return int(min(found) * min(share, 1.0))


def _gpu_bytes() -> int:
    """Bytes of the smallest GPU of this machine, whoever uses it."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PROBE).stdout
    return min(int(line) for line in told.splitlines()) * 2**20


def concurrent_runs(workers: WorkersConfig, key: str = "workers") -> int:
    """How many runs of this size the cluster holds at once.

    Raises:
        ConfigError: not even one; it would wait for ever.
    """
    total = dict(ray.cluster_resources())
    growth = ray._private.state.state.get_max_resources_from_cluster_config()  # None where nothing scales
    for resource, most in (growth or {}).items():
        total[resource] = max(total.get(resource, 0), most)
    room = math.inf
    for name, resource, each in (
        ("cpus_per_worker", "CPU", workers.cpus_per_worker),
        ("gpus_per_worker", "GPU", workers.gpus_per_worker),
    ):
        if not each:
            continue
        there = total.get(resource, 0)
        allowed = f"the cluster has {there:g} {resource}s in all"
        if each > there:
            raise ConfigError(f"{key}.{name}", each, f"can never be scheduled: {allowed}")
        if each * workers.num_workers > there:
            needed = f"needs {each * workers.num_workers:g} {resource}s"
            raise ConfigError(f"{key}.num_workers", workers.num_workers, f"{needed} and {allowed}")
        room = min(room, there // (each * workers.num_workers))
    return max(1, int(room))
