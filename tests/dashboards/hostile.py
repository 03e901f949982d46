"""Requests that must be refused, as data: to the shared services, to a Ray head, to the command line.

What stands in braces is filled in by the test: `{password}`, `{basic}` and `{token}` are the right ones, `{run}` and
`{node}` are there, `{canary}` is a file outside of what is served, `{folder}` the command line's own.
"""

import dataclasses
import json
from typing import Any

DENIED = frozenset({401, 403})
BAD = frozenset({400, 403, 404, 405})
SHUT = DENIED | {400}  # where TLS is asked for, plain HTTP is a bad request
NOTHING = 0  # the connection is closed without an answer
HUGE = frozenset({400, 413})
MIB = 2**20
UP = "/".join([".."] * 12)  # to the root, from wherever
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"
CREATE = "/api/2.0/mlflow/experiments/create"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
JOBS, PACKAGES, LOGS = "/api/jobs/", "/api/packages", "/api/v0/logs"
NEW = '{"name": "hostile"}'
SUBMIT = '{"entrypoint": "touch {canary}.submitted"}'


@dataclasses.dataclass(frozen=True)
class Http:
    """One request, to be sent as it stands: a client would tidy its path up."""

    port: str
    method: str
    path: str
    refused: frozenset[int]
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: str = ""
    repeat: int = 1  # of the body's `#`

    def __str__(self) -> str:
        headers = "".join(f", {key}: {value}" for key, value in self.headers.items())
        return f"{self.port} {self.method} {self.path}{headers} {self.body}"[:200]


@dataclasses.dataclass(frozen=True)
class Rpc:
    """One gRPC call without credentials, or with wrong ones; its body is a message on the wire."""

    port: str
    method: str
    body: bytes = b""
    token: str | None = None
    tls: bool = False  # without a certificate of its own


@dataclasses.dataclass(frozen=True)
class Signed:
    """One S3 request; `{}` stands for MLflow's right key or secret."""

    operation: str
    arguments: dict[str, Any]
    refused: frozenset[int]
    key: str = "{}"
    secret: str = "{}"


@dataclasses.dataclass(frozen=True)
class Login:
    """Who asks PostgreSQL for a database; `{}` stands for the right password of the user mlflow."""

    user: str
    password: str | None
    database: str = "mlflow"


@dataclasses.dataclass(frozen=True)
class Line:
    """A command line, and a word of the one line that refuses it."""

    arguments: tuple[str, ...]
    word: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A configuration, and a word of the one line that refuses it."""

    name: str
    content: bytes
    word: str


def mlflow(method: str, path: str, refused: frozenset[int] = BAD, body: str = "", **changes: Any) -> Http:
    """A request to MLflow with the right password."""
    headers = {"Authorization": "{basic}"} | ({"Content-Type": "application/json"} if body else {})
    return Http("mlflow", method, path, refused, headers | changes.pop("headers", {}), body, **changes)


def ray(method: str, path: str, refused: frozenset[int] = BAD, body: str = "", **changes: Any) -> Http:
    """A request to the Ray head with the right token."""
    headers = {"Authorization": "Bearer {token}"} | ({"Content-Type": "application/json"} if body else {})
    return Http("dashboard", method, path, refused, headers | changes.pop("headers", {}), body, **changes)


# nobody comes in without the password

STRANGERS: list[dict[str, str]] = [
    {},
    {"Authorization": ""},
    {"Authorization": "Basic "},
    {"Authorization": "Basic !!!"},
    {"Authorization": "Basic {password}"},
    {"Authorization": "Bearer {password}"},
    {"Authorization": "{basic:gsa:password1234}"},
    {"Authorization": "{basic:gsa:}"},
    {"Authorization": "{basic:admin:password1234}"},
    {"Authorization": "{basic:admin:{password}}"},
    {"Authorization": "{basic:gsa' OR '1'='1:x}"},
    {"Authorization": "{basic:gsa\0:{password}}"},
    {"Authorization": "Digest {password}"},
    {"Authorization": "Basic Z3Nh"},
    {"Cookie": "session={password}"},
    {"X-Forwarded-User": "gsa", "Remote-User": "gsa"},
]
ELSEWHERE: list[dict[str, str]] = [
    {"Host": "elsewhere.example"},
    {"Host": ""},
    {"Host": "127.0.0.1.elsewhere.example:{mlflow}"},
    {"Host": "127.0.0.1:{mlflow}@elsewhere.example"},
    {"Host": "elsewhere.example", "X-Forwarded-Host": "127.0.0.1:{mlflow}"},
]
CLOSED = [  # to whom has no password
    ("GET", "/"),
    ("GET", "/ajax-api/2.0/mlflow/experiments/search?max_results=1"),
    ("GET", "//api/2.0/mlflow/experiments/search?max_results=1"),
    ("GET", "/api/3.0/mlflow/server-info"),
    ("GET", "/ajax-api/3.0/mlflow/server-info"),
    ("HEAD", "/api/3.0/mlflow/server%2dinfo"),
    ("GET", "/get-artifact?path=kept.txt&run_uuid={run}"),
    ("GET", f"{ARTIFACTS}?path=."),
    ("PUT", f"{ARTIFACTS}/planted.txt"),
    ("DELETE", f"{ARTIFACTS}/0"),
    ("POST", "/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path=planted.txt"),
    ("POST", "/signup"),
    ("POST", "/api/2.0/mlflow/users/create"),
    ("POST", "/graphql"),
    ("POST", "/v1/traces"),
    ("POST", "/ajax-api/3.0/mlflow/assistant/message"),
    ("POST", "/ajax-api/3.0/jobs/"),
]
MLFLOW = [
    *(Http("mlflow", "GET", SEARCH, DENIED, headers) for headers in STRANGERS),
    *(Http("mlflow", "POST", CREATE, DENIED, {**h, "Content-Type": "application/json"}, NEW) for h in STRANGERS[:4]),
    *(mlflow("POST", CREATE, DENIED, NEW, headers=headers) for headers in ELSEWHERE),
    mlflow("POST", CREATE, DENIED, NEW, headers={"Origin": "http://elsewhere.example"}),
    *(Http("mlflow", method, path, DENIED, {}, '{"username": "x"}') for method, path in CLOSED),
    Http("mlflow", "GET", "/api/3.0/mlflow/server-info", DENIED, {"Authorization": "{basic:gsa:password1234}"}),
    Http("mlflow", "GET", "/health/../api/2.0/mlflow/experiments/search?max_results=1", DENIED | BAD),
    Http("mlflow", "GET", "/static-files/%2e%2e/%2e%2e/%2e%2e{canary}", DENIED | BAD),
]

# who has it may not leave the store

ESCAPES = (
    f"{UP}{{canary}}",
    f"{UP.replace('/', '%2f')}{{canary}}",
    "%2e%2e/%2e%2e/x",
    "%252e%252e/%252e%252e/x",
    "/{canary}",
    "%2f{canary}",
    "x/../../y",
    "file://{canary}",
    "C:%5cwindows",
)
LOCATIONS = (
    "file://{folder}",
    "{folder}",
    "../../x",
    "mlflow-artifacts:/../../x",
    "mlflow-artifacts://elsewhere.example:1/x",
    "sftp://127.0.0.1/x",
    "http://127.0.0.1:1/?x#y",
    "s3://elsewhere/x",
    "s3://mlflow/x",
    "mlflow-artifacts:/x/%2e%2e/%2e%2e/y",
    "mlflow-artifacts:/x\\..\\y",
    "mlflow-artifacts:/;",
    " ",
)
BLANKS = ("%00", "%20", "%09", "%c2%a0", ".", "%2e", "%201", "1%20/x")  # which some take for the folder around them,
ENDS = ("%23", "%3f", "%3b", "%2523", "%253b", "1%23", "1/%3bx")  # and URIs' paths that end there
RUN_IDS = ("../../x", "00000000000000000000000000000000", "' OR '1'='1", "<script>")
MODELS = ("../../x", "..", "a/b", ":", "", "\0")
ESCAPING = [
    *(mlflow("GET", f"{ARTIFACTS}/{path}") for path in ESCAPES),
    *(mlflow("PUT", f"{ARTIFACTS}/{path}", body="planted") for path in ESCAPES),
    *(mlflow("DELETE", f"{ARTIFACTS}/{path}") for path in ESCAPES[:4]),
    mlflow("GET", f"{ARTIFACTS}?path=../.."),
    mlflow("GET", f"{ARTIFACTS}?path={{canary}}"),
    mlflow("GET", f"{ARTIFACTS}?path=%00"),
    mlflow("PUT", f"{ARTIFACTS}/x%00y", body="planted"),
    mlflow("PUT", f"{ARTIFACTS}/.", body="planted"),
    mlflow("PUT", f"{ARTIFACTS}/x%3b", body="planted"),
    mlflow("PUT", f"{ARTIFACTS}/x//y", body="planted"),
    mlflow("GET", f"{ARTIFACTS}?path=%20"),
    mlflow("GET", f"{ARTIFACTS}?path=x%2500"),
    mlflow("GET", "/get-artifact?path=kept.txt%23&run_uuid={run}"),
    mlflow("GET", f"{ARTIFACTS}/..%5c..%5cx"),
    mlflow("POST", "/api/2.0/mlflow-artifacts/mpu/create/%2e%2e/x", body='{"path": "../x", "num_parts": 1}'),
    mlflow("GET", "/get-artifact?path=../../kept.txt&run_uuid={run}"),
    mlflow("GET", "/get-artifact?path={canary}&run_uuid={run}"),
    mlflow("POST", "/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path=../planted.txt", body="planted"),
    *(
        mlflow("POST", CREATE, body=json.dumps({"name": f"in {place}", "artifact_location": place}))
        for place in LOCATIONS
    ),
    mlflow("POST", CREATE, body='{"name": "in camels", "artifactLocation": "file://{folder}"}'),
    mlflow("POST", CREATE, body='{"name": "x", "artifact_location": "", "artifact_location": "{folder}"}'),
    *(mlflow("POST", "/api/2.0/mlflow/runs/delete", body=json.dumps({"run_id": run_id})) for run_id in RUN_IDS),
    *(mlflow("POST", "/api/2.0/mlflow/registered-models/create", body=json.dumps({"name": m})) for m in MODELS),
    mlflow(
        "POST",
        "/api/2.0/mlflow/model-versions/create",
        body='{"name": "x", "source": "file://{canary}", "run_id": "{run}"}',
    ),
    # the last: these would delete everything
    mlflow("DELETE", f"{ARTIFACTS}/..%5c..%5cx"),
    *(mlflow("DELETE", f"{ARTIFACTS}/{path}") for path in (*BLANKS, *ENDS)),
    mlflow("DELETE", f"/ajax-{ARTIFACTS[1:]}/%3b"),
]
DOUBLE = json.dumps(NEW)  # JSON in JSON, as MLflow's earliest clients sent it
NESTED = '{"name": "x", "tags": ' + "[" * 60 + "]" * 60 + "}"
MALFORMED = [
    *(
        mlflow("POST", CREATE, body=body)
        for body in ("{", "[]", "null", "3", '{"name":}', '{"name": {"a": 1}}', '{"name": "\\u0000"}', DOUBLE, NESTED)
    ),
    mlflow("POST", CREATE, body="#", repeat=100_000),
    mlflow("POST", CREATE, HUGE, '{"name": "#"}', repeat=32 * MIB),
    mlflow("POST", "/api/2.0/mlflow/runs/create", body='{"experiment_id": "0; DROP TABLE runs"}'),
    mlflow("POST", "/api/2.0/mlflow/runs/create", body='{"experiment_id": "../0"}'),
    mlflow(
        "POST", "/api/2.0/mlflow/runs/search", body='{"experiment_ids": ["0"], "filter": "\'; DROP TABLE runs; --"}'
    ),
    mlflow("GET", "/api/2.0/mlflow/experiments/search?max_results=1&filter=name%20%3D%20'x'%20OR%201%3D1"),
    mlflow("GET", "/api/2.0/mlflow/experiments/search?max_results=1000000000"),
    mlflow("GET", "/api/2.0/mlflow/runs/get?run_id=%00"),
    mlflow("POST", CREATE, body=NEW, headers={"Content-Type": "text/plain"}),
    mlflow("TRACE", "/api/2.0/mlflow/experiments/search"),
]

# the artifact store's own ports: whoever has no key may neither read nor write, and may not take the inner way either

STORE = [
    *(Http("s3", "GET", path, DENIED) for path in ("/", "/mlflow", "/mlflow/{kept}", "/mlflow?policy")),
    Http("s3", "PUT", "/mlflow/planted.txt", DENIED, {}, "planted"),
    Http("s3", "PUT", "/planted", DENIED),
    Http("s3", "PUT", "/mlflow?policy", DENIED, {}, '{"Statement": [{"Effect": "Allow", "Principal": "*"}]}'),
    Http("s3", "DELETE", "/mlflow/{kept}", DENIED),
    Http("s3", "POST", "/mlflow?delete", DENIED, {}, "<Delete><Object><Key>{kept}</Key></Object></Delete>"),
    Http("s3", "POST", "/?Action=CreateUser&UserName=x&Version=2010-05-08", DENIED | BAD),
    *(Http("s3", "GET", f"/mlflow/{path}", DENIED | BAD) for path in ("../..{canary}", "%2e%2e/%2e%2e{canary}")),
    Http("s3", "GET", "/mlflow/{kept}", DENIED, {"Authorization": "AWS x:y"}),
    Http("s3", "GET", "/mlflow/{kept}", DENIED, {"Authorization": "{basic}"}),
    Http("s3", "PUT", "/mlflow/planted.txt", DENIED | BAD, {"Authorization": "AWS4-HMAC-SHA256"}, "planted"),
    Http("filer", "GET", "/buckets/mlflow/", SHUT),
    Http("filer", "PUT", "/buckets/mlflow/planted.txt", SHUT, {}, "planted"),
    Http("filer", "DELETE", "/buckets/mlflow?recursive=true", SHUT | {NOTHING}),  # Go's TLS does not know DELETE
    Http("volume", "GET", "/1,0000000000", SHUT),
    Http("volume", "PUT", "/1,0000000000", SHUT, {}, "planted"),
    Http("volume", "GET", "/status", SHUT),
    Http("master", "GET", "/dir/assign", SHUT),
    Http("master", "GET", "/dir/status", SHUT),
    Http("master", "GET", "/vol/grow?count=1", SHUT),
    # the last: it would delete everything
    Http("master", "GET", "/col/delete?collection=mlflow", SHUT),
]
CALLS = [
    Rpc("master_grpc", "/master_pb.Seaweed/CollectionList", b"\x08\x01"),
    Rpc("master_grpc", "/master_pb.Seaweed/Assign", b"\x08\x01"),
    Rpc("volume_grpc", "/volume_server_pb.VolumeServer/VolumeServerStatus"),
    Rpc("volume_grpc", "/volume_server_pb.VolumeServer/DeleteCollection", b"\x0a\x07nowhere"),
    Rpc("filer_grpc", "/filer_pb.SeaweedFiler/LookupDirectoryEntry", b"\x0a\x08/buckets\x12\x06mlflow"),
    Rpc("filer_grpc", "/filer_pb.SeaweedFiler/CreateEntry", b"\x0a\x08/buckets\x12\x09\x0a\x07planted"),
    Rpc("filer_grpc", "/iam_pb.SeaweedIdentityAccessManagement/ListUsers"),
    Rpc("s3_grpc", "/messaging_pb.SeaweedS3IamCache/PutIdentity"),
]
INNER = [
    *CALLS,
    *(dataclasses.replace(call, tls=True) for call in CALLS),
    # the last: it would delete everything
    Rpc("master_grpc", "/master_pb.Seaweed/CollectionDelete", b"\x0a\x06mlflow"),
    Rpc("master_grpc", "/master_pb.Seaweed/CollectionDelete", b"\x0a\x06mlflow", tls=True),
]
PLANTED = {"Bucket": "mlflow", "Key": "planted.txt", "Body": b"planted"}
SIGNED = [
    Signed("list_buckets", {}, DENIED, key="nobody"),
    Signed("list_buckets", {}, DENIED, secret="wrong"),
    Signed("put_object", PLANTED, DENIED, secret="{}0"),
    Signed("put_object", PLANTED, DENIED, key="nobody", secret="nothing"),
    Signed("delete_bucket", {"Bucket": "mlflow"}, DENIED, secret="wrong"),
    Signed("put_object", PLANTED | {"Key": "../../planted.txt"}, BAD),
    Signed("put_object", PLANTED | {"Bucket": "elsewhere"}, BAD),
    Signed("create_bucket", {"Bucket": "elsewhere"}, DENIED),
    Signed("delete_bucket", {"Bucket": "mlflow"}, DENIED),
    Signed("put_bucket_acl", {"Bucket": "mlflow", "ACL": "public-read"}, DENIED),
    Signed("put_bucket_policy", {"Bucket": "mlflow", "Policy": '{"Version": "2012-10-17", "Statement": []}'}, DENIED),
    Signed("get_object", {"Bucket": "mlflow", "Key": "../../etc/passwd"}, BAD),
]
LOGINS = [
    Login("mlflow", None),
    Login("mlflow", ""),
    Login("mlflow", "mlflow"),
    Login("mlflow", "{}0"),
    Login("mlflow' --", "{}"),
    Login("postgres", None, "postgres"),
    Login("postgres", "postgres", "postgres"),
    Login("postgres", "{}", "postgres"),
    Login("nobody", "{}"),
    Login("mlflow", "{}", "postgres"),
    Login("mlflow", "{}", "template1"),
    Login("mlflow", "{}", "elsewhere"),
    Login("mlflow", "{}", "../mlflow"),
]
STATEMENTS = [  # of MLflow's own user, whose password is right
    "COPY (SELECT 1) TO PROGRAM 'touch {canary}.made'",
    "COPY (SELECT 1) TO '{canary}.made'",
    "SELECT pg_read_file('{canary}')",
    "ALTER ROLE mlflow SUPERUSER",
    "CREATE ROLE other LOGIN",
    "CREATE DATABASE other",
    "SELECT * FROM pg_authid",
]

# a Ray head: whoever has its token may run any code there, so no row asks Ray to refuse them a job or a package

TOKENS: list[dict[str, str]] = [
    {},
    {"Authorization": ""},
    {"Authorization": "Bearer "},
    {"Authorization": "Bearer 0000000000000000000000000000000000000000000000000000000000000000"},
    {"Authorization": "Bearer {token}0"},
    {"Authorization": "{token}"},
    {"Authorization": "Basic {token}"},
    {"Authorization": "Token {token}"},
    {"X-Api-Key": "{token}"},
    {"Cookie": "token={token}"},
]
GUARDED = [
    ("GET", f"{JOBS}?token={{token}}"),
    ("DELETE", f"{JOBS}x"),
    ("POST", f"{JOBS}x/stop"),
    ("GET", f"{JOBS}x/logs"),
    ("PUT", f"{PACKAGES}/gcs/_ray_pkg_planted.zip"),
    ("GET", f"{LOGS}/file?node_id={{node}}&filename=raylet.out"),
    ("GET", "/nodes?view=summary"),
    ("PUT", "/api/serve/applications/"),
    ("GET", "/worker/traceback?pid=1&ip=127.0.0.1"),
]
HEAD = [
    *(Http("dashboard", "GET", JOBS, DENIED, headers) for headers in TOKENS),
    *(Http("dashboard", "POST", JOBS, DENIED, headers, SUBMIT) for headers in TOKENS),
    *(Http("dashboard", method, path, DENIED, {}, "{}") for method, path in GUARDED),
    Http("agent", "POST", "/api/job_agent/jobs/", DENIED, {}, SUBMIT),
    Http("agent", "GET", "/logs/", DENIED),
    Http("dashboard", "GET", "/static/../../..{canary}", DENIED | BAD),
    Http("dashboard", "GET", "/static/%2e%2e/%2e%2e/%2e%2e{canary}", DENIED | BAD),
    ray("POST", JOBS, BAD, SUBMIT, headers={"Origin": "http://elsewhere.example", "User-Agent": "Mozilla/5.0"}),
    *(ray("GET", f"{JOBS}{job}") for job in ("nothing", "..%2f..{canary}", "%2e%2e", "%00", "%3Cscript%3E")),
    *(ray("GET", f"{JOBS}{job}/logs") for job in ("nothing", "..%2f..{canary}")),
    *(ray("POST", f"{JOBS}{job}/stop") for job in ("nothing", "..%2f..%2fx")),
    *(ray("DELETE", f"{JOBS}{job}") for job in ("nothing", "..%2f..%2fx")),
    *(ray("GET", f"{PACKAGES}/{path}") for path in ("gcs/../../x", "gcs/%2e%2e%2fx", "gcs/nothing.zip")),
    *(ray("PUT", f"{PACKAGES}/{path}", body="planted") for path in ("gcs/../../x", "gcs/..")),
    ray("PUT", f"{PACKAGES}/file/{{canary}}", body="planted"),
    ray("PUT", f"{PACKAGES}/gcs/_ray_pkg_planted.zip", HUGE, "#", repeat=101 * MIB),
    ray("PUT", f"{PACKAGES}/gcs/_ray_pkg_planted.zip", body="x", headers={"Content-Length": "-1"}),
    ray("GET", "/logs/%2e%2e/%2e%2e/%2e%2e{canary}"),
    ray("GET", "/worker/traceback?pid=1;id&ip=127.0.0.1"),
    ray("GET", "/api/v0/actors?limit=100000000"),
]
CLUSTER = [
    Rpc("gcs", "/ray.rpc.JobInfoGcsService/GetAllJobInfo"),
    Rpc("gcs", "/ray.rpc.InternalKVGcsService/InternalKVKeys"),
    Rpc("gcs", "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo", token="0" * 64),
    Rpc("gcs", "/ray.rpc.JobInfoGcsService/GetAllJobInfo", token=""),
]

# the command line

NAMES = {
    "../x": "name = '../x'",
    "/abs": "name = '/abs'",
    "a/b": "name = 'a/b'",
    "..": "name = '..'",
    ".hidden": "name = '.hidden'",
    "'a\\b'": "name = ",
    "'$(id)'": "name = '$(id)'",
    "<script>alert(1)</script>": "name = '<script>",
    '"a\\0b"': "name = 'a\\x00b'",
    '"a\\nb"': "name = 'a\\nb'",
    '"a\\n"': "name = 'a\\n'",
    "tіny": "name = ",  # the second letter is Cyrillic
    "''": "name = ''",
    "a" * 10_000: "name = 'aaa",
}
RESUMED = ("../x", "/abs", "..", "a/b", ".hidden", "", "a\nb", "a\0b", "<script>", "tіny", "a" * 5000)
SOURCES = (
    "../../etc",
    "{canary}",
    "a\nerror: b",
    "a\0b",
    "a" * 5000,
    "runs:/../../x",
    "runs:/",
    "http://127.0.0.1:1/x",
)
COMMANDS = [
    *(Line(("train", "{folder}/train.yaml", f"name={name}"), word) for name, word in NAMES.items()),
    *(Line(("sweep", "{folder}/sweep.yaml", f"name={name}"), word) for name, word in list(NAMES.items())[:5]),
    *(Line(("sweep", "--resume", name, "--storage", "{folder}/runs"), "name = ") for name in RESUMED),
    *(Line(("submit", "--resume", name, "--address", "{nobody}"), "name = ") for name in RESUMED[:4]),
    Line(("sweep", "--resume", "-rf", "--storage", "{folder}/runs"), "'-rf'"),
    *(Line(("report", name, "--storage", "{folder}/runs"), "is not in") for name in ("../x", "' OR 1=1 --", "a\nb")),
    Line(("report", "a\0b", "--storage", "{folder}/runs"), "a\\x00b"),
    *(Line(("eval", source, "--storage", "{folder}/runs"), "") for source in SOURCES),
    Line(("eval", "0" * 32, "--storage", "{folder}/runs"), "0" * 32),
    *(
        Line(("report", "fake", "--tracking-uri", uri), word)
        for uri, word in (
            ("sqlite:///{canary}", "sqlite:///"),
            ("sqlite:////nowhere/x.db", "no runs are stored there"),
            ("file:///{folder}", "must be sqlite:///PATH"),
            ("/etc/passwd", "must be sqlite:///PATH"),
            ("javascript:alert(1)", "must be sqlite:///PATH"),
            ("http://127.0.0.1:1", "no MLflow server answers there"),
            ("http://", "tracking.uri"),
            ("http://[x", "tracking.uri"),
            ("http://127.0.0.1:99999", "tracking.uri"),
            ("http://127.0.0.1:1\r\nX: y", "tracking.uri"),
            ("sqlite:///a\0b", "no runs are stored there"),
        )
    ),
    *(
        Line(("move", uri, "--storage", "{folder}/runs"), word)
        for uri, word in (
            ("sqlite:///{canary}", "sqlite:///"),
            ("file:///{folder}", "must be sqlite:///PATH"),
            ("http://127.0.0.1:1", "no MLflow server answers there"),
            ("", "tracking.uri"),
        )
    ),
    Line(("move", "http://127.0.0.1:1", "--storage", "/proc/self"), "no runs are stored there"),
    *(
        Line(("report", "fake", "--storage", "{folder}/runs", option, target), option)
        for option, target in (
            ("--html", "/proc/nowhere/x"),
            ("--html", "{folder}"),
            ("--html", "a\0b"),
            ("--parquet", "/proc/nowhere/x"),
            ("--optuna", "/proc/nowhere/x"),
            ("--optuna", "sqlite:///{canary}"),
            ("--optuna", "{canary}"),
            ("--optuna", "file:///{canary}"),
            ("--optuna", "http://127.0.0.1:1"),
        )
    ),
    *(
        Line(("submit", config, "--working-dir", place, "--address", "{nobody}"), word)
        for config, place, word in (
            ("{folder}/sweep.yaml", "{folder}/runs", "--working-dir"),
            ("{folder}/runs/../sweep.yaml", "{folder}/runs", "--working-dir"),
            ("/proc/version", "{folder}", "--working-dir"),
            ("{folder}/linked.yaml", "{folder}", "--working-dir"),
            ("{folder}/sweep.yaml", "{folder}/nowhere", "--working-dir"),
            ("{folder}/sweep.yaml", "{folder}/sweep.yaml", "--working-dir"),
        )
    ),
    *(
        Line(("submit", "{folder}/sweep.yaml", "--working-dir", "{folder}", "--address", address), "--address")
        for address in ("127.0.0.1:1", "file:///etc/passwd", "http://", "http://[x", "ray://127.0.0.1:1", "http://a\nb")
    ),
    *(
        Line(("train", "{folder}/train.yaml", override), word)
        for override, word in (
            ("storage=/proc/nowhere/../nowhere", "storage"),
            ("data.corpus.files=[../../../../../../nowhere/*.txt]", "nowhere"),
            ("data.corpus.files=['{folder}/pipe', '{folder}/text/0.txt']", "pipe"),
            ('data.corpus.files=["a\\0b"]', "files"),
            ("name=!!python/object/apply:os.system ['touch {canary}.made']", "name"),
            ("name=[" + "[" * 5000, "name"),
            ("name=&a [*a]", "name"),
            ("model.layers[99999999999].k=1", "layers"),
            ("model.layers[*].k='1", "layers"),
            ("[]=1", "[]"),
            ("..=1", ".."),
            ("=1", "key=value"),
            ("__class__.__init__=1", "__class__"),
        )
    ),
    *(Line(("train", path), "") for path in ("{folder}", "{folder}/pipe", "a\0b", "a\nerror: b", "a" * 5000)),
]

BOMB = b"".join(b"b%d: &b%d [%s]\n" % (i, i, b",".join([b"*b%d" % (i - 1)] * 9)) for i in range(1, 9))
TEXTS = [
    Text("tab", b"name: x\n\tseed: 1", "not YAML"),
    Text("laughs", b"b0: &b0 [1, 1]\n" + BOMB, "laughs.yaml"),
    Text("laughing", b"b0: &b0 [1, 1]\n" + BOMB + b"data: {corpus: {files: *b8}}", "laughing.yaml"),
    Text("itself", b"name: &a [*a]", "itself.yaml"),
    Text("inside", b"&a\nmodel: *a", "inside.yaml"),
    Text("system", b"name: !!python/object/apply:os.system ['touch {canary}.made']", "not YAML"),
    Text("new", b"!!python/object/new:os.system ['touch {canary}.made']", "not YAML"),
    Text("twice", b"name: a\nname: b", "name"),
    Text("unknown", b"naem: a", "naem"),
    Text("private", b"__class__: {a: 1}", "__class__"),
    Text("scalar", b"model: 3", "model = 3"),
    Text("word", b"model: {num_layers: many}", "model.num_layers = 'many'"),
    Text("large", b"model: {num_layers: 99999999999999999999}", "num_layers"),
    Text("number", b"seed: " + b"9" * 5000, "seed"),
    Text("infinite", b"training: {optimizer: {learning_rate: .inf}}", "learning_rate"),
    Text("date", b"name: 2020-01-01", "storage"),  # a name like any other
    Text("home", b"name: ${oc.env:HOME}", "name"),
    Text("missing", b"name: ???", "name"),
    Text("keys", b"1: 2", "1"),
    Text("complex", b"? [a]\n: b", "not YAML"),
    Text("null", b"~: 1", "~: no such setting"),
    Text("binary", bytes(range(256)), "is binary"),
    Text("utf16", "name: x".encode("utf-16"), "is text in UTF-16"),
    Text("nul", b"name: a\0b", "is binary"),
    Text("surrogate", b'name: "\\ud800"', "name"),
    Text("list", b"- 1", "must hold a mapping"),
    Text("empty", b"", "must hold a mapping"),
    Text("documents", b"name: a\n---\nname: b", "not YAML"),
    Text("deep", b"name: " + b"[" * 5000, "deep.yaml"),
    Text("nested", b"name: " + b"[" * 200 + b"]" * 200, "name"),
    Text("huge", b"name: " + b"a" * 16 * MIB, "huge.yaml"),
    Text("again", b"include: again.yaml", "includes itself"),
    Text("absolute", b"include: {canary}", "canary"),
    Text("climbing", b"include: ../../../../../nowhere.yaml", "nowhere.yaml"),
    Text("folder", b"include: .", "cannot be read"),
    Text("pipes", b"include: pipe", "pipe"),
    Text("remote", b"include: http://127.0.0.1:1/x", "no such configuration file"),
    Text("zero", b'include: "a\\0b"', "include"),
    Text("several", b"include: [a, b]", "include"),
]
