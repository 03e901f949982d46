"""Compile every kernel, as it is launched on a GPU, for one GPU: `python -m tests.kernels.compile 90`.

Needs no GPU. Prints a line for each kernel: its name, its registers and what it spills, in bytes.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from kernels import attend, choose, divergence, levels, scan, unions, windows

INTEGERS = {"starts", "lasts", "words", "counts", "ranks", "ends", "states", "values", "found", "members", "wanted"}
INTEGERS |= {"keys", "list_keys", "list_words", "list_counts", "numbers", "firsts", "of_key", "near", "sinks"}
FLOATS = {"biases", "bounds", "samples", "sums", "lse", "delta", "loss", "dweight", "dbias"}
FLOATS |= {"dk", "dv", "dk_unit", "dv_unit"}
SCALARS = {"scale", "index_scale", "tau", "threshold"}
ROUNDED = {"q", "k", "v", "out", "grad", "dq", "index_q", "index_k", "weights"}

ATTEND = {"HEADS": 32, "KV_HEADS": 8, "PARTS": 1, "BLOCK": 64, "ROUNDED": True}
SCORES = {"KIND": 0, "FAST": True}
ONE_HEAD = {"HEADS": 1, "D": 128, "DP": 128, "RAW": True, **SCORES}
FOUR_HEADS = {"HEADS": 4, "D": 64, "DP": 64, "RAW": False, **SCORES}
DIVERGENCE = {
    "HEADS": 32, "KV_HEADS": 8, "D": 128, "PART": 4, "PARTS": 1, "KIND": 0, "FAST": True, "ROUNDED": True, "BLOCK": 64,
}  # fmt: skip
KL_FOUR = {**DIVERGENCE, "INDEX_HEADS": 4, "PADDED": 4, "INDEX_D": 64, "INDEX_P": 64}
KL_ONE = {**DIVERGENCE, "INDEX_HEADS": 1, "PADDED": 1, "INDEX_D": 128, "INDEX_P": 128}


def launches() -> list[tuple[Any, dict[str, Any], dict[str, int]]]:
    """Kernels with their constants and options."""
    four, eight = {"num_warps": 4}, {"num_warps": 8, "num_stages": 3}
    found: list[tuple[Any, dict[str, Any], dict[str, int]]] = [
        (unions._list, {"LISTED": False, "PARTS": 1, "TILE": 32, "PAD": 128, "BLOCK": 1024}, {"num_warps": 8}),
        (unions._list, {"LISTED": True, "PARTS": 2, "TILE": 16, "PAD": 128, "BLOCK": 1024}, {"num_warps": 8}),
        (windows._spread, {"BLOCK": 1024}, four),
        (levels._widen_kernel, {"BLOCK": 1024}, four),
        (scan.bound, {"TILE": 32, "P": 4096}, four),
        (choose.choose, {"P": 4096}, {"num_warps": 8}),
        (choose.choose, {"P": 8192}, {"num_warps": 16}),
        (choose.choose_tied, {"ROWS": 8, "P": 1024}, four),
        (divergence._forward, KL_ONE, {"num_warps": 8, "num_stages": 2}),
        (divergence._forward, KL_FOUR, {"num_warps": 8, "num_stages": 2}),
    ]
    found += [
        (divergence._backward, {**shape, "FIXED": fixed}, {"num_warps": 8, "num_stages": 2})
        for shape in (KL_ONE, KL_FOUR)
        for fixed in (False, True)
    ]
    for size in (64, 128):
        shape = {**ATTEND, "D": size}
        found.append((attend._forward, {**shape, "TILE": 16, "PART": 4}, {"num_warps": 4, "num_stages": 5}))
        found.append((attend._products, {"D": size, "ROWS": 64}, four))
        for fixed in (False, True):
            constants = {**shape, "TILE": 32, "PART": 4, "FIXED": fixed, "BLOCK": 32 if fixed else 64}
            found.append((attend._backward, constants, {"num_warps": 8, "num_stages": 2}))
    for shape in (ONE_HEAD, FOUR_HEADS):
        for listed in (False, True):
            wide = {**shape, "LISTED": listed, "M": 32, "N": 128}
            found.append((scan.sample, wide, eight))
            sums = (0,) if shape["RAW"] else (0, 1, 2, 3)
            found += [(scan.mark, {**wide, "SUM": kind}, eight) for kind in sums]
            found.append((choose.search, {**shape, "LISTED": listed, "M": 16, "N": 128, "FORCES": True}, four))
        found.append((choose.rescore, {**shape, "M": 16, "N": 128, "FORCES": True}, four))
    return found


def compile_one(kernel: Any, constants: dict[str, Any], options: dict[str, int], capability: int) -> tuple[int, int]:
    """Registers and spilled bytes of a kernel."""
    signature, values, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(place,)] = "constexpr", constants[name]
            continue
        signature[name] = kind_of(kernel, name, constants)
        if signature[name].startswith("*") or name in ("num_keys", "num_rows", "capacity"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(nvidia.__file__).parent / "bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", report.stdout)[-1]
    return int(registers), int(stack)


def kind_of(kernel: Any, name: str, constants: dict[str, Any]) -> str:
    """The type of a kernel's argument."""
    of_words = kernel in (windows._spread, levels._widen_kernel)
    if name in ("dk", "dv"):
        return "*i64" if constants["FIXED"] else "*fp32"
    if name == "grad" and "INDEX_D" in constants:
        return "*fp32"
    if name in ROUNDED and not (name == "out" and of_words):
        return "*bf16"
    if name in INTEGERS or (name in ("out", "number") and of_words):
        return "*i32"
    if name in SCALARS:
        return "fp32"
    return "*fp32" if name in FLOATS else "i32"


if __name__ == "__main__":
    for kernel, constants, options in launches():
        registers, spilled = compile_one(kernel, constants, options, int(sys.argv[1]))
        print(f"{kernel.__module__}.{kernel.__name__} {constants} registers {registers} spilled {spilled}", flush=True)
