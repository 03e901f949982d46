"""A cluster's file, checked without a cloud: what `ray up` would refuse, what it would pass over, and what a cloud
would refuse only when nodes are to start.

Ray's schema is held against the file as it stands, as its own preparation crashes on wrong types and moves keys about.
Kubernetes' files (RayCluster, RayJob) are read as Ray's autoscaler reads them there.
"""

import copy
import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import ray.autoscaler
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from gsa import plain
from gsa.errors import RequestError, one_line
from gsa.lines import Path as Place
from gsa.lines import dotted, doubled, line_of
from gsa.settings import nearest
from ray_jobs.capacity import Fleet, configured_fleet

Config = dict[str, Any]
SECRET = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|aws_secret_access_key|AUTH_TOKEN=\S")


@dataclasses.dataclass(frozen=True, order=True)
class Problem:
    """What is wrong in a line."""

    line: int
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


@dataclasses.dataclass(frozen=True)
class Checked:
    """A file that was read.

    Args:
        problems: in the order of their lines.
        notes: what was not checked, and why.
        fleet: its nodes; `None` where problems hide them.
    """

    problems: list[Problem]
    notes: list[str]
    fleet: Fleet | None


def check(path: Path) -> Checked:
    """Check a cluster's file.

    Raises:
        RequestError: it cannot be read.
    """
    try:
        text = plain.read_text(path)
    except (OSError, ValueError) as error:
        raise RequestError(f"--cluster {path}: cannot be read ({one_line(error)})") from error
    try:
        root = plain.compose(text, first=True)
        config = plain.construct(root)
    except plain.PlainError as error:
        return Checked([Problem(error.line, "", f"is not YAML that can be read as plain data ({error})")], [], None)
    if not isinstance(config, dict):
        return Checked([Problem(1, "", "must be a mapping")], [], None)
    found = [
        Problem(line, dotted(place), f"is there twice, first in line {first}") for place, line, first in doubled(root)
    ]
    found += [
        Problem(number, "", "a secret does not belong in this file")
        for number, line in enumerate(text.splitlines(), 1)
        if SECRET.search(line)
    ]
    kind = _kubernetes if config.get("kind") in ("RayCluster", "RayJob") else _launcher
    fleet, notes = None, []
    for step in kind(config):
        if isinstance(step, Fleet):
            fleet = step
        elif isinstance(step, str):
            notes.append(step)
        else:
            place, message = step
            found.append(Problem(line_of(root, place), dotted(place), message))
    return Checked(sorted(set(found)), notes, None if found else fleet)


Step = tuple[Place, str] | str | Fleet  # a problem, a note, or what nodes there may be


def _launcher(config: Config) -> Iterator[Step]:
    """A file of `ray up`."""
    provider = config.get("provider")
    kind = provider.get("type") if isinstance(provider, dict) else None
    wrong = list(_against_schema(config, kind))
    yield from wrong
    if wrong:
        return
    prepared, refused = _prepared(config)
    if prepared is None:
        yield refused
        return
    if kind == "aws":
        yield from _aws(prepared)
    else:
        yield f"what {kind} itself would refuse is not known here: only Ray's own rules were checked"
    for name, node in prepared["available_node_types"].items():
        least, most = node.get("min_workers", 0), min(node.get("max_workers", math.inf), prepared["max_workers"])
        if least > most:  # of which Ray says nothing
            yield ("available_node_types", name, "min_workers"), f"{least} is more than the {most} that there may be"
    unknown = [name for name, node in prepared["available_node_types"].items() if not node.get("resources")]
    for name in unknown:
        message = "is missing: Ray asks the cloud for it, so that what fits cannot be checked here"
        yield ("available_node_types", name, "resources"), message
    if not unknown:
        yield configured_fleet(prepared)


def _against_schema(config: Config, kind: str | None) -> Iterator[tuple[Place, str]]:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    for error in jsonschema.Draft7Validator(schema).iter_errors(config):
        place: Place = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            known, patterns = list(error.schema.get("properties", {})), error.schema.get("patternProperties", {})
            for key in error.instance:
                if key not in known and not any(re.search(pattern, str(key)) for pattern in patterns):
                    yield (*place, key), f"is no key of Ray's{nearest(str(key), known)}"
        elif error.validator == "required":
            for key in error.validator_value:
                filled = kind == "aws" and key == "resources" and len(place) == 2  # Ray asks EC2
                if key not in error.instance and not filled:
                    yield (*place, key), "is missing"
        else:
            yield place, error.message


def _prepared(config: Config) -> tuple[Config | None, tuple[Place, str]]:
    """The file with Ray's defaults, or what Ray's own code says against it."""
    try:
        prepared: Config = prepare_config(copy.deepcopy(config))
        for node in prepared["available_node_types"].values():
            node.setdefault("resources", {})
        validate_config(prepared)
    except (ValueError, RuntimeError) as error:
        said = one_line(error)
        known: dict[str, Place] = {"node provider": ("provider", "type"), "`head_node_type`": ("head_node_type",)}
        known["max_workers"] = ("max_workers",)
        return None, (next((place for words, place in known.items() if words in said), ()), said)
    return prepared, ((), "")


def _aws(config: Config) -> Iterator[Step]:
    if importlib.util.find_spec("boto3") is None:
        yield "what would be sent to EC2 was not checked: pip install boto3"
        return
    from ray_jobs import aws

    yield from aws.problems(config)


def _kubernetes(config: Config) -> Iterator[Step]:
    """A RayCluster, or the one in a RayJob."""
    at: Place = ("spec", "rayClusterSpec") if config["kind"] == "RayJob" else ("spec",)
    spec: Any = config
    for key in at:
        spec = spec.get(str(key)) if isinstance(spec, dict) else None
    if not isinstance(spec, dict):
        yield at, "is missing"
        return
    yield "what Kubernetes itself would refuse is not known here: kubectl apply --dry-run=server says it"
    wanted: list[tuple[Place, bool, str]] = [
        (("enableInTreeAutoscaling",), spec.get("enableInTreeAutoscaling") is True, "must be true: nothing grows"),
        (("authOptions",), _at(spec, "authOptions", "mode") == "token", "must be {mode: token}: anyone may submit"),
        (
            ("headGroupSpec", "rayStartParams", "num-cpus"),
            _at(spec, "headGroupSpec", "rayStartParams", "num-cpus") == "0",
            'must be "0": trials run on the head',
        ),
    ]
    for place, right, message in wanted:
        if not right:
            yield (*at, *place), message
    try:
        resource = {"metadata": {"name": "checked", "namespace": "default"}, "spec": spec}
        yield configured_fleet(_derive_autoscaling_config_from_ray_cr(resource))
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, AssertionError) as error:
        yield at, f"Ray's autoscaler cannot read it ({type(error).__name__}: {one_line(error)})"


def _at(config: Mapping[str, Any], *path: str) -> Any:
    found: Any = config
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
