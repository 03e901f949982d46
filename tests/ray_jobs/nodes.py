"""Nodes of a cluster on this one machine, that Ray's own autoscaler starts and ends: each is a `ray start`.

Ray's autoscaler imports this module in its own process. A node that dies is gone for it, as a spot instance is.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from ray.autoscaler.tags import NODE_KIND_WORKER, STATUS_UP_TO_DATE, TAG_RAY_NODE_KIND, TAG_RAY_NODE_STATUS

RAY = str(Path(sys.executable).with_name("ray"))
IDLE = 6.0  # seconds after which a node without work ends
# what `ray up` would have added, and a cluster on one machine has no use for
UNUSED: dict[str, Any] = {
    **dict.fromkeys(("auth", "file_mounts"), {}),
    **dict.fromkeys(("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands"), []),
    **dict.fromkeys(("cluster_synced_files", "head_start_ray_commands", "worker_start_ray_commands"), []),
    "file_mounts_sync_continuously": False,
}
# of a head whose cluster is this machine
ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",  # as `ray up` and KubeRay do
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "PYTHONPATH": str(Path(__file__).parents[2]),
}


def configuration(most: int, cpus: int, gcs_address: str, folder: str) -> dict[str, Any]:
    """Zero to `most` nodes of so many CPUs, and a head on which nothing runs."""
    provider: dict[str, Any] = {
        "type": "external",
        "module": "tests.ray_jobs.nodes.LocalNodes",
        "gcs_address": gcs_address,
        "folder": folder,
    }
    provider |= {"head_node_id": FAKE_HEAD_NODE_ID, "launch_multiple": True, "disable_node_updaters": True}
    return UNUSED | {
        "cluster_name": "local",
        "provider": provider,
        "max_workers": most,
        "upscaling_speed": most,
        "idle_timeout_minutes": IDLE / 60,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": cpus}, "node_config": {}, "min_workers": 0, "max_workers": most},
        },
    }


class LocalNodes(FakeMultiNodeProvider):
    def _create_node_with_resources_and_labels(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int, resources: dict[str, float], labels: Any
    ) -> None:
        with self.lock:
            node = self._next_hex_node_id()
            command = [RAY, "start", "--block", f"--address={self._gcs_address}", "--node-ip-address=127.0.0.1"]
            command += [f"--num-cpus={resources['CPU']:g}", "--object-store-memory=80000000"]
            # of its own: what a node has unpacked, it deletes when it ends
            command += [f"--temp-dir={self.provider_config['folder']}/{self._next_node_id}"]
            environment = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT}
            environment |= {"RAY_CLOUD_INSTANCE_ID": node, "RAY_NODE_TYPE_NAME": "worker"}
            with open(os.devnull, "w") as nowhere:
                process = subprocess.Popen(
                    command, env=environment, stdout=nowhere, stderr=nowhere, start_new_session=True
                )
            tags = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE} | tags
            self._nodes[node] = {"tags": tags, "process": process}  # type: ignore[dict-item]

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        with self.lock:
            for node, what in list(self._nodes.items()):
                process: Any = what.get("process")
                if process is not None and process.poll() is not None:
                    del self._nodes[node]
            found: list[str] = super().non_terminated_nodes(tag_filters)
            return found

    def _terminate_node(self, node: dict[str, Any]) -> None:
        node["process"].terminate()


def write_configuration(path: Path, most: int, cpus: int, gcs_address: str, folder: str) -> None:
    path.write_text(json.dumps(configuration(most, cpus, gcs_address, folder)))  # JSON is YAML


def running_nodes(gcs_address: str) -> list[psutil.Process]:
    """The nodes of a head that run, beside its own; each is the process that all others of it descend from."""
    wanted = {"start", "--block", f"--address={gcs_address}"}
    return [p for p in psutil.process_iter(["cmdline"]) if wanted <= set(p.info["cmdline"] or [])]


def kill_all(process: psutil.Process) -> None:
    """A process and those that descend from it, at once: as when a machine is gone."""
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
