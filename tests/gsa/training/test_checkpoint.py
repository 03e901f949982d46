"""Checkpoints are whole or not there, come back as they were, and are refused when they are not what they say."""

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from gsa import load_checkpoint
from gsa.config import TrainConfig, build, to_yaml
from gsa.data.tokenizer import Tokenizer, TokenizerConfig
from gsa.errors import RequestError, RunError
from gsa.model import GSAForCausalLM
from gsa.training import checkpoint
from gsa.training.checkpoint import Checkpoint, save
from gsa.training.steps import steps
from tests.draw import Draw

TOKENIZER = Tokenizer.train(TokenizerConfig("byte"), [])


@pytest.fixture
def model(draw: Draw) -> GSAForCausalLM:
    return draw.model(dtype=torch.float32)


def write(model: GSAForCausalLM, folder: Path, step: int = 3, keep: int = 2) -> Path:
    config = build(TrainConfig, {"storage": str(folder)})
    config.model = model.config
    state = {"step": step, "random": torch.get_rng_state()}
    return save(
        folder,
        step,
        model=model,
        state=state,
        config_yaml=to_yaml(config),
        tokenizer=TOKENIZER,
        metrics={"a": 0.1},
        keep=keep,
    )


def test_a_model_comes_back_to_the_bit_from_a_checkpoint_and_from_a_runs_folder(
    model: GSAForCausalLM, tmp_path: Path, draw: Draw
) -> None:
    folder = write(model, tmp_path)
    tokens = draw.integers(0, 10, 2, 9)
    for source in (folder, str(tmp_path)):
        loaded = load_checkpoint(source)
        assert not loaded.training
        assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert torch.equal(loaded(tokens), model.eval()(tokens))
    found = Checkpoint.open(folder)
    assert (found.step, found.metrics, found.state()["step"]) == (3, {"a": 0.1}, 3)
    assert found.tokenizer().encode("é") == TOKENIZER.encode("é")


def test_the_last_n_are_kept(model: GSAForCausalLM, tmp_path: Path) -> None:
    for step in range(1, 7):
        write(model, tmp_path, step, keep=3)
    assert [int(p.name[5:]) for p in steps(tmp_path)] == [4, 5, 6]
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.step == 6


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "config.yaml", "tokenizer.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_harmed_file_is_refused_by_name(
    model: GSAForCausalLM, tmp_path: Path, draw: Draw, name: str, harm: str
) -> None:
    folder = write(model, tmp_path)
    content = bytearray((folder / name).read_bytes())
    if harm == "remove":
        (folder / name).unlink()
    else:
        if harm == "flip":
            content[draw.random.randrange(len(content))] ^= 1
        (folder / name).write_bytes(content if harm == "flip" else content[:-1])
    with pytest.raises(RequestError, match=f"the checkpoint is corrupt: {name}"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"format": "other"}', '{"format": "gsa-checkpoint-1"}', "\0"]
)
def test_a_foreign_folder_is_refused(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    if content is not None:
        (tmp_path / "checkpoint.json").write_text(content)
    with pytest.raises(RequestError, match=str(tmp_path)):
        load_checkpoint(tmp_path)
    with pytest.raises(RequestError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere")


def test_an_index_cannot_name_files_outside_its_folder(model: GSAForCausalLM, tmp_path: Path) -> None:
    folder = write(model, tmp_path)
    index = json.loads((folder / "checkpoint.json").read_text())
    index["sha256"]["../../outside"] = "0" * 64
    (folder / "checkpoint.json").write_text(json.dumps(index))
    with pytest.raises(RequestError, match="is not of the format"):
        load_checkpoint(folder)


def test_weights_of_another_model_are_refused(model: GSAForCausalLM, tmp_path: Path, draw: Draw) -> None:
    folder = write(model, tmp_path)
    other = draw.config()
    other.hidden_size = model.config.attention.hidden_size + 2
    config = build(TrainConfig, {"model": {"vocab_size": 11, "num_layers": 1}})
    with pytest.raises(RequestError, match="the weights do not fit the model"):
        Checkpoint.open(folder).load_model(GSAForCausalLM(config.model))


def test_nothing_in_a_checkpoint_is_unpickled(model: GSAForCausalLM, tmp_path: Path) -> None:
    folder = write(model, tmp_path)

    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "harmed",)  # type: ignore[return-value]

    torch.save({"optimizer": Harm()}, folder / "state.pt")
    index = json.loads((folder / "checkpoint.json").read_text())
    index["sha256"]["state.pt"] = checkpoint._sha256(folder / "state.pt")
    (folder / "checkpoint.json").write_text(json.dumps(index))
    with pytest.raises(RequestError, match=r"state\.pt"):
        Checkpoint.open(folder).state()
    assert not (tmp_path / "harmed").exists()


def test_a_full_disk_is_told_in_one_line_and_leaves_earlier_checkpoints(
    model: GSAForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real file-size limit of the process stands in for the disk: writing fails in the kernel."""
    import resource
    import signal

    write(model, tmp_path, 3)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(RunError, match="checkpoint of step 6 could not be written") as failed:
            write(model, tmp_path, 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert "step-000000003 is intact" in str(failed.value)
    assert "\n" not in str(failed.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000003"]
    load_checkpoint(tmp_path)


def test_what_a_crash_left_half_written_is_no_checkpoint(model: GSAForCausalLM, tmp_path: Path) -> None:
    folder = write(model, tmp_path, 3)
    shutil.copytree(folder, tmp_path / ".step-000000006.123")
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.step == 3
    write(model, tmp_path, 9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000003", "step-000000009"]


class Killed(BaseException):
    """Stands in for a SIGKILL: nothing of `save` handles it."""


def test_a_process_killed_at_any_moment_of_a_save_leaves_whole_checkpoints_alone(
    model: GSAForCausalLM, tmp_path: Path
) -> None:
    """Killed before each system call that changes a folder, where one checkpoint is kept."""
    folder, first = tmp_path / "run", tmp_path / "first"
    write(model, first, 3)
    for calls in itertools.count():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(first, folder)
        hooks.append(dies_after(calls))
        try:
            write(model, folder, 6, keep=1)
            break
        except Killed:
            pass
        finally:
            hooks.clear()
        assert {Checkpoint.open(path).step for path in steps(folder)} in ({3}, {3, 6}, {6})
        checkpoint.remove_unfinished(folder)  # as the next life of the run does
        assert list(folder.iterdir()) == steps(folder)
    assert calls >= 9  # mkdir, two renames, five files and their folder
    assert [p.name for p in folder.iterdir()] == ["step-000000006"]


hooks: list[Callable[[str], None]] = []


def audit(event: str, arguments: tuple[object, ...]) -> None:
    for hook in hooks:
        hook(event)


sys.addaudithook(audit)  # it stays for ever, and does nothing without hooks


def dies_after(calls: int) -> Callable[[str], None]:
    left = iter(range(calls))

    def hook(event: str) -> None:
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") and next(left, None) is None:
            raise Killed

    return hook


def test_a_whole_checkpoint_of_the_same_step_is_not_written_again_and_a_harmed_one_is(
    model: GSAForCausalLM, tmp_path: Path
) -> None:
    folder = write(model, tmp_path, 3, keep=1)
    written = folder.stat()
    assert write(model, tmp_path, 3, keep=1) == folder
    assert (folder.stat().st_ino, folder.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    (folder / "state.pt").write_bytes(b"harmed")
    write(model, tmp_path, 3, keep=1)
    assert Checkpoint.open(folder).step == 3
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000003"]
