"""A run that is asked to stop saves the step in hand, and goes on from there to the same model."""

from pathlib import Path

import pytest
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.testing import assert_close

from gsa.errors import InfrastructureError
from gsa.training.steps import PREFIX, steps
from gsa.training.workers import Workers
from tests.draw import Draw
from tests.gsa.training.test_loop import Logged, train, trainer_of, untimed, weights
from tests.text import tiny


def last_step(folder: Path) -> int:
    return int(steps(folder)[-1].name.removeprefix(PREFIX))


def test_a_stop_saves_the_step_in_hand_and_the_run_goes_on_to_the_same_model(draw: Draw, tmp_path: Path) -> None:
    data = tiny(tmp_path, draw.random.randrange(1000), training__checkpoint_every=1000)
    whole, expected = train(data, tmp_path / "whole")
    logged: Logged = []
    done = 0
    while done < 12:
        trainer = trainer_of(data, tmp_path / "parts")
        left = draw.random.randint(1, 5)
        until = min(done + left, 12)
        trainer.train(lambda step, metrics: logged.append((step, metrics)), stop=lambda: trainer.step >= until)  # noqa: B023
        assert trainer.step == last_step(tmp_path / "parts") == until
        done = until
    assert_close(weights(trainer), weights(whole), rtol=0, atol=0)
    assert untimed(sorted(dict(logged).items())) == untimed(expected)


def test_a_stop_before_the_first_step_trains_and_saves_nothing(draw: Draw, tmp_path: Path) -> None:
    trainer = trainer_of(tiny(tmp_path, draw.random.randrange(1000)), tmp_path / "run")
    assert trainer.train(lambda step, metrics: None, stop=lambda: True) == {}
    assert trainer.step == 0
    assert not steps(tmp_path / "run")


def test_a_checkpoint_that_cannot_be_written_is_the_fault_of_the_disk(draw: Draw, tmp_path: Path) -> None:
    trainer = trainer_of(tiny(tmp_path, draw.random.randrange(1000)), tmp_path / "run")
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(InfrastructureError, match="checkpoint of step 3 could not be written"):
        trainer.train(lambda step, metrics: None)


def _ask(rank: int, meeting: str) -> None:
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    workers = Workers.current()
    assert workers.any(rank == 1)  # asked of one, known to all
    assert not workers.any(False)
    dist.destroy_process_group()


@pytest.mark.slow
def test_workers_agree_to_stop_when_one_of_them_is_asked_to(tmp_path: Path) -> None:
    spawn(_ask, (str(tmp_path / "meeting"),), nprocs=2)
