"""Every request of `hostile` is refused with a clear error, by real servers and the command line; nothing changes."""

import base64
import contextlib
import dataclasses
import hashlib
import http.client
import itertools
import json
import os
import pickle
import re
import signal
import socket
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import boto3
import grpc  # type: ignore[import-untyped]
import psycopg2
import pytest
import torch
import yaml
from botocore.config import Config
from botocore.exceptions import ClientError
from mlflow import MlflowClient
from mlflow.entities import ViewType

from dashboards.services import BUCKET, HOST, Services, free_ports
from gsa.config import TrainConfig, build, to_yaml
from gsa.data.packing import prepare
from gsa.model import GSAForCausalLM
from gsa.training import checkpoint
from tests.dashboards import hostile
from tests.dashboards.hostile import Http, Line, Login, Rpc, Signed
from tests.draw import Draw
from tests.ray_jobs.commands import call
from tests.ray_jobs.fake_sweep import LOSS, aims, fake_sweep
from tests.ray_jobs.head import Head
from tests.ray_jobs.small import SPACE
from tests.seeds import seed_of
from tests.text import tiny

PATIENCE = 30.0  # seconds after which a request hangs
LENGTH = 2000  # characters of a clear error
TABLES: list[list[Any]] = [
    hostile.MLFLOW, hostile.ESCAPING, hostile.MALFORMED, hostile.STORE, hostile.INNER, hostile.SIGNED, hostile.LOGINS,
    hostile.STATEMENTS, hostile.HEAD, hostile.CLUSTER, hostile.COMMANDS, hostile.TEXTS,
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class World:
    """All that a request could reach."""

    services: Services
    head: Head
    folder: Path  # of the canary and of the command line
    values: dict[str, str]  # of what stands in braces
    ports: dict[str, int]

    def fill(self, text: str) -> str:
        for key, value in self.values.items():
            text = text.replace(f"{{{key}}}", value)
        return re.sub(r"\{basic:(.*?)\}", lambda found: basic(found[1]), text, flags=re.DOTALL)

    def ask_head(self, path: str) -> Any:
        url, headers = self.head.environment["RAY_ADDRESS"] + path, {"Authorization": f"Bearer {self.values['token']}"}
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=PATIENCE) as answer:
            return json.load(answer)

    def all_there_is(self) -> dict[str, Any]:
        found: dict[str, Any] = {f"file {path}": size for path, size in tree(self.folder).items()}
        kept = self.services.folder
        found |= {f"file {p}": p.stat().st_size for p in kept.iterdir() if p.is_file() and p.suffix != ".log"}
        found |= {f"entry {path}": None for path in [*kept.iterdir(), *self.head.folder.iterdir()]}
        found |= runs(MlflowClient(self.services.uri)) | objects(self.services.s3_client()) | rows(self.services)
        jobs = self.ask_head(hostile.JOBS)
        return found | {f"job {job['submission_id']}": job["entrypoint"] for job in jobs}

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[list[str]]:
        """A list of complaints, which must be empty in the end; what differs from before is added to it."""
        # what went before may have lost it
        MlflowClient(self.services.uri).log_text(self.values["run"], "kept", "kept.txt")
        before = self.all_there_is()
        complaints: list[str] = []
        yield complaints
        after = self.all_there_is()
        changed = sorted(key for key in before.keys() | after.keys() if before.get(key, "-") != after.get(key, "-"))
        complaints += [f"changed: {key}: {before.get(key, '-')} -> {after.get(key, '-')}"[:300] for key in changed]
        assert not complaints, "\n".join([f"{len(complaints)} complaints", *complaints])


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()}


def runs(client: MlflowClient) -> dict[str, Any]:
    """What MLflow's client sees."""
    found: dict[str, Any] = {}
    for experiment in client.search_experiments(ViewType.ALL):
        found[f"experiment {experiment.name}"] = (experiment.lifecycle_stage, experiment.artifact_location)
        for run in client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL):
            files = [(f.path, f.file_size) for f in client.list_artifacts(run.info.run_id)]
            found[f"run {run.info.run_id}"] = (run.info.lifecycle_stage, run.data.to_dictionary(), files)
    return found | {f"model {model.name}": len(model.latest_versions) for model in client.search_registered_models()}


def objects(client: Any) -> dict[str, Any]:
    """What is in the S3 store, and whether it can be read."""
    found: dict[str, Any] = {}
    for bucket in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        found[f"bucket {bucket}"] = None
        for key in [one["Key"] for one in client.list_objects_v2(Bucket=bucket).get("Contents", [])]:
            try:
                found[f"object {bucket}/{key}"] = client.get_object(Bucket=bucket, Key=key)["Body"].read()
            except ClientError as error:
                found[f"object {bucket}/{key}"] = str(error)
    return found


def secret(services: Services, name: str) -> str:
    return str(json.loads((services.folder / "settings.json").read_text())["secrets"][name])


def database(services: Services, user: str, password: str | None, name: str) -> Any:
    connection = psycopg2.connect(
        host=HOST, port=services.ports["postgres"], user=user, password=password, dbname=name, connect_timeout=5
    )
    connection.autocommit = True
    return connection


def rows(services: Services) -> dict[str, Any]:
    """Databases, roles, and the rows of each table."""
    found: dict[str, Any] = {}
    for name in ("mlflow", "mlflow_users"):
        with contextlib.closing(database(services, "postgres", secret(services, "postgres_admin"), name)) as connection:
            cursor = connection.cursor()
            cursor.execute("SELECT 'database ' || datname, 0 FROM pg_database")
            found |= dict(cursor.fetchall())
            cursor.execute("SELECT 'role ' || rolname, rolsuper FROM pg_roles")
            found |= dict(cursor.fetchall())
            cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
            for (table,) in cursor.fetchall():
                cursor.execute(f'SELECT count(*) FROM "{table}"')  # noqa: S608 - a name that the database gave
                found[f"rows of {name}.{table}"] = cursor.fetchone()[0]
    return found


def basic(who: str) -> str:
    return "Basic " + base64.b64encode(who.encode()).decode()


@pytest.fixture(scope="module")
def world(services: Services, ray_head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    head, folder = ray_head, tmp_path_factory.mktemp("outside")
    canary = folder / "canary"
    canary.write_text("sings")
    with pytest.MonkeyPatch.context() as patch:
        for key in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            patch.setenv(key, services.credentials[key])
        client = MlflowClient(services.uri)
        known = client.get_experiment_by_name("gsa")
        experiment = known.experiment_id if known is not None else client.create_experiment("gsa")
        run = client.create_run(experiment, run_name="kept").info.run_id
        client.log_metric(run, "loss", 1.0)
        client.log_text(run, "kept", "kept.txt")
        listed = services.s3_client().list_objects_v2(Bucket=BUCKET)["Contents"]
        (kept,) = [one["Key"] for one in listed if run in one["Key"]]
        password = services.credentials["MLFLOW_TRACKING_PASSWORD"]
        token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        values = {"password": password, "basic": basic(f"gsa:{password}"), "run": run, "kept": kept, "token": token}
        values |= {"canary": str(canary), "folder": str(folder), "nobody": f"http://{HOST}:{free_ports(1)[0]}"}
        values |= {"mlflow": str(services.ports["mlflow"])}
        ports = services.ports | {"dashboard": int(head.environment["RAY_ADDRESS"].rpartition(":")[2])}
        ports |= {"gcs": int(head.gcs_address.rpartition(":")[2])}
        found = World(services, head, folder, values, ports)
        (node,) = found.ask_head("/api/v0/nodes")["data"]["result"]["result"]
        values["node"] = node["node_id"]
        (agent,) = (head.folder / "session_latest").glob("dashboard_agent_listen_port_*")
        ports["agent"] = int(agent.read_text())
        yield found


# one request of each kind: what is to complain of


def complaint_of_http(world: World, row: Http) -> str | None:
    port, body = world.ports[row.port], world.fill(row.body).encode()
    body = body.replace(b"#", b"[" * row.repeat if row.body == "#" and row.repeat < hostile.MIB else b"a" * row.repeat)
    headers = {"Host": f"{HOST}:{port}", "Connection": "close", "Content-Length": str(len(body))}
    headers |= {key: world.fill(value) for key, value in row.headers.items()}
    lines = [f"{row.method} {world.fill(row.path)} HTTP/1.1", *(f"{key}: {value}" for key, value in headers.items())]
    try:
        with socket.create_connection((HOST, port), timeout=PATIENCE) as connection:
            with contextlib.suppress(ConnectionError):  # who refuses need not read all of it
                connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
            answer = http.client.HTTPResponse(connection, method=row.method)
            answer.begin()
            status, said = answer.status, answer.read()
    except http.client.RemoteDisconnected:
        status, said = hostile.NOTHING, b""
    except (OSError, http.client.HTTPException) as error:
        return f"{row}: no answer, {error!r}"
    if status not in row.refused or b"Traceback" in said:
        return f"{row}: {status} {said[:200]!r}"
    return None


def complaint_of_rpc(world: World, row: Rpc) -> str | None:
    metadata = None if row.token is None else [("authorization", f"Bearer {row.token}")]
    target = f"{HOST}:{world.ports[row.port]}"
    authority = (world.services.folder / "certificates/ca.pem").read_bytes()
    secure = grpc.ssl_channel_credentials(authority)
    with grpc.secure_channel(target, secure) if row.tls else grpc.insecure_channel(target) as channel:
        try:
            answer = channel.unary_unary(row.method)(row.body, timeout=PATIENCE, metadata=metadata)
        except grpc.RpcError as error:
            # where TLS is asked for, a channel without it is never there
            refused = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE)
            return None if error.code() in refused else f"{row}: {error.code()} {error.details()}"
    return f"{row}: answers {answer[:200]!r}"


def complaint_of_signed(world: World, row: Signed) -> str | None:
    services = world.services
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{HOST}:{services.ports['s3']}",
        aws_access_key_id=row.key.replace("{}", secret(services, "s3_mlflow_access_key")),
        aws_secret_access_key=row.secret.replace("{}", secret(services, "s3_mlflow_secret_key")),
        region_name="us-east-1",
        config=Config(connect_timeout=5, read_timeout=PATIENCE, retries={"total_max_attempts": 1}),
    )
    try:
        answer = getattr(client, row.operation)(**row.arguments)
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        return None if status in row.refused else f"{row}: {status} {error}"
    return f"{row}: answers {str(answer)[:200]}"


def complaint_of_login(world: World, row: Login) -> str | None:
    password = row.password and row.password.replace("{}", secret(world.services, "postgres"))
    try:
        database(world.services, row.user, password, row.database).close()
    except psycopg2.OperationalError:
        return None
    return f"{row}: came in"


def complaint_of_statement(world: World, row: str) -> str | None:
    connection = database(world.services, "mlflow", secret(world.services, "postgres"), "mlflow")
    try:
        with contextlib.closing(connection), connection.cursor() as cursor:
            cursor.execute(world.fill(row))
    except psycopg2.errors.InsufficientPrivilege:
        return None
    return f"{row}: was done"


class Hangs(BaseException):
    """Nothing that a command line would catch."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `Hangs` in what takes longer."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Hangs

    handler = signal.signal(signal.SIGALRM, end)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)  # the test's own limit uses it too
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, handler)


def complaint_of_line(world: World, capsys: pytest.CaptureFixture[str], row: Line) -> str | None:
    arguments = [world.fill(argument) for argument in row.arguments]
    shown = " ".join(map(repr, arguments))[:200]
    try:
        with at_most(PATIENCE):
            code, output, said = call(capsys, *arguments)
    except Hangs:
        return f"{shown}: does not end"
    except Exception as error:  # noqa: BLE001 - whatever it is, it should have been one line
        return f"{shown}: Traceback, {type(error).__name__}: {str(error)[:200]!r}"
    lines = said.splitlines()
    found = [line for line in lines if line.startswith("error: ") or "Error" in line]
    clear = code == 2 and len(found) == 1 and world.fill(row.word) in said and "Traceback" not in said
    if not clear or len(said) > LENGTH or re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said):
        return f"{shown}: exit code {code}, {len(said)} characters, without {row.word!r}?: {(said or output)[:300]!r}"
    return None


def complaints_of(ask: Callable[..., str | None], world: World, rows: Iterable[Any]) -> list[str]:
    return [complaint for row in rows if (complaint := ask(world, row)) is not None]


# the tables


def test_there_are_enough_of_them_and_none_twice() -> None:
    shown = [repr(row) for row in itertools.chain(*TABLES)]
    assert len(shown) == len(set(shown))
    assert len(shown) >= 300


@pytest.mark.parametrize("table", ["MLFLOW", "ESCAPING", "MALFORMED"])
def test_mlflow_refuses(world: World, table: str) -> None:
    with world.unchanged() as complaints:
        complaints += complaints_of(complaint_of_http, world, getattr(hostile, table))


def test_the_artifact_store_refuses(world: World) -> None:
    with world.unchanged() as complaints:
        complaints += complaints_of(complaint_of_signed, world, hostile.SIGNED)
        complaints += complaints_of(complaint_of_http, world, hostile.STORE)


def test_what_the_artifact_store_says_to_itself_nobody_else_may_say(world: World) -> None:
    own = [(world.services.folder / "certificates" / name).read_bytes() for name in ("ca.pem", "key.pem", "cert.pem")]
    with grpc.secure_channel(f"{HOST}:{world.ports['master_grpc']}", grpc.ssl_channel_credentials(*own)) as channel:
        row = hostile.INNER[0]
        assert b"mlflow" in channel.unary_unary(row.method)(row.body, timeout=PATIENCE)
    with world.unchanged() as complaints:
        complaints += complaints_of(complaint_of_rpc, world, hostile.INNER)


def test_the_database_refuses(world: World) -> None:
    with world.unchanged() as complaints:
        complaints += complaints_of(complaint_of_login, world, hostile.LOGINS)
        complaints += complaints_of(complaint_of_statement, world, hostile.STATEMENTS)


def test_a_ray_head_refuses(world: World) -> None:
    with world.unchanged() as complaints:
        complaints += complaints_of(complaint_of_http, world, hostile.HEAD)
        complaints += complaints_of(complaint_of_rpc, world, hostile.CLUSTER)


@pytest.fixture(scope="module")
def files(world: World) -> World:
    """The command line's folder, with a sweep in its store."""
    folder = world.folder
    train = tiny(folder)
    (folder / "train.yaml").write_text(yaml.safe_dump(train))
    sweep = {"train": train, "space": SPACE, "num_samples": 2, "scheduler": {"kind": "none"}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    (folder / "linked.yaml").symlink_to(world.services.folder / "settings.json")
    os.mkfifo(folder / "pipe")
    fake_sweep(folder / "runs", Draw(seed_of("hostile")), ["finished"], aims(LOSS))
    prepare(build(TrainConfig, train).data, folder / "runs/data")
    return world


def test_the_command_line_refuses_hostile_arguments(files: World, capsys: pytest.CaptureFixture[str]) -> None:
    with files.unchanged() as complaints:
        complaints += [c for row in hostile.COMMANDS if (c := complaint_of_line(files, capsys, row)) is not None]


def test_the_command_line_refuses_hostile_configurations(files: World, capsys: pytest.CaptureFixture[str]) -> None:
    for text in hostile.TEXTS:
        content = text.content.replace(b"{canary}", files.values["canary"].encode())
        (files.folder / f"{text.name}.yaml").write_bytes(content)
    with files.unchanged() as complaints:
        for text in hostile.TEXTS:
            # should it be taken after all, nothing is trained
            row = Line(("train", f"{{folder}}/{text.name}.yaml", "storage=/proc/nowhere"), text.word)
            complaints += [c for c in [complaint_of_line(files, capsys, row)] if c is not None]


@pytest.mark.parametrize("password", [None, "", "password1234"])
def test_the_command_line_is_refused_without_the_password(
    files: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, password: str | None
) -> None:
    uri, runs = files.services.uri, str(files.folder / "runs")
    with files.unchanged() as complaints, monkeypatch.context() as patch:
        if password is None:
            patch.delenv("MLFLOW_TRACKING_PASSWORD")
        else:
            patch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        for arguments in (
            ("report", "kept", "--tracking-uri", uri),
            ("eval", files.values["run"], "--tracking-uri", uri),
            ("move", uri, "--storage", runs),
            ("train", str(files.folder / "train.yaml"), f"tracking.uri={uri}"),
        ):
            complaint = complaint_of_line(files, capsys, Line(arguments, "not authenticated"))
            complaints += [] if complaint is None else [complaint]


class Harm:
    """Unpickled, it runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


def spoil(folder: Path, how: str, canary: Path) -> None:
    """Make a checkpoint hostile, with hashes that are right."""
    state = folder / "state.pt"
    match how:
        case "code":
            torch.save({"data": Harm(canary.with_name("harmed"))}, state)
        case "pickle":
            state.write_bytes(pickle.dumps(Harm(canary.with_name("harmed"))))
        case "list":
            torch.save([1], state)
        case "truncated":
            state.write_bytes(state.read_bytes()[:-100])
        case "weights":
            (folder / "model.safetensors").write_bytes(b"\xff" * 1000)
        case "settings":
            (folder / "config.yaml").write_text("name: !!python/object/apply:os.system [id]")
        case "link":
            (folder / "config.yaml").unlink()
            (folder / "config.yaml").symlink_to(canary)
        case "piped":
            state.unlink()
            state.symlink_to(canary.with_name("pipe"))
        case "folder":
            state.unlink()
            state.mkdir()
    index = json.loads((folder / "checkpoint.json").read_text())
    for path in folder.iterdir():
        if path.is_file() and path.name != "checkpoint.json":
            index["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    if how == "elsewhere":
        index["sha256"][str(canary)] = hashlib.sha256(canary.read_bytes()).hexdigest()
    if how == "step":
        index["step"] = "../x"
    (folder / "checkpoint.json").write_text("[" * 100_000 if how == "deep" else json.dumps(index))


SPOILT = {
    "code": "state.pt", "pickle": "state.pt", "list": "state.pt", "truncated": "state.pt", "weights": "weights",
    "settings": "config.yaml", "link": "config.yaml", "piped": "state.pt", "folder": "state.pt",
    "elsewhere": "checkpoint.json", "step": "checkpoint.json", "deep": "checkpoint.json",
}  # fmt: skip


def test_the_command_line_refuses_hostile_checkpoints(files: World, capsys: pytest.CaptureFixture[str]) -> None:
    config = build(TrainConfig, tiny(files.folder))
    data = prepare(config.data, files.folder / "runs/data")
    config.model.vocab_size = data.tokenizer.vocab_size
    for how in SPOILT:
        folder = checkpoint.save(
            files.folder / how,
            1,
            model=GSAForCausalLM(config.model),
            state={"step": 1, "data": data.fingerprint},
            config_yaml=to_yaml(config),
            tokenizer=data.tokenizer,
            metrics={},
            keep=1,
        )
        spoil(folder, how, files.folder / "canary")
    with files.unchanged() as complaints:
        for how, word in SPOILT.items():
            row = Line(("eval", f"{{folder}}/{how}", "--storage", "{folder}/runs"), word)
            complaints += [c for c in [complaint_of_line(files, capsys, row)] if c is not None]
