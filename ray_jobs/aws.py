"""What Ray would send to EC2 for a cluster, checked against EC2's own description of its parameters, with no account.

The call is the one that Ray's node provider makes, taken down instead of sent. The description comes with botocore,
whose validator checks names and types, but not the values of enumerations: those are checked here.
"""

import contextlib
import copy
import io
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import boto3
from botocore.loaders import Loader
from botocore.model import ListShape, ServiceModel, Shape, StringShape, StructureShape
from botocore.validate import ParamValidator
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UNINITIALIZED,
    TAG_RAY_LAUNCH_CONFIG,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from gsa.lines import Path
from gsa.settings import nearest

Config = Mapping[str, Any]
Found = Iterator[tuple[Path, str]]

# what Ray 2.60 reads of `provider` for AWS; its schema lets any key through
PROVIDER = (
    "type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "use_external_head_ip",
    "security_group", "key_pair", "aws_credentials", "cloudwatch", "disable_node_updaters",
    "disable_launch_config_check", "foreground_node_launch", "worker_liveness_check", "module",
)  # fmt: skip


def problems(config: Config) -> Found:
    """What EC2 would refuse or Ray would pass over, of a configuration that Ray's own schema accepts."""
    provider = config["provider"]
    for key in provider.keys() - set(PROVIDER):
        yield ("provider", key), f"Ray reads no such key{nearest(key, PROVIDER)}"
    if "region" not in provider:
        yield ("provider", "region"), "is missing"
    else:
        yield from _zones(provider)
    if "aws_credentials" in provider:
        yield ("provider", "aws_credentials"), "a secret does not belong in this file: use a profile of the AWS tools"
    rules = provider.get("security_group", {}).get("IpPermissions", [])
    for path, message in refused({"IpPermissions": rules}, "AuthorizeSecurityGroupIngress"):
        yield ("provider", "security_group", *path), message
    for name in config["available_node_types"]:
        yield from _node_type(config, name)


def _zones(provider: Config) -> Found:
    region, zones = provider["region"], provider.get("availability_zone", "")
    known = boto3.session.Session().get_available_regions("ec2")
    if region not in known:
        yield ("provider", "region"), f"{region!r} is no region of EC2{nearest(str(region), known)}"
    elif not isinstance(zones, str):
        yield ("provider", "availability_zone"), "must be text, zones with commas between them"
    else:
        for zone in filter(None, (part.strip() for part in zones.split(","))):
            if not zone.startswith(region):  # Ray passes over it, if there is another
                yield ("provider", "availability_zone"), f"{zone!r} is no zone of {region}"


def _node_type(config: Config, name: str) -> Found:
    at = ("available_node_types", name, "node_config")
    own: Config = config["available_node_types"][name]["node_config"]
    asked = copy.deepcopy(dict(own))
    for key in ("MinCount", "MaxCount", "SubnetId"):
        if key in asked:
            use = ", use SubnetIds" if key == "SubnetId" else ", use min_workers and max_workers"
            yield (*at, key), f"Ray sets it itself{use}"
    if "InstanceType" not in asked and "LaunchTemplate" not in asked:
        yield (*at, "InstanceType"), "is missing"
    if "ImageId" not in asked and "LaunchTemplate" not in asked:
        yield (*at, "ImageId"), "is missing: Ray would take an image of its own, with an old Python"
    if asked.get("InstanceMarketOptions", {}) and config["provider"].get("cache_stopped_nodes", True):
        yield ("provider", "cache_stopped_nodes"), f"must be false: {name} is spot, which cannot be stopped"
    if "ssh_private_key" in config.get("auth", {}) and "KeyName" not in asked and "UserData" not in asked:
        yield (*at, "KeyName"), "is missing: auth.ssh_private_key names the private half of a pair"
    # Ray puts its own tags first, so that ours are checked in the place that they have in the file
    for path, message in refused({"TagSpecifications": asked.pop("TagSpecifications", [])}, "RunInstances"):
        yield (*at, *path), message
    subnets = asked.get("SubnetIds", ["subnet-0"])
    if not (isinstance(subnets, list) and subnets and all(isinstance(one, str) for one in subnets)):
        yield (*at, "SubnetIds"), "must be a list of subnets"
        subnets = ["subnet-0"]
    asked["SubnetIds"] = subnets  # which Ray looks up when it starts the cluster
    if "NetworkInterfaces" not in asked:
        asked.setdefault("SecurityGroupIds", ["sg-0"])
    for path, message in refused(launched(config, name, asked), "RunInstances"):
        if path[0] != "TagSpecifications":
            yield (*at, *path), message


def launched(config: Config, name: str, node_config: Config, count: int = 1) -> dict[str, Any]:
    """The parameters of RunInstances with which Ray's provider starts nodes of a type."""
    provider = AWSNodeProvider.__new__(AWSNodeProvider)  # its __init__ asks AWS for a session
    provider.provider_config, provider.cluster_name, provider.cache_stopped_nodes = {}, config["cluster_name"], False
    provider.ec2_fail_fast = taken = _Taken()
    with contextlib.redirect_stdout(io.StringIO()):  # it says that it has launched them
        provider.create_node(copy.deepcopy(dict(node_config)), node_tags(config, name), count)
    return taken.parameters


def node_tags(config: Config, name: str) -> dict[str, str]:
    """By which Ray knows a node of a type again."""
    kind = NODE_KIND_HEAD if name == config["head_node_type"] else NODE_KIND_WORKER
    return {
        TAG_RAY_NODE_KIND: kind,
        TAG_RAY_USER_NODE_TYPE: name,
        TAG_RAY_LAUNCH_CONFIG: "0",
        TAG_RAY_NODE_STATUS: STATUS_UNINITIALIZED,
        TAG_RAY_NODE_NAME: f"ray-{config['cluster_name']}-{kind}",
    }


class _Taken:
    """Stands where boto3's EC2 would."""

    def create_instances(self, **parameters: Any) -> list[Any]:
        self.parameters = copy.deepcopy(parameters)
        return []


def refused(parameters: Config, operation: str) -> Found:
    """What EC2's description of an operation says against these parameters."""
    shape = _shape(operation)
    report = ParamValidator().validate(parameters, shape)
    for error in report._errors:  # with their places; `generate_report` has them as one text
        reason, name, more = error
        path: Path = tuple(int(i) if i else key for key, i in re.findall(r"([^.\[\]]+)|\[(\d+)\]", name))
        if reason == "unknown field":
            unknown, known = more["unknown_param"], list(more["valid_names"])
            yield (*path, unknown), f"EC2 has no such parameter{nearest(unknown, known)}"
        elif reason == "missing required field":
            if more["required_name"] not in ("MinCount", "MaxCount"):
                yield (*path, more["required_name"]), "is missing"
        else:
            yield path, str(report._format_error(error))
    yield from _enumerations(parameters, shape)


def _enumerations(value: Any, shape: Shape, path: Path = ()) -> Found:
    if isinstance(shape, StructureShape) and isinstance(value, Mapping):
        for key, inner in value.items():
            if key in shape.members:
                yield from _enumerations(inner, shape.members[key], (*path, key))
    elif isinstance(shape, ListShape) and isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _enumerations(inner, shape.member, (*path, i))
    elif isinstance(shape, StringShape) and shape.enum and isinstance(value, str) and value not in shape.enum:
        yield path, f"{value!r} is none of EC2's values{nearest(value, shape.enum)}"


@cache
def _shape(operation: str) -> Any:
    return ServiceModel(Loader().load_service_model("ec2", "service-2"), "ec2").operation_model(operation).input_shape
