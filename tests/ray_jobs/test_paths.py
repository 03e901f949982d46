"""Paths are read by one rule, whichever setting or option holds them: README, "Paths"."""

import os
from pathlib import Path

import pytest

from gsa.config import TrainConfig, build, load_config
from gsa.data.corpus import CorpusConfig, documents
from gsa.data.files import find_files
from gsa.errors import ConfigError
from gsa.paths import absolute_uri, database_of, sqlite_uri
from gsa.store import TrackingConfig, store_uri
from gsa.tracking import connect, open_store
from ray_jobs.cli import main
from ray_jobs.storage import settle

NAMES = ["plain", "a b", "100%", "a%20b", "[x]", "a[1]*", "~x", "ü", "a'b\"c", "#1", "q?m", "-o", "a=b", "${", "x.y"]
NAMES.remove("${")  # which no setting may hold: nothing is replaced, and nobody should believe that it is


def files_of(pattern: str) -> list[Path]:
    return [file.path for file in find_files([pattern])]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shell's current folder; the home folder is beside it."""
    for name in ("here", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def written(here: Path, name: str) -> dict[str, Path]:
    """A path in every way that it may be written, and what it then is."""
    return {
        f"./{name}": here / name,
        f"../here/sub/../{name}": here / name,
        str(here / name): here / name,
        f"~/{name}": here.parent / "home" / name,
        f"{here}/sub/{name}": here / "sub" / name,
    }


def settled(path: str) -> TrainConfig:
    data = {
        "storage": path,
        "data": {"corpus": {"source": "hub", "name": path, "files": [path, f"{path}/**/*.txt"]}},
        "tracking": {"uri": sqlite_uri(Path(path) / "m.db") if not path.startswith("./") else f"sqlite:///{path}/m.db"},
    }
    config = build(TrainConfig, data)
    settle(config)
    return config


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_of_a_path_takes_every_way_to_write_it(here: Path, name: str) -> None:
    for path, wanted in written(here, name).items():
        if path.startswith("./") and name in ("a%20b", "q?m"):
            continue  # in a URI they are written otherwise
        config = settled(path)
        assert config.storage == str(wanted)
        assert wanted.is_dir()
        assert config.data.corpus.name == str(wanted)
        assert config.data.corpus.files == [str(wanted), f"{wanted}/**/*.txt"]
        assert database_of(config.tracking.uri or "") == wanted / "m.db"
    if name != "~x":
        assert settled(name).storage == str(here / name)


def test_a_dataset_of_the_hub_is_no_path_unless_there_is_such_a_folder(here: Path) -> None:
    data = {"storage": ".", "data": {"corpus": {"source": "hub", "name": "owner/data"}}}
    config = build(TrainConfig, data)
    settle(config)
    assert config.data.corpus.name == "owner/data"
    (here / "owner/data").mkdir(parents=True)
    settle(config)
    assert config.data.corpus.name == str(here / "owner/data")


@pytest.mark.parametrize("path", ["", "  ", "a\0b"])
def test_what_is_no_path_is_refused_by_its_setting(here: Path, path: str) -> None:
    for data, key in (
        ({"storage": path}, "train.storage"),
        ({"storage": "s", "data": {"corpus": {"files": [path]}}}, "train.data.corpus.files"),
    ):
        with pytest.raises(ConfigError, match="must be a path") as refused:
            settle(build(TrainConfig, data), "train.storage")
        assert refused.value.key == key
    assert not list(here.iterdir())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "plain"])
def test_a_file_of_that_very_name_is_read_and_globs_are_of_the_others(here: Path, name: str) -> None:
    folder = here / name
    folder.mkdir()
    for file in (f"{name}.txt", "b.txt"):
        (folder / file).write_text("text")
    (here / "link").symlink_to(folder)
    assert files_of(str(folder / f"{name}.txt")) == [folder / f"{name}.txt"]
    assert files_of(f"{here}/link/b.txt") == [here / "link/b.txt"]
    assert len(files_of(f"{here}/link/*.txt")) == 2
    (here.parent / "home/c.txt").write_text("text")
    assert files_of("~/c.txt") == files_of("~/?.txt")


@pytest.mark.parametrize("name", NAMES)
def test_an_include_is_relative_to_its_file_and_may_be_at_home(here: Path, name: str) -> None:
    (here / "sub").mkdir()
    for folder in (here / "sub", here.parent / "home"):
        (folder / f"{name}.yaml").write_text("num_layers: 3\n")
    quoted = name.replace("'", "''")
    for i, path in enumerate((f"./{quoted}.yaml", f"~/{quoted}.yaml")):
        (here / f"sub/run{i}.yaml").write_text(f"model: {{include: '{path}'}}\n")
        for config in (f"sub/run{i}.yaml", here / f"sub/run{i}.yaml"):
            assert load_config(config).model.num_layers == 3


def test_an_sqlite_uri_means_the_same_file_to_us_and_to_sqlalchemy(here: Path) -> None:
    from sqlalchemy import make_url

    for name in NAMES:
        uri = sqlite_uri(here / name / "m.db")
        assert make_url(uri).database == str(here / name / "m.db") == str(database_of(uri))
        assert absolute_uri(uri) == uri
    assert absolute_uri("sqlite:///m.db") == f"sqlite:///{here}/m.db"
    assert absolute_uri("sqlite:///~/m.db?timeout=9") == f"sqlite:///{here.parent}/home/m.db?timeout=9"
    for other in ("http://host:1/a%20b?c=~", "sqlite://", "sqlite:///:memory:", "postgresql://h/d"):
        assert absolute_uri(other) == other
    assert store_uri(TrackingConfig(), "100%") == sqlite_uri(here / "100%/mlflow.db")
    assert store_uri(TrackingConfig("sqlite:///m.db"), "s") == f"sqlite:///{here}/m.db"


def test_runs_and_their_artifacts_are_in_a_storage_folder_of_any_name(here: Path) -> None:
    storage = here / "~x" / "a b [x] 100% ü #1"
    tracking = connect(TrackingConfig(), storage)
    run_id = tracking.start_run("a/", "a", tags={})
    tracking.log_text(run_id, "text", "config.yaml")
    assert open_store(TrackingConfig(), os.path.relpath(storage)).read_text(run_id, "config.yaml") == "text"
    assert {path.name for path in storage.iterdir()} == {"artifacts", "mlflow.db", ".mlflow.db.lock"}
    assert len(list(storage.rglob("config.yaml"))) == 1
    assert [path.name for path in here.iterdir()] == ["~x"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "~/none.yaml"],
        ["sweep", "~/none.yaml"],
        ["eval", "~/none", "--storage=~/s"],
        ["report", "none", "--storage=~/s"],
        ["propose", "~/none", "--out=~/o.yaml"],
        ["doctor", "--cluster=~/none.yaml"],
        ["submit", "~/none.yaml", "--working-dir=~"],
    ],
)
def test_options_of_the_command_line_know_the_home_folder(
    here: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "home/none" in said or "home/s" in said
    assert not list(here.iterdir())


def test_tables_are_read_from_files_of_any_name(here: Path) -> None:
    for name in ("a[1]", "b c%20"):
        (here / f"{name}.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
        assert len(list(documents(CorpusConfig("json", [f"{name}.jsonl"])))) == 2
