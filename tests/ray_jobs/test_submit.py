"""Sweeps as jobs on a head that asks for a token: refused, followed, dropped, stopped, resumed."""

import io
import secrets
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from ray.dashboard.modules.job.common import JobStatus
from rich.console import Console

from dashboards.services import free_ports, write_private
from gsa.errors import RequestError
from ray_jobs import submit
from ray_jobs.commands import shell
from ray_jobs.record import COMPLETE, Record
from ray_jobs.submit import refuse_large
from tests.draw import Draw
from tests.ray_jobs.apart import Answer, Asked, ask
from tests.ray_jobs.commands import ROOT, command, wait_for
from tests.ray_jobs.head import Head, link_project
from tests.ray_jobs.nodes import RAY
from tests.ray_jobs.small import lines, write_sweep
from tests.ray_jobs.store import Store

Environment = dict[str, str]


@pytest.fixture
def head(ray_head: Head) -> Environment:
    return ray_head.environment


def gsa(environment: Environment, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*arguments), env=environment, capture_output=True, text=True, check=False, timeout=240, cwd=ROOT
    )


def only_job(output: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith("job ")]
    return line.split()[1].rstrip(":")


def ray_job(environment: Environment, *arguments: str) -> str:
    done = subprocess.run(
        [RAY, "job", *arguments], env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    return done.stdout + done.stderr


def test_a_job_is_followed_stopped_and_resumed_and_a_client_may_drop(
    draw: Draw, tmp_path: Path, head: Environment
) -> None:
    path = write_sweep(tmp_path, draw.random.randrange(1000), num_samples=3)
    stages = ["train.training.stages=[{kind: dense, steps: 60}, {kind: sparse, steps: 60}]"]
    arguments = ["submit", str(path), *stages, "train.evaluation.every=20", "--working-dir", str(tmp_path)]
    link_project(tmp_path)
    record = tmp_path / "runs/sweeps/small/record.jsonl"
    client = subprocess.Popen(command(*arguments), env=head, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    wait_for(lambda: lines(record) >= 3)
    client.send_signal(signal.SIGKILL)
    output, _ = client.communicate()
    job = only_job(output)
    assert job in ray_job(head, "list")
    ray_job(head, "stop", job)
    assert "was stopped" in ray_job(head, "status", job)
    runs = Store(tmp_path / "runs").runs()
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    assert "KILLED" in {run.info.status for run in runs}
    resume = ["submit", "--resume", "small", "--storage", str(tmp_path / "runs"), "--working-dir", str(tmp_path)]
    done = gsa(head, *resume)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4/4 trials" in done.stdout
    assert all(entry.state == COMPLETE for entry in Record(record).trials())


def test_a_job_that_fails_is_told_with_the_way_on(tmp_path: Path, head: Environment) -> None:
    done = gsa(head, "submit", "--resume", "nothing", "--storage", str(tmp_path), "--working-dir", str(ROOT))
    assert done.returncode == 1
    assert "'nothing': is not in" in done.stdout
    assert "failed" in done.stderr
    there = shell("--address", head["RAY_ADDRESS"], "--storage", tmp_path, "--working-dir", ROOT)
    assert f"to go on: gsa submit --resume nothing {there}" in done.stderr
    assert "Traceback" not in done.stderr


REFUSED = {
    "no token": "refused the token",
    "wrong token": "refused the token",
    "elsewhere": "no Ray head answers there",
    "nobody": "no Ray head answers there",
    "not http": "must be http://HOST:PORT",
}


@pytest.fixture(scope="module")
def answers(ray_head: Head, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """What `gsa submit` says to each request that is refused; all of them find nothing in its place afterwards."""
    folder = tmp_path_factory.mktemp("refused")
    path = write_sweep(folder, 0)
    write_private(folder / "wrong", secrets.token_hex(32))
    there, elsewhere = ray_head.environment["RAY_ADDRESS"], f"http://127.0.0.1:{free_ports(1)[0]}"
    cases = {
        "no token": ({"RAY_AUTH_MODE": "disabled"}, there),
        "wrong token": ({"RAY_AUTH_TOKEN_PATH": str(folder / "wrong")}, there),
        "elsewhere": ({}, elsewhere),
        "nobody": ({}, "http://nobody.invalid:1"),
        "not http": ({}, "127.0.0.1:6379"),
    }
    submit = ["submit", str(path), "--working-dir", str(folder), "--address"]
    asked = [Asked([*submit, address], change) for change, address in cases.values()]
    found = ask(asked, ray_head.environment)
    assert not (folder / "runs/sweeps").exists()
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize(("how", "words"), REFUSED.items())
def test_who_is_refused_is_told_in_one_line(answers: dict[str, Answer], how: str, words: str) -> None:
    done = answers[how]
    (line,) = [line for line in done.errors.splitlines() if line.startswith("error: ")]
    assert (done.code, words in line) == (2, True), done.errors
    assert "Traceback" not in done.errors


class Broken:
    """A head whose connection breaks at each of some places of the output."""

    def __init__(self, parts: list[str], places: list[int]) -> None:
        self.parts, self.places = parts, places

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        place = self.places.pop(0) if self.places else None
        for i, part in enumerate(self.parts):
            if i == place:
                raise OSError("broken")
            yield part

    def get_job_status(self, job: str) -> JobStatus:
        return JobStatus.SUCCEEDED


def test_output_is_shown_once_however_often_the_connection_breaks(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "PATIENCE", 0.001)
    parts = ["".join(draw.random.choices("ab[\n", k=draw.random.randint(1, 5))) for _ in range(10)]
    output = io.StringIO()
    head: Any = Broken(parts, [draw.random.randrange(10) for _ in range(6)])
    submit.follow(head, "job", Console(file=output))
    assert output.getvalue() == "".join(parts)


def test_what_is_too_large_is_named(draw: Draw, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/noise.bin").write_bytes(draw.random.randbytes(101 * 2**20))
    (tmp_path / "small.py").write_text("pass")
    with pytest.raises(RequestError, match=r"101 MiB packed, Ray takes 100; largest: data/ 101"):
        refuse_large(tmp_path)
    (tmp_path / ".rayignore").write_text("data/\n")
    refuse_large(tmp_path)
