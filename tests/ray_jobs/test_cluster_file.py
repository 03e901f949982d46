"""Every wrong line of a cluster's file is named, with its number, before anything is started."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from cfnlint.api import lint_all

from gsa.lines import dotted, doubled, line_of
from ray_jobs.capacity import Fleet
from ray_jobs.cluster_file import check
from ray_jobs.doctor import examine_cluster
from tests.draw import Draw
from tests.ray_jobs.commands import ROOT, call
from tests.ray_jobs.small import write_sweep

pytestmark = pytest.mark.slow  # files are checked by the schemas of Ray, Kubernetes and AWS

CLUSTERS = ["cluster.yaml", "configs/cluster/gcp.yaml", "configs/cluster/kuberay.yaml", "configs/cluster/rayjob.yaml"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_our_own_files_are_right(name: str) -> None:
    checked = check(ROOT / name)
    assert not checked.problems
    assert checked.fleet is not None
    assert checked.fleet.standing[0].resources["CPU"] == 0  # no trial on the head
    assert all(node.resources["GPU"] for node in checked.fleet.growing)


def test_our_account_is_what_cloudformation_takes() -> None:
    found = lint_all((ROOT / "configs/cluster/aws-account.yaml").read_text())
    assert not [match for match in found if match.rule.severity != "informational"]


@pytest.mark.parametrize("name", CLUSTERS[:2])
def test_what_a_node_is_told_to_run_is_shell(name: str) -> None:
    config = yaml.safe_load((ROOT / name).read_text())
    told = [line for key, lines in config.items() if key.endswith("_commands") for line in lines]
    assert len(told) > 8
    for line in told:
        subprocess.run(["bash", "-n", "-c", line], check=True)


# text, what to put in its place, the key that is named, words of the message
MISTAKES = [
    ("max_workers: 8  ", "max_worker: 8  ", "max_worker", "did you mean 'max_workers'"),
    ("max_workers: 2", "max_worker: 2", "available_node_types.l40s-4.max_worker", "did you mean 'max_workers'"),
    ("max_workers: 2", 'max_workers: "2"', "available_node_types.l40s-4.max_workers", "is not of type 'integer'"),
    ("{CPU: 0}", "{CPU: 0.5}", "available_node_types.head.resources.CPU", "0.5 is not of type 'integer'"),
    ("min_workers: 0\n    max_workers: 2", "min_workers: 3\n    max_workers: 2", "l40s-4.min_workers", "3 is more"),
    ("head_node_type: head", "head_node_type: hed", "head_node_type", "must be one of"),
    ("type: aws", "type: awss", "provider.type", "awss"),
    ("region: us-east-1", "regoin: us-east-1", "provider.regoin", "did you mean 'region'"),
    ("region: us-east-1", "region: us-east-7", "provider.region", "is no region"),
    ("us-east-1b", "us-west-2b", "provider.availability_zone", "'us-west-2b' is no zone of us-east-1"),
    ("nodes: false", "nodes: true", "provider.cache_stopped_nodes", "spot"),
    ("InstanceType: g6e.12x", "InstanceTyp: g6e.12x", "l40s-4.node_config.InstanceTyp", "did you mean 'InstanceType'"),
    ("InstanceType: g6e.12xlarge", "InstanceType: g6e.12xlarg", "l40s-4.node_config.InstanceType", "'g6e.12xlarge'"),
    ("{MarketType: spot}", "{MarketType: spott}", "l40s.node_config.InstanceMarketOptions.MarketType", "mean 'spot'"),
    ("VolumeSize: 150", 'VolumeSize: "150"', "head.node_config.BlockDeviceMappings[0].Ebs.VolumeSize", "Invalid type"),
    ("VolumeSize: 150", "VolumeSiz: 150", "head.node_config.BlockDeviceMappings[0].Ebs.VolumeSiz", "did you mean"),
    ("{Name: gsa-ray-head}", "gsa-ray-head", "head.node_config.IamInstanceProfile", "Invalid type"),
    ("      ImageId: &image", "      ImagId: &image", "head.node_config.ImagId", "did you mean 'ImageId'"),
    ("      ImageId: *image\n      IamInstanceProfile: &worker", "      IamInstanceProfile: &worker",
     "l40s.node_config.ImageId", "is missing"),
    ("GroupName: gsa-ray", "GroupName: gsa-ray\n    IpPermissions: [{FromPort: x}]",
     "provider.security_group.IpPermissions[0].FromPort", "Invalid type"),
    ("    resources: {CPU: 48, GPU: 4, \"accelerator_type:L40S\": 1}\n", "", "l40s-4.resources", "is missing"),
    ("  ssh_user: ubuntu", "  ssh_user: ubuntu\n  ssh_private_key: ~/.ssh/k.pem", "node_config.KeyName", "is missing"),
    ("cluster_name: gsa", "cluster_name: gsa\ncluster_name: other", "cluster_name", "is there twice, first in line 5"),
    ("cluster_name: gsa", "cluster_name: gsa # AKIAIOSFODNN7EXAMPLE", "", "a secret does not belong"),
    ("auth:\n", "auth\n", "", "is not YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "key", "words"), MISTAKES)
def test_the_line_that_is_wrong_is_named(tmp_path: Path, old: str, new: str, key: str, words: str) -> None:
    text = (ROOT / "cluster.yaml").read_text()
    assert old in text
    (tmp_path / "cluster.yaml").write_text(text.replace(old, new, 1))
    checked = check(tmp_path / "cluster.yaml")
    assert checked.fleet is None
    found = [problem for problem in checked.problems if problem.key.endswith(key) and words in problem.message]
    assert found, checked.problems
    if "is missing" in words or words == "is not YAML":
        return  # the line is that of what it is missing from
    both = zip(text.splitlines(), text.replace(old, new, 1).splitlines(), strict=False)
    changed = next(number for number, (before, after) in enumerate(both, 1) if before != after)
    assert {changed, changed + 1} & {problem.line for problem in found}


KUBERNETES = [
    ("enableInTreeAutoscaling: true", "enableInTreeAutoscaling: false", "spec.enableInTreeAutoscaling"),
    ("authOptions: {mode: token}", "authOptions: {}", "spec.authOptions"),
    ('num-cpus: "0"', 'num-cpus: "4"', "spec.headGroupSpec.rayStartParams.num-cpus"),
    ("maxReplicas: 8", "maxReplica: 8", "spec"),
]


@pytest.mark.parametrize(("old", "new", "key"), KUBERNETES)
def test_kubernetes_files_too(tmp_path: Path, old: str, new: str, key: str) -> None:
    text = (ROOT / "configs/cluster/kuberay.yaml").read_text()
    assert old in text
    (tmp_path / "k.yaml").write_text(text.replace(old, new, 1))
    assert [problem.key for problem in check(tmp_path / "k.yaml").problems] == [key]


def test_what_no_node_can_hold_is_refused_with_the_sweeps_own_key(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_sweep(tmp_path, 0)
    ask = ("doctor", "--cluster", str(ROOT / "cluster.yaml"), "--sweep", str(path))
    code, output, _ = call(capsys, *ask)
    assert code == 0
    sweep: dict[str, Any] = yaml.safe_load(path.read_text())
    sweep["train"]["workers"] = {"num_workers": 9, "gpus_per_worker": 8}
    path.write_text(yaml.safe_dump(sweep))
    assert call(capsys, *ask)[0] == 1
    (wrong,) = [finding for finding in examine_cluster(ROOT / "cluster.yaml", [path]) if finding.ok is False]
    assert "train.workers.num_workers = 9: can never be scheduled: the cluster holds 1 workers" in wrong.detail


def test_lines_are_those_of_the_text(draw: Draw) -> None:
    """Against a file that is written with each scalar's own line as its value."""
    pick = draw.random

    def write(depth: int, indent: int, lines: list[str], path: tuple[str | int, ...], places: dict[Any, int]) -> None:
        for i in range(pick.randint(1, 4)):
            key = f"k{i}"
            if depth and pick.random() < 0.6:
                lines.append(" " * indent + f"{key}:")
                places[*path, key] = len(lines)
                write(depth - 1, indent + 2, lines, (*path, key), places)
            else:
                lines.append(" " * indent + f"{key}: {i}")
                places[*path, key] = len(lines)
            if pick.random() < 0.3:
                lines.append("# a comment")

    for _ in range(50):
        lines: list[str] = []
        places: dict[Any, int] = {}
        write(4, 0, lines, (), places)
        root = yaml.compose("\n".join(lines), yaml.SafeLoader)
        for path, line in places.items():
            assert line_of(root, path) == line
            assert line_of(root, (*path, "nothing")) == line
        assert not list(doubled(root))


def test_a_merged_key_has_the_line_that_it_was_written_in() -> None:
    root = yaml.compose("a: &x\n  b: 1\n  c: 2\nd:\n  <<: *x\n  c: 3\n  c: 4\n", yaml.SafeLoader)
    assert [line_of(root, ("d", "b")), line_of(root, ("d", "c"))] == [2, 7]
    assert list(doubled(root)) == [(("d", "c"), 7, 6)]
    assert dotted(("a", 0, "b", "c")) == "a[0].b.c"


def test_a_fleet_is_only_told_of_a_file_that_is_right(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("- a list")
    assert check(tmp_path / "c.yaml").fleet is None
    assert isinstance(check(ROOT / "cluster.yaml").fleet, Fleet)
