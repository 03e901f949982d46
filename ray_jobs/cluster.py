"""The Ray cluster: started in this process, or joined; and whether a run can ever fit on it."""

import logging
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray._common.usage.usage_constants import KUBERAY_ENV
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gsa.errors import ConfigError, RequestError, one_line
from gsa.training.workers import WorkersConfig
from ray_jobs.capacity import Fleet, NodeType, configured_fleet
from ray_jobs.sessions import session_folder
from ray_jobs.signals import stops_held
from ray_jobs.tokens import use_a_token
from ray_jobs.watchdog import connected_cluster

logger = logging.getLogger(__name__)

NODE_GROUP = "ray.io/node-group"  # Ray's label of a node: its type
PROBE = 30  # seconds that a node has to say what its GPUs are


@contextmanager
def running(again: str = "") -> Iterator[None]:
    """Join the cluster that `RAY_ADDRESS` names (a submitted job has it set), or start one on this machine.

    What this starts, it stops; signals that end a command do not reach it, so that trials can save.

    Args:
        again: the command that goes on where the cluster dies.

    Raises:
        RequestError: no cluster answers at that address, or Ray's sockets have no place.
        InfrastructureError: the cluster has died while the block ran.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # 2 s: a nested trainer starts much later
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # MLflow holds the metrics
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "60")  # nobody restores from Tune's own state
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a trial that failed reports why, not a loss
    # Tune looks for result files that it was told not to write
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    # that Tune's own state is not saved, on a full disk, is no loss: a sweep has its record
    logging.getLogger("ray.tune.execution.experiment_state").setLevel(logging.CRITICAL)
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
        use_a_token()
        # nothing large goes through the object store: text is memory-mapped, checkpoints are files
        with stops_held():
            ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                object_store_memory=200_000_000,
                _temp_dir=session_folder(),
            )
    with connected_cluster(again):
        yield


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


def fleet() -> Fleet:
    """The nodes of this cluster, and those that it may grow by."""
    config = _autoscaling()
    if config is not None:
        return configured_fleet(config)
    alive = [node for node in ray.nodes() if node["Alive"]]
    return Fleet([NodeType(node["Labels"].get(NODE_GROUP, "default"), node["Resources"], 1) for node in alive])


def _autoscaling() -> dict[str, Any] | None:
    """What this cluster's autoscaler was told; `None` where nothing scales.

    Ray tells it to nobody else (its `get_max_resources_from_cluster_config` answers on Anyscale alone). The autoscaler
    runs on the head, as jobs do.
    """
    own = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        for word in words if own in words else []:
            key, _, path = word.partition("=")
            if key == "--autoscaling-config":
                config: dict[str, Any] = yaml.safe_load(Path(path).expanduser().read_text())
                return config
    return None


def concurrent_runs(nodes: Fleet, workers: WorkersConfig, key: str = "workers", asked: int | None = None) -> int:
    """How many runs of this size the cluster holds at once.

    Args:
        nodes: of the cluster.
        key: of `workers` in the configuration.
        asked: how many at most.

    Raises:
        ConfigError: not even one; it would wait for ever.
    """
    if KUBERAY_ENV in os.environ:  # its autoscaler runs beside the head, and knows what it may start from Kubernetes
        if asked is None:
            allowed = "must be set on Kubernetes, where Ray does not tell how many nodes there may be"
            raise ConfigError("max_concurrent_trials", None, allowed)
        return asked
    room = nodes.runs(workers, key)
    return min(room, asked or room)
