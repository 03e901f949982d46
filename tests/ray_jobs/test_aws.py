"""Ray's own AWS node provider, on our files, against moto's AWS: up, grow, shrink, a node that is taken away."""

import copy
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError
from moto import mock_aws
from ray.autoscaler._private import providers
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws import node_provider, utils
from ray.autoscaler._private.cli_logger import cli_logger
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import NODE_KIND_HEAD, NODE_KIND_WORKER, TAG_RAY_NODE_KIND

from ray_jobs.aws import launched, node_tags
from tests.ray_jobs.commands import ROOT

pytestmark = pytest.mark.slow
INSTANCE_TYPES = functools.cache(node_provider.list_ec2_instances)  # moto takes seconds for its list, each time
SSH_FROM = "203.0.113.7/32"
Config = dict[str, Any]


@pytest.fixture(scope="module")
def file() -> Config:
    found: Config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return found


@pytest.fixture
def account(file: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An account with our stack in it; gives its EC2."""
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps keys there
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(cli_logger, "_print", lambda *_, **__: None)
    monkeypatch.setattr(node_provider, "list_ec2_instances", INSTANCE_TYPES)
    with mock_aws():
        forget()
        region = file["provider"]["region"]
        ec2 = boto3.client("ec2", region)
        zones = file["provider"]["availability_zone"].split(",")
        subnets = {one["AvailabilityZone"]: one for one in ec2.describe_subnets()["Subnets"]}
        values = {"SshFrom": SSH_FROM, "Vpc": subnets[zones[0]]["VpcId"]}
        values |= {f"Subnet{letter}": subnets[zone]["SubnetId"] for letter, zone in zip("ABC", zones, strict=True)}
        boto3.client("cloudformation", region).create_stack(
            StackName="gsa",
            TemplateBody=(ROOT / "configs/cluster/aws-account.yaml").read_text(),
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in values.items()],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
        yield ec2
        forget()


def forget() -> None:
    """What Ray remembers of an account, for the life of a process."""
    utils.resource_cache.cache_clear()
    utils.client_cache.cache_clear()
    aws_config._get_subnets_or_die.cache_clear()
    providers._clear_provider_cache()


class Cluster:
    """As `ray up` makes it of a file, and its provider as Ray's autoscaler has it."""

    def __init__(self, file: Config) -> None:
        self.config: Config = _bootstrap_config(copy.deepcopy(file), no_config_cache=True)
        provider, name = self.config["provider"], self.config["cluster_name"]
        self.provider: Any = providers._get_node_provider(provider, name, use_cache=False)
        self.sent: list[Config] = []
        events = self.provider.ec2_fail_fast.meta.client.meta.events
        events.register_first("provide-client-params.ec2.RunInstances", self._send)
        self.full: set[str] = set()  # subnets whose zone has no capacity

    def _send(self, params: Config, **_: Any) -> Config:
        self.sent.append(copy.deepcopy(params))
        if params["SubnetId"] in self.full:
            error = {"Code": "InsufficientInstanceCapacity", "Message": "There is no spot capacity"}
            raise ClientError({"Error": error}, "RunInstances")
        return params | {"MinCount": params["MaxCount"]}  # moto starts the least that is asked for, EC2 the most

    def node_config(self, kind: str) -> Config:
        found: Config = copy.deepcopy(self.config["available_node_types"][kind]["node_config"])
        return found

    def start(self, kind: str, count: int = 1) -> list[str]:
        return list(self.provider.create_node(self.node_config(kind), node_tags(self.config, kind), count))

    def running(self, role: str = NODE_KIND_WORKER) -> set[str]:
        return set(self.provider.non_terminated_nodes({TAG_RAY_NODE_KIND: role}))


def test_up_and_grow_and_shrink_and_a_node_that_is_taken_away(file: Config, account: Any) -> None:
    cluster = Cluster(file)
    (head,) = cluster.start("head")
    assert not cluster.running()
    nodes = set(cluster.start("l40s", 2))
    assert cluster.running() == nodes
    told = account.describe_instances(InstanceIds=sorted(nodes))["Reservations"]
    instances = [one for reservation in told for one in reservation["Instances"]]
    assert {one["InstanceLifecycle"] for one in instances} == {"spot"}
    assert cluster.sent[-1]["IamInstanceProfile"] == {"Name": "gsa-ray-worker"}
    taken = nodes.pop()
    account.terminate_instances(InstanceIds=[taken])  # a spot interruption
    assert cluster.running() == nodes
    nodes |= set(cluster.start("l40s"))
    assert cluster.running() == nodes
    assert len(nodes) == 2
    cluster.provider.terminate_nodes(sorted(nodes))
    assert not cluster.running()
    assert cluster.running(NODE_KIND_HEAD) == {head}


def test_what_is_checked_is_what_is_sent(file: Config, account: Any) -> None:
    cluster = Cluster(file)
    for kind in file["available_node_types"]:
        cluster.start(kind)
        sent = cluster.sent[-1]
        expected = launched(cluster.config, kind, cluster.node_config(kind))
        for one in (sent, expected):  # the configuration's hash is no matter of EC2's
            (tags,) = [spec["Tags"] for spec in one["TagSpecifications"] if spec["ResourceType"] == "instance"]
            tags.sort(key=lambda tag: str(tag["Key"]))
        assert sent == expected
        assert sent["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in sent["BlockDeviceMappings"])
        assert ("InstanceMarketOptions" in sent) == (kind != "head")


def test_nothing_enters_but_ssh_from_one_network(file: Config, account: Any) -> None:
    config = Cluster(file).config
    groups = {
        group for one in config["available_node_types"].values() for group in one["node_config"]["SecurityGroupIds"]
    }
    (found,) = account.describe_security_groups(GroupIds=sorted(groups))["SecurityGroups"]
    assert found["GroupName"] == "gsa-ray"
    entries = {
        (rule["IpProtocol"], rule.get("FromPort"), rule.get("ToPort"), source.get("CidrIp", source.get("GroupId")))
        for rule in found["IpPermissions"]
        for source in [*rule["IpRanges"], *rule["UserIdGroupPairs"]]
    }
    assert entries == {("tcp", 22, 22, SSH_FROM), ("-1", None, None, found["GroupId"])}


def test_a_zone_without_capacity_is_passed_over(file: Config, account: Any) -> None:
    cluster = Cluster(file)
    zones = cluster.node_config("l40s")["SubnetIds"]
    assert len(zones) == 3
    cluster.full = set(zones[:2])
    (node,) = cluster.start("l40s")
    assert cluster.sent[-1]["SubnetId"] == zones[2]
    assert cluster.running() == {node}
    cluster.full = set(zones)
    with pytest.raises(NodeLaunchException, match="InsufficientInstanceCapacity"):
        cluster.start("l40s")
    assert cluster.running() == {node}


def test_the_shared_file_system_is_found_by_its_name(account: Any, capsys: pytest.CaptureFixture[str]) -> None:
    script = compile((ROOT / "configs/cluster/shared.py").read_text(), "shared.py", "exec")
    with mock.patch("sys.argv", ["shared.py", "us-east-1", "gsa"]):
        exec(script, {})
    assert capsys.readouterr().out.strip().endswith(".efs.us-east-1.amazonaws.com")
    with mock.patch("sys.argv", ["shared.py", "us-east-1", "other"]), pytest.raises(SystemExit, match="are 0 file"):
        exec(script, {})
