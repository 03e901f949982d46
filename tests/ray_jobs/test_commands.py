"""Commands that are printed can be pasted: a shell and our own parser give back what they were made of."""

import ast
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from gsa.paths import of_user
from gsa.store import TrackingConfig
from ray_jobs import submit
from ray_jobs.cli import app
from ray_jobs.commands import at_storage, at_store, gsa, shell
from tests.draw import Draw
from tests.ray_jobs.commands import call, refused

ROOT = Path(__file__).parents[2]
AWKWARD = [
    "plain", "-x", "--json", "a b", "~", "~/x", "it's", 'say "x"', "$HOME", "`id`", "*.txt", "a;b", "a&b", "#c", "é漢",
    "data.corpus={source: text, files: ['**/*.txt']}", "!x", "a\\b", "=", "%s", "\t", "a\nb",
]  # fmt: skip


def words(line: str) -> list[str]:
    """What a shell makes of a command line."""
    done = subprocess.run(["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def parsed(line: str) -> dict[str, Any]:
    """What `gsa` makes of it."""
    program, command, *arguments = words(line)
    assert program == "gsa"
    group: Any = typer.main.get_command(app)
    return dict(group.commands[command].make_context(command, arguments).params)


def test_a_shell_gives_back_the_words(draw: Draw) -> None:
    for _ in range(10):
        drawn = draw.random.choices(AWKWARD, k=8)
        assert words(shell(*drawn)) == drawn


@pytest.mark.parametrize("value", AWKWARD)
def test_the_command_line_gives_back_what_a_printed_command_was_made_of(value: str) -> None:
    path = Path(value)
    assert parsed(gsa("train", path, "a.b={c: d}"))["config"] == Path(of_user(value))
    assert parsed(gsa("train", "x.yaml", value, "--y"))["overrides"] == [value, "--y"]
    sweep = parsed(gsa("sweep", options={"--resume": value, **at_storage(value)}))
    assert (sweep["resume"], sweep["storage"]) == (value, value)
    assert sweep["config"] is None
    store = at_store(TrackingConfig("http://h?x=a b", value), "/r")
    report = parsed(gsa("report", value, options={"--json": None, **store}))
    assert (report["sweep"], report["json"], report["experiment"]) == (value, True, value)
    assert report["tracking_uri"] == "http://h?x=a b"
    assert parsed(gsa("eval", value, options=at_storage(path / "s")))["storage"] == Path(of_user(value)) / "s"


def test_a_jobs_command_gives_back_what_was_submitted(tmp_path: Path) -> None:
    group: Any = typer.main.get_command(app)
    config = tmp_path / "-x.yaml"
    config.write_text("{space: {seed: {type: int, low: 1, high: 2}}, train: {data: {corpus: {source: python_stdlib}}}}")
    overrides = ["train.name=-y", "name=a", "train.storage=/shared/my runs"]
    made = submit.new_sweep(config, overrides, tmp_path, "/shared/my runs")
    assert (made.sweep, made.storage) == ("a", "/shared/my runs")
    *program, first, second, third, fourth, fifth, sixth, seventh = words(made.entrypoint)
    assert program == ["python", "-m", "ray_jobs.sweep"]
    context = group.commands["sweep"].make_context("sweep", [first, second, third, fourth, fifth, sixth, seventh])
    assert context.params["config"] == Path("-x.yaml")
    assert context.params["overrides"] == overrides
    assert context.params["storage"] == "/shared/my runs"
    again = words(submit.resumed_sweep("-x", "/a b", ["budget={gpu_hours: 1}"], tmp_path).entrypoint)
    assert again[:4] == ["python", "-m", "ray_jobs.cli", "sweep"]
    params = group.commands["sweep"].make_context("sweep", again[4:]).params
    assert (params["resume"], params["storage"]) == ("-x", "/a b")
    assert [str(params["config"]), *params["overrides"]] == ["budget={gpu_hours: 1}"]


COMMAND = re.compile(r"(?<![\w-])(gsa [a-z]+|ray [a-z]+|export|source|kubectl [a-z]+) (?!is )[^:;,()]*$")


def test_no_command_is_printed_but_through_the_one_function() -> None:
    """A value beside the words of a command, in one f-string, would not be quoted."""
    found = []
    for part in ("gsa", "ray_jobs", "dashboards"):
        for path in sorted((ROOT / part).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    for before, value in zip(node.values, node.values[1:], strict=False):
                        text = before.value if isinstance(before, ast.Constant) else None
                        if isinstance(text, str) and isinstance(value, ast.FormattedValue) and COMMAND.search(text):
                            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text!r}")
    assert not found


def test_a_command_that_is_pasted_finds_the_runs_where_they_are(tmp_path: Path) -> None:
    assert at_store(TrackingConfig(), "runs") == {}
    assert at_store(TrackingConfig(), tmp_path) == {"--storage": tmp_path}
    assert at_store(TrackingConfig("http://h", "e"), tmp_path) == {"--tracking-uri": "http://h", "--experiment": "e"}


OTHER = "--tracking-uri=sqlite:///x.db"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "a", "--storage=s", OTHER], "--storage has no effect here: runs are read from --tracking-uri"),
        (["ui", "--storage=s", OTHER], "--storage has no effect"),
        (["doctor", "--cluster", "c.yaml", "--storage=s"], "--storage has no effect"),
        (["doctor", "--sweep", "s.yaml"], "needs --cluster"),
        (["bench", "--storage=s"], "--storage has no effect"),
        (["bench", OTHER], "--tracking-uri has no effect"),
        (["bench", "--experiment=e"], "--experiment has no effect"),
        (["bench", "--operation=forward", "--batch=2"], "--batch has no effect"),
        (["bench", "--operation=decode", "--overlap=2"], "--overlap has no effect"),
        (["bench", "--run=r", "--heads=2"], "--heads has no effect"),
        (["bench", "--run=r", "--head-dim=2"], "--head-dim has no effect"),
        (["eval", "step", "--experiment=e"], "--experiment has no effect here: step is a folder"),
        (["propose", "step", OTHER], "--tracking-uri has no effect here: step is a folder"),
        (["bench", "--run=step", OTHER], "--tracking-uri has no effect here: step is a folder"),
        (["bench", "--run=r", "--length=64", "--length=65"], "no more than one --length"),
        (["sweep", "s.yaml", "--storage=s", "train.storage=t"], "train.storage = 't': is not what --storage s says"),
        (["sweep", "s.yaml", "--storage=s", "train={storage: t}"], "train.storage = 't': is not what --storage s"),
        (["submit", "s.yaml", "--storage=s", "train.storage=t"], "train.storage = 't': is not what --storage s says"),
    ],
)
def test_an_option_without_an_effect_is_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text("{space: {seed: {type: int, low: 1, high: 2}}}")
    Path("step").mkdir()
    Path("step/checkpoint.json").touch()
    before = sorted(tmp_path.rglob("*"))
    assert words in refused(capsys, *arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_storage_of_a_new_sweep_is_where_it_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused for its corpus, whose path names the storage that was taken."""
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text("{space: {seed: {type: int, low: 1, high: 2}}}")
    from ray_jobs.sweep import load_sweep

    for given, overrides in (("my runs", []), ("x: [y", []), ("a", ["train.storage=a"])):
        assert load_sweep("s.yaml", overrides, given).train.storage == str(tmp_path / given)
    assert load_sweep("s.yaml").train.storage == str(tmp_path / "runs")
    line = refused(capsys, "sweep", "s.yaml", "--storage=/proc/nowhere")
    assert "train.storage = '/proc/nowhere': cannot be written to" in line


def test_a_store_of_the_environment_is_named_where_it_wins(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    _, _, errors = call(capsys, "report", "a", "--storage", "s")
    assert "runs are read from MLFLOW_TRACKING_URI" in " ".join(errors.split())
