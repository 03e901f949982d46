"""Every kernel compiles for the GPUs it is meant for, and none spills registers: this needs no GPU."""

import os
import re
import subprocess
import sys

import pytest

from tests.kernels.compile import launches, one_of_each

SHARED = {80: 163, 89: 99, 90: 227, 100: 227}  # KiB of shared memory that a program may have
# GPUs for which every launch is compiled: what runs on the others is what runs on 8.0, and one launch of each kernel
# shows that it compiles
WHOLE = (80, 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_without_spilling(capability: int) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.compile", str(capability)]
    expected = launches(tuned=capability == 90)
    if capability not in WHOLE:
        command.append("--one-of-each")
        expected = one_of_each(expected)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}  # a tenth of the time
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected)
    spilling = [line for line in lines if not line.endswith("spilled 0")]
    assert spilling == []
    shared = [int(found) for line in lines for found in re.findall(r" shared (\d+) ", line)]
    assert len(shared) == len(lines)
    assert max(shared) <= SHARED[capability] * 1024
