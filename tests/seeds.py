"""The seed of each test: fixed by default, so that a test fails again where it failed once, or random on demand.

`--seed random` (or `GSA_TEST_SEED=random`) draws another seed for every test, `--seed N` (`GSA_TEST_SEED=N`) gives all
of them N: a test that fails prints its own. Otherwise a test's seed comes from its name.
"""

import hashlib
import os
import random
import secrets

import hypothesis
import numpy as np
import torch

BOUND = 2**31

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("random", deadline=None)


def configure(asked: str | None) -> None:
    """Take the option of the command line over into the environment, where workers of tests find it."""
    if asked is not None:
        os.environ["GSA_TEST_SEED"] = asked
    hypothesis.settings.load_profile("random" if os.environ.get("GSA_TEST_SEED") == "random" else "fixed")


def seed_of(name: str) -> int:
    """The seed of a test, printed for where it fails.

    Raises:
        ValueError: `GSA_TEST_SEED` is neither `random` nor an integer.
    """
    asked = os.environ.get("GSA_TEST_SEED")
    if not asked:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % BOUND
    elif asked == "random":
        seed = secrets.randbelow(BOUND)
    else:
        seed = int(asked)
    print(f"GSA_TEST_SEED={seed}")
    return seed


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
