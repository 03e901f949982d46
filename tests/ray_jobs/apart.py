"""Several commands, each in a process of its own that need not import anything: they are forked from one that has.

echo '[{"arguments": ["submit", "x.yaml"], "environment": {}}]' | python -m tests.ray_jobs.apart
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.ray_jobs.commands import ROOT


@dataclasses.dataclass(frozen=True)
class Asked:
    arguments: list[str]  # of `gsa`
    environment: dict[str, str] = dataclasses.field(default_factory=dict)  # what differs from that of the others


@dataclasses.dataclass(frozen=True)
class Answer:
    code: int
    output: str
    errors: str


def ask(commands: list[Asked], environment: Mapping[str, str]) -> list[Answer]:
    """What each command says, one after the other."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.ray_jobs.apart"], input=json.dumps([dataclasses.asdict(one) for one in commands]),
        env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=240,
    )  # fmt: skip
    return [Answer(**one) for one in json.loads(done.stdout)]


def _answer(asked: Asked, folder: Path) -> Answer:
    output, errors = folder / "output", folder / "errors"
    child = os.fork()
    if child == 0:
        for number, path in ((1, output), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        _run(asked)
    _, status = os.waitpid(child, 0)
    return Answer(os.waitstatus_to_exitcode(status), output.read_text(), errors.read_text())


def _run(asked: Asked) -> None:
    from ray._private.authentication_test_utils import reset_auth_token_state

    from ray_jobs.cli import main

    os.environ.update(asked.environment)
    reset_auth_token_state()  # Ray has read its environment when it was imported
    try:
        main(asked.arguments)
    except SystemExit as ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(ended.code or 0))


if __name__ == "__main__":
    import ray_jobs.submit  # noqa: F401 - what takes long

    with tempfile.TemporaryDirectory() as kept:
        answers = [_answer(Asked(**one), Path(kept)) for one in json.load(sys.stdin)]
    print(json.dumps([dataclasses.asdict(one) for one in answers]))
