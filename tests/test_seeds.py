"""Tests draw the same numbers again and again, until others are asked for."""

import random

import numpy as np
import pytest
import torch

from tests.draw import Draw
from tests.seeds import seed_generators, seed_of


def test_a_seed_is_that_of_the_name_unless_another_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GSA_TEST_SEED", raising=False)
    assert seed_of("a") == seed_of("a") != seed_of("b")
    assert f"GSA_TEST_SEED={seed_of('a')}\n" in capsys.readouterr().out
    monkeypatch.setenv("GSA_TEST_SEED", "7")
    assert seed_of("a") == seed_of("b") == 7
    monkeypatch.setenv("GSA_TEST_SEED", "random")
    assert len({seed_of("a") for _ in range(5)}) > 1
    monkeypatch.setenv("GSA_TEST_SEED", "rnd")
    with pytest.raises(ValueError, match="rnd"):
        seed_of("a")


def test_equal_seeds_draw_equal_numbers() -> None:
    one, again, other = Draw(3), Draw(3), Draw(4)
    drawn = [(d.random.random(), d.normal(4).tolist(), d.integers(0, 100, 4).tolist()) for d in (one, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_draws_from_a_global_generator_draws_from_the_seed_of_the_test_too(drawn_seed: int) -> None:
    drawn = random.random(), float(torch.rand(())), float(np.random.random())
    seed_generators(drawn_seed)
    assert (random.random(), float(torch.rand(())), float(np.random.random())) == drawn
