"""Compile every kernel, as it is launched on a GPU, for one GPU: `python -m tests.kernels.compile 90 [--one-of-each]`.

Needs no GPU. Prints a line for each kernel: its name, its registers, its shared memory and what it spills, in bytes.
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
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from kernels import (
    attend,
    choose,
    dense_divergence,
    divergence,
    few,
    hopper,
    hopper_backward,
    levels,
    marks,
    marks_written,
    rows,
    scan,
    split,
    target,
    target_tiles,
    unions,
    windows,
)

INTEGERS = {"starts", "lasts", "words", "counts", "ranks", "ends", "states", "values", "found", "members", "wanted"}
INTEGERS |= {
    "keys",
    "open_words",
    "partial",
    "list_keys",
    "list_words",
    "list_counts",
    "numbers",
    "firsts",
    "of_key",
    "near",
    "sinks",
    "busy",
    "given",
    "out_starts",
    "out_lasts",
    "walks",
    "places",
    "taken",
    "tops",
    "sures",
    "bits",
    "led_starts",
    "led_lasts",
    "led_nominal",
    "led_wanted",
}
FLOATS = {"biases", "bounds", "ceilings", "samples", "sums", "lse", "delta", "dweight", "dbias"}
FLOATS |= {"negative_entropy", "expected", "mass", "losses"}
FLOATS |= {"logs", "dk", "dv", "dk_unit", "dv_unit"}
SCALARS = {"scale", "unit", "index_scale", "tau", "threshold"}
ROUNDED = {"q", "k", "v", "out", "grad", "dq", "index_q", "index_k", "weights"}

ATTEND = {"HEADS": 32, "KV_HEADS": 8, "PARTS": 1, "BLOCK": 64, "ROUNDED": True}
SCORES = {"KIND": 0, "FAST": True}
ONE_HEAD = {"HEADS": 1, "D": 128, "DP": 128, "RAW": True, **SCORES}
FOUR_HEADS = {"HEADS": 4, "D": 64, "DP": 64, "RAW": False, **SCORES}
KL_ONE = {"HEADS": 1, "PADDED": 1, "D": 128, "DP": 128, **SCORES}
KL_FOUR = {"HEADS": 4, "PADDED": 4, "D": 64, "DP": 64, **SCORES}


Launch = tuple[Any, dict[str, Any], dict[str, int]]


def one_of_each(of: list[Launch]) -> list[Launch]:
    """The last launch of each kernel."""
    return list({launch[0]: launch for launch in of}.values())


def launches(tuned: bool) -> list[Launch]:
    """Kernels with their constants and options: as they are tuned for sm_90, or as they run elsewhere."""
    four = {"num_warps": 4}
    eight = {"num_warps": 8, "num_stages": 3 if tuned else 2}
    found: list[Launch] = [
        (
            unions._list,
            {"EVEN": True, "LISTED": False, "PARTS": 1, "TILE": 32, "PAD": 128, "BLOCK": 1024},
            {"num_warps": 8},
        ),
        (
            unions._list,
            {"EVEN": False, "LISTED": True, "PARTS": 2, "TILE": 16, "PAD": 128, "BLOCK": 1024},
            {"num_warps": 8},
        ),
        (windows._lead, {"BLOCK": 4096}, {"num_warps": 8}),
        (windows._spread, {"BLOCK": 1024}, four),
        (dense_divergence._busy, {}, four),
        (levels._widen_kernel, {"BLOCK": 1024}, four),
        (scan.prepare, {"SIGMAS": 3, "GIVEN": True, "BLOCK": 256}, four),
        (scan.bound, {"TILE": 32, "P": 4096}, {"num_warps": 2}),
        *(
            (choose.choose, {"P": p, "REST": p // 2}, {"num_warps": p // 512, "maxnreg": 96})
            for p in (2048, 4096, 8192)
        ),
        (choose.choose_long, {"ROWS": 32, "P": 1024}, four),
        (choose.single_out, {"BLOCK": 1024}, four),
        (split._count, {"BLOCK": 4096}, four),
        (split._list, {"BLOCK": 4096, "BLOCKS": 32}, four),
        (split._join, {"HEADS": 32, "D": 128, "SPLITS": 16}, four),
    ]
    for num_keys in (1024, 4096, 8192, 16384):
        constants, options = parted(rows.of_search(num_keys, tuned))
        found += [(rows._find, constants | {"FORCES": forces}, options) for forces in (False, True)]
        constants, options = parted(rows.of_sums(num_keys))
        kinds = range(4) if num_keys in (1024, 16384) else range(1)
        found += [(rows._sums, constants | {"SUM": kind}, options) for kind in kinds]
    found.append((rows._turn, {"BLOCK": 32}, {"num_warps": 1}))
    for shape in (ONE_HEAD, FOUR_HEADS):
        of_block = {"M": few.MANY, "N": 128 if shape["HEADS"] == 1 else 64 if tuned else 32, "BLOCKS": 4, "SOME": False}
        found += [
            (few._score, {**shape, **of_block, "OPEN": open_}, {"num_warps": 8, "num_stages": 2})
            for open_ in (False, True)
        ]
    for some in (False, True):
        of_block = {"M": 16, "N": 128, "BLOCKS": 4, "SOME": some}
        options = {"num_warps": 4, "num_stages": 3}
        found += [
            (few._score, {**shape, **of_block, "OPEN": open_}, options)
            for shape in (ONE_HEAD, FOUR_HEADS)
            for open_ in (False, True)
        ]
        constants = {"SOME": some, "DIGITS": 4, "BLOCK": 4096, "BINS": 256}
        found += [(few._count, {**constants, "DIGIT": digit}, {"num_warps": 8}) for digit in range(4)]
        found.append((few._set, constants, {"num_warps": 8, "maxnreg": 96}))
    for shape in (KL_ONE, KL_FOUR):
        once = {"RUNS": target.RUNS, "ROUNDED": True, "DIFFERENTIATES": True}
        for fixed in (False, True):
            of_sums, of_gradients = divergence.launches(tuned, shape["HEADS"], fixed)
            constants, options = parted(of_sums)
            found.append((divergence._sums, shape | constants, options))
            constants, options = parted(of_gradients)
            found.append((divergence._gradients, shape | once | {"FIXED": fixed} | constants, options))
    for size in (64, 128):
        shape = {**ATTEND, "D": size}
        found.append((split._attend, {**shape, "PART": 16, "STEP": 256}, {"num_warps": 4, "num_stages": 3}))
        found.append((attend._products, {"D": size, "ROWS": 64}, four))
        of_tile = {**shape, "PART": 4, "TILE": 16, "BLOCK": 64 if tuned else 32}
        found.append((attend._forward, {**of_tile, "WIDE": False}, {"num_warps": 4, "num_stages": 5 if tuned else 2}))
        if tuned:
            heads = {"HEADS": 32, "KV_HEADS": 8, "D": size}
            for far in (False, True):
                tile = {"PART": 4, "TILE": 32, "PARTS": 1, "WIDE": False, "FAR": far}
                constants, options = parted(hopper.LAUNCH)
                found.append((hopper.attend_tiles, heads | tile | constants, options))
                constants, options = parted(hopper_backward.LAUNCH)
                found.append((hopper_backward.gradient_tiles, heads | tile | constants, options))
            constants, options = parted(target_tiles.LAUNCH | {"RUNS": target_tiles.RUNS})
            found += [
                (
                    target_tiles.mean_tiles,
                    heads | {"PART": part, "PARTS": 4 // part, "WIDE": False} | constants,
                    options,
                )
                for part in (1, 2, 4)
            ]
            constants, options = parted(dense_divergence.LAUNCH | {"RUN": dense_divergence.RUN})
            one, four_heads = (
                {"INDEX_HEADS": 1, "INDEX_D": 128, "KIND": 0},
                {"INDEX_HEADS": 4, "INDEX_D": 64, "KIND": 2},
            )
            found += [(dense_divergence._divergence, heads | x | constants, options) for x in (one, four_heads)]
        of_mean = {name: shape[name] for name in ("HEADS", "KV_HEADS", "D", "PARTS")}
        found.append((target.mean, {**of_mean, "PART": 4, "WIDE": False, "BLOCK": 64 if tuned else 32}, eight))
        for fixed in (False, True):
            constants = {**of_tile, "TILE": 32, "BLOCK": 32 if fixed else 64} if tuned else of_tile
            found.append((attend._backward, {**constants, "FIXED": fixed}, eight))
    for shape in (ONE_HEAD, FOUR_HEADS):
        several = shape["HEADS"] > 1
        for listed in (False, True):
            wide = {**shape, "LISTED": listed, "M": 32, "N": 128 if tuned and not (listed and several) else 64}
            found.append((scan.sample, wide, eight))
            mark = {**wide, "N": 64 if several else wide["N"], "M": 16 if several and not tuned else 32}
            found += [(scan.mark, {**mark, "SUM": kind}, eight) for kind in range(4 if several else 1)]
            if several:
                found.append((scan.sample, {**wide, "N": 64}, eight))
            found.append(
                (choose.search, {**shape, "LISTED": listed, "M": 16, "N": 64 if tuned else 32}, {"num_warps": 8})
            )
        if tuned:
            width = shape["HEADS"] * shape["D"]
            for launch, sums in ((marks.PLAIN, (0,)), (marks.SUMMING, (1, 2, 3))):
                constants, options = parted(launch)
                stages = marks.held_blocks(width, shape["D"])
                constants |= {name: shape[name] for name in ("HEADS", "D", "KIND")} | {"STAGES": stages}
                found += [(marks.mark, {**constants, "RAW": shape["RAW"] and not x, "SUM": x}, options) for x in sums]
    return found


def parted(launch: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """What a kernel's code depends on, which is in capitals, and the compiler's options."""
    constants = {name: value for name, value in launch.items() if name.isupper()}
    return constants, {name: value for name, value in launch.items() if name not in constants}


def compile_one(
    kernel: Any, constants: dict[str, Any], options: dict[str, int], capability: int
) -> tuple[int, int, int]:
    """Registers, spilled bytes and bytes of shared memory of a kernel."""
    signature, values, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(place,)] = "constexpr", constants[name]
            continue
        signature[name] = kind_of(kernel, name, constants)
        if signature[name].startswith("*") or name in ("num_keys", "num_rows", "capacity"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source_of = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_of(kernel, signature, values, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(nvidia.__file__).parent / "bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", report.stdout)[-1]
    return int(registers), int(stack), int(compiled.metadata.shared)


def kind_of(kernel: Any, name: str, constants: dict[str, Any]) -> str:
    """The type of a kernel's argument."""
    if kernel in (dense_divergence._divergence, marks.mark) and name in ("q", "k", "index_q", "index_k"):
        rows = marks_written.BLOCK.value if kernel is marks.mark and name == "k" else 128
        block = [rows, constants["INDEX_D" if name.startswith("index") else "D"]]
        return f"tensordesc<bf16{block},{gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)!r}>"
    if name == "marks":
        return "*i32" if kernel in (choose.choose, choose.choose_long) else "*i64"
    of_words = kernel in (windows._lead, windows._spread, levels._widen_kernel)
    if name in ("carried", "led"):
        return "*i8"
    if kernel is windows._lead and name in ("starts", "lasts", "nominal", "wanted", "leaders"):
        return "*i64"
    if name in ("dk", "dv"):
        return "*i64" if constants.get("FIXED") else "*fp32"
    if name == "targets":
        return "*fp16"
    if kernel is divergence._gradients and name == "dq":
        return "*fp32"
    if name in ROUNDED and not (name == "out" and of_words):
        return "*bf16"
    if name in INTEGERS or (name in ("out", "number") and of_words):
        return "*i32"
    if name in SCALARS:
        return "fp32"
    return "*fp32" if name in FLOATS else "i32"


if __name__ == "__main__":
    of_gpu = int(sys.argv[1])
    wanted = launches(tuned=of_gpu == 90)
    for kernel, constants, options in one_of_each(wanted) if "--one-of-each" in sys.argv else wanted:
        registers, spilled, shared = compile_one(kernel, constants, options, of_gpu)
        name = f"{kernel.__module__}.{kernel.__name__}"
        print(f"{name} {constants} registers {registers} shared {shared} spilled {spilled}", flush=True)
