"""Every command and every block of code in the project's Markdown is run here, or by a test that is named for it."""

import ast
import dataclasses
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from gsa.config import TrainConfig, build, load_config
from ray_jobs.cli import app
from ray_jobs.space import Space
from ray_jobs.sweep import read_sweep
from tests.promises import COMMANDS, PROMISES
from tests.ray_jobs.commands import call
from tests.readme import ROOT, Found, files, found_in, text_of
from tests.text import write_files

FOUND = [found for path in files() for found in found_in(path)]
SMALL = {
    "num_samples": 2,
    "searcher": {"sampler": "tpe", "startup_trials": 1},
    "scheduler": {"kind": "halving", "grace_period": 8, "reduction_factor": 2},
}
SMALL_RUN = {
    "training.stages": [{"kind": "dense", "steps": 8}, {"kind": "warmup", "steps": 2}, {"kind": "sparse", "steps": 6}],
    "training.log_every": 2,
    "training.checkpoint_every": 8,
    "evaluation": {"every": 8, "sequences": 8},
    "data.context_length": 64,
    "data.corpus": {"source": "text", "files": ["texts/*.txt"]},
    "model.attention.controller": {"kind": "variance", "k": 32, "k_min": 4, "k_max": 64},
}


def text(start: str, language: str = "sh", file: str = "README.md") -> str:
    """The one command, or block, of a file that begins so, as it stands there."""
    fitting = {f.text for f in FOUND if (f.file, f.language) == (file, language) and f.text.startswith(start)}
    if start in fitting:
        return start
    (found,) = fitting
    return found


def proofs(found: Found) -> tuple[str, ...]:
    fitting = [key for key in COMMANDS if found.text.startswith(key)]
    return COMMANDS[max(fitting, key=len)] if fitting else ()


def test_every_command_and_every_block_has_a_proof() -> None:
    assert [f"{f.file}: {f.text.splitlines()[0]}" for f in FOUND if not proofs(f)] == []
    used = {max((key for key in COMMANDS if f.text.startswith(key)), key=len) for f in FOUND}
    assert set(COMMANDS) - used == set(), "no file has these any more"


def test_a_new_command_without_a_proof_is_found(tmp_path: Path) -> None:
    path = ROOT / "README.md"
    assert not proofs(Found("README.md", "sh", "gsa fly configs/x.yaml"))
    assert not proofs(Found("README.md", "python", "import gsa.flight"))
    assert len(found_in(path)) > 40


def test_every_promise_stands_in_a_file() -> None:
    everything = "\n".join(text_of(path) for path in files())
    assert [sentence for sentence in PROMISES if sentence not in everything] == []


def test_every_proof_exists() -> None:
    named = {node for proofs in (*COMMANDS.values(), *PROMISES.values()) for node in proofs}
    known: dict[str, set[str]] = {}
    for node in named:
        file, _, name = node.partition("::")
        if file not in known:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            known[file] = {part.name for part in tree.body if isinstance(part, ast.FunctionDef)}
        assert name in known[file], node


GSA = sorted({f.text for f in FOUND if re.match(r"gsa (?!COMMAND)", f.text)})


@pytest.mark.parametrize("line", GSA)
def test_our_own_commands_take_what_is_written(line: str) -> None:
    """Usage lines name options that exist; commands are parsed, and every setting in them is one."""
    group: Any = typer.main.get_command(app)
    _, name, *arguments = shlex.split(
        re.sub(r"\[key=value …\]|[\[\]]", "", line) if "[" in line and "'" not in line else line
    )
    command = group.commands[name]
    if not arguments and name not in ("ui", "bench", "doctor"):
        return  # a name in a sentence
    values = {"T": "64", "FILE": "f", "CONFIG": "c.yaml", "SWEEP": "s", "RUN": "r", "NAME": "n"}
    arguments = [values.get(word, word) for word in arguments]
    params = command.make_context(name, arguments).params
    overrides = params.get("overrides") or []
    config = params.get("config")
    if overrides and config is not None:
        assert (ROOT / config).is_file()
        read: Callable[..., Any] = load_config if name == "train" else read_sweep
        read(ROOT / config, list(overrides))


@pytest.mark.parametrize("line", sorted({f.text for f in FOUND if re.match(r"ray \w+ \S", f.text)}))
def test_rays_own_commands_have_these_options(line: str) -> None:
    import ray.scripts.scripts

    _, *words = shlex.split(line.removesuffix("&"))
    command: Any = ray.scripts.scripts.cli
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    required = {"logs": ["job"], "stop": ["job"]}.get(command.name, []) if not words else []
    context = command.make_context(command.name, [*words, *required])
    for name in ("cluster_config_file", "working_dir"):
        if context.params.get(name):
            assert (ROOT / context.params[name]).exists()


@pytest.mark.slow
def test_every_make_target_exists_and_runs_what_is_said() -> None:
    said = {
        "sweep": "gsa sweep configs/sweep/quickstart.yaml name=", "ui": "gsa ui", "test": "-m pytest",
        "test-gpu": "-m pytest -m gpu", "test-fast": "not slow",
        "services": "dashboards.services start", "chaos": "tests.bench.chaos",
        "services-stop": "dashboards.services stop", "audit": "pip-audit", "lint": "lint-imports",
    }  # fmt: skip
    named = {
        word for path in files() for word in re.findall(r"\bmake ([a-z][a-z-]+)\b(?= ?[`&#\n ])", path.read_text())
    }
    assert {f.text.split()[1] for f in FOUND if f.text.startswith("make ")} <= set(said)
    assert set(said) <= named
    for target, words in said.items():
        dry = subprocess.run(
            ["make", "-n", "-o", ".venv/installed", target], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert words in dry.stdout


@pytest.mark.parametrize("path", [p for p in files() if "python -m tests." in p.read_text()], ids=lambda p: p.stem)
def test_every_measuring_program_exists(path: Path) -> None:
    content = path.read_text(encoding="utf-8")
    for module in re.findall(r"python -m (tests[\w.]*\w)(?!\w|\.…)", content):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file() or (ROOT / module.replace(".", "/")).is_dir()
    for listed in re.findall(r"`python -m tests\.bench\.kill`, ([^()]*) \(", content):
        for name in re.findall(r"`(\w+)`", listed):
            assert (ROOT / f"tests/bench/{name}.py").is_file()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout as a new user has it, with a small quickstart, and a HOME of its own."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("Makefile", "cluster.yaml", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name in (".venv", "gsa", "kernels", "ray_jobs"):
        (folder / name).symlink_to((ROOT / name).resolve())
    write_files(folder / "texts/more", 0, files=8, lines=400)
    write_files(folder / "texts", 1, files=8, lines=400)
    (folder / "home").mkdir()
    _shrink(folder / "configs/train/tiny.yaml", SMALL_RUN)
    _shrink(folder / "configs/sweep/quickstart.yaml", SMALL)
    return folder


def _shrink(path: Path, changes: dict[str, Any]) -> None:
    data = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        place, (*parts, last) = data, key.split(".")
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = value
    path.write_text(yaml.safe_dump(data, sort_keys=False))


def shell(world: Path, line: str) -> "subprocess.CompletedProcess[str]":
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    environment |= {"HOME": str(world / "home"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        ["bash", "-c", line], cwd=world, env=environment, capture_output=True, text=True, check=False, timeout=280
    )


def words(world: Path, line: str) -> list[str]:
    """What a shell makes of a command line."""
    return shell(world, f"printf '%s\\0' {line}").stdout.split("\0")[:-1]


@pytest.fixture(scope="module")
def swept(world: Path) -> str:
    """What `make sweep` printed."""
    target = text("make sweep").replace("make ", "make -o .venv/installed ")
    done = shell(world, target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Token authentication is enabled" not in done.stderr  # Ray's warning of its tokens
    return done.stdout


def test_the_first_commands_of_a_new_user(world: Path, swept: str) -> None:
    assert "Pareto front (*): 0000" in swept
    assert "3/3 trials" in swept
    assert re.search(r"next: gsa ui\n\s+gsa report quickstart --json\n", swept)
    version = shell(world, f"{text('source .venv')} && gsa report quickstart --json")
    assert version.returncode == 0, version.stderr
    assert json.loads(version.stdout)["sweep"] == "quickstart"


def test_commands_on_the_results_of_a_sweep(
    world: Path, swept: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert call(capsys, *shlex.split(text("gsa report quickstart --html"))[1:])[0] == 0
    assert "<html" in (world / "report.html").read_text()
    usage = text("gsa report SWEEP")
    assert re.findall(r"\[(--\w+)", usage) == ["--json", "--html", "--parquet", "--optuna"]
    code, output, _ = call(
        capsys, "report", "quickstart", "--json", "--parquet", "t.parquet", "--optuna", "sqlite:///study.db"
    )
    found = json.loads(output)
    assert code == 0
    assert {"trials", "pareto", "importances", "curves", "layers", "cost"} <= set(found)
    assert (world / "t.parquet").stat().st_size
    assert (world / "study.db").stat().st_size
    run = found["trials"][0]["run_id"]
    code, output, errors = call(capsys, *text("gsa eval RUN").replace("RUN", run).split()[1:])
    assert code == 0, errors
    assert "held-out loss" in output
    assert "attention by layer" in output
    code, output, errors = call(capsys, *text("gsa propose RUN").replace("RUN", run).split()[1:])
    assert code == 0, errors
    assert "layers on held-out text" in output
    _run_python(run)


def _run_python(run: str) -> None:
    """Both blocks, one after the other, on the sweep's checkpoint and on the CPU."""
    import torch

    names: dict[str, Any] = {"tokens": torch.randint(257, (1, 8))}
    exec(compile(text("from gsa import", "python").replace("<run_id>", run), "README.md", "exec"), names)
    assert names["tokens"].shape == (1, 72)
    from gsa import GSAForCausalLM
    from gsa.attention.cache import Cache

    config = names["config"]
    assert config.model.num_layers == 4
    assert names["layer"](torch.randn(1, 5, config.model.attention.hidden_size)).shape[1] == 5
    names |= {"Cache": Cache, "prompt": torch.randint(257, (1, 9)), "token": torch.randint(257, (1, 1))}
    names["model"] = GSAForCausalLM(config.model).eval()
    with torch.no_grad():
        block = text("cache = Cache(", "python")
        exec(compile(block, "README.md", "exec"), names)
        replayed = names["model"](names["token"], cache=names["cache"])
        whole = names["model"](torch.cat([names["prompt"], names["token"]], 1))
    torch.testing.assert_close(replayed[:, -1], whole[:, -1], atol=1e-4, rtol=1e-4)


def test_the_python_of_the_readme_runs() -> None:
    """It runs on the sweep's checkpoint, in `test_commands_on_the_results_of_a_sweep`; here: there are two blocks."""
    assert [f.text.split("(")[0] for f in FOUND if f.language == "python"] == [
        text("from gsa import", "python").split("(")[0],
        "cache = Cache",
    ]


def test_a_run_on_ones_own_text(
    world: Path, cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """README's own example, as it stands there; and what it prints can be pasted back."""
    line = text("gsa train configs/train/tiny.yaml name=mine 'data.corpus={source: text")
    monkeypatch.chdir(world)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, output, errors = call(capsys, *words(world, line)[1:])
    assert code == 0, output + errors
    assert "held-out loss" in output
    config = load_config(sorted((world / "runs/train/mine").glob("step-*"))[-1] / "config.yaml")
    assert config.data.corpus.files == [str(world / "texts/**/*.txt")]
    evaluation = re.search(r"next: (gsa eval .*)", output)
    assert evaluation is not None
    code, output, errors = call(capsys, *words(world, evaluation[1])[1:], "--json")
    assert code == 0, errors
    assert json.loads(output)["metrics"]["held_out_loss"] > 0


def test_the_example_of_a_search_is_one(world: Path) -> None:
    path = world / "configs/sweep/example.yaml"
    path.write_text(text("train: {include", "yaml"))
    shutil.copy(ROOT / "configs/train/tiny.yaml", world / "configs/train/whole.yaml")
    path.write_text(path.read_text().replace("../train/tiny.yaml", "../train/whole.yaml"))
    config = read_sweep(path)
    space = Space(config.space, dataclasses.asdict(config.train))
    assert len(space.dimensions) == 4  # the kind, k, and one share for each of two layers
    assert (config.confirm.best, config.confirm.seeds, config.budget.gpu_hours) == (3, 3, 100)
    assert config.warm_start == "an-earlier-sweep"


def test_our_cluster_file_and_quickstart_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    code, output, errors = call(capsys, *shlex.split(text("gsa doctor --cluster cluster.yaml"))[1:])
    assert code == 0, output + errors
    assert "trials at once" in " ".join(output.split())
    assert "next: ray up cluster.yaml" in output


def test_the_four_arms_are_settings() -> None:
    sentence = re.search(r"Four arms are settings of one model: (.*) and GSA\.", text_of(ROOT / "README.md"))
    assert sentence is not None
    arms = [arm.split() for arm in re.findall(r"`([^`]*)`", sentence[1])]
    assert len(arms) == 3
    for arm in arms:
        build(TrainConfig, {}, [key if key.startswith("model.") else f"model.attention.{key}" for key in arm])


@pytest.mark.slow
def test_an_account_is_made_with_what_its_template_asks_for(tmp_path: Path) -> None:
    """The block as it stands, with programs that only write down what they were given."""
    for name, answer in (("aws", "one"), ("curl", "203.0.113.7"), ("pip", "")):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$0 $*" >> "{tmp_path}/calls"\necho {answer}\n')
        program.chmod(0o755)
    install, subnet, deploy = text("pip install"), text("subnet() {"), text("aws cloudformation")
    environment = os.environ | {
        "HOME": str(tmp_path),
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin",
    }
    done = subprocess.run(
        ["bash", "-ec", f"{install}\n{subnet}\n{deploy}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    token = tmp_path / ".ray/auth_token"
    assert token.read_text()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    calls = (tmp_path / "calls").read_text()
    parameters = dict(re.findall(r"(\w+)=(\S+)", calls.splitlines()[-1].partition("--parameter-overrides")[2]))
    assert parameters == {"SshFrom": "203.0.113.7/32"} | dict.fromkeys(["Vpc", "SubnetA", "SubnetB", "SubnetC"], "one")
    template = (ROOT / "configs/cluster/aws-account.yaml").read_text()
    asked = re.findall(r"^  (\w+):", re.split(r"^Parameters:\n", template, flags=re.M)[1].split("\n\n")[0], re.M)
    assert set(parameters) <= set(asked)
    (wanted,) = re.findall(r"pip install '([^']*)'", install)
    assert f'"{wanted}"' in (ROOT / "pyproject.toml").read_text()
