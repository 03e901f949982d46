"""The table of forwards in RESULTS.md, rendered from results.json by `python -m kernels.results`."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COLUMNS = (
    "T",
    "heads",
    "indexer",
    "u(32)",
    "selection",
    "attention",
    "together",
    "cuDNN",
    "FlashAttention-2",
    "against cuDNN",
    "peak, GiB",
)


def forwards() -> list[dict[str, Any]]:
    """Measured forwards, from results.json. Times are milliseconds; `kernels_…` is without the host's part."""
    found: list[dict[str, Any]] = json.loads((HERE / "results.json").read_text(encoding="utf-8"))["forward"]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(_cells, rows)]
    return "".join(f"|{'|'.join(line)}|\n" if line[0] == "---" else f"| {' | '.join(line)} |\n" for line in lines)


def rendered(document: str) -> str:
    """RESULTS.md with its table of forwards as results.json has it."""
    before, header, rest = document.partition(f"| {' | '.join(COLUMNS)} |\n")
    if not header:
        raise ValueError("RESULTS.md has no table of forwards")
    after = rest.splitlines(keepends=True)
    while after and after[0].startswith("|"):
        after.pop(0)
    return before + table(forwards()) + "".join(after)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    digits = 1 if row["length"] >= 2**15 else 2
    indexer = f"{row['indexer_heads']}×{row['indexer_head_dim']}"
    if "share" in row:
        indexer += f", windows of {row['share']}"
    if "block" in row:
        indexer += f", two levels (blocks of {row['block']}, {row['candidates']}·k candidates)"
    together, speedup = f"{row['together_ms']:.{digits}f}", _ratio(row["speedup"])
    if "kernels_ms" in row:
        together += f" (kernels {row['kernels_ms']:.{digits}f})"
        speedup += f" (kernels {_ratio(row['kernels_speedup'])})"
    return (
        f"{row['length'] // 1024}K",
        f"{row['heads']}/{row['kv_heads']}",
        indexer,
        f"{row['u32']:.2f}",
        f"{row['selection_ms']:.{digits}f}",
        f"{row['attention_ms']:.{digits}f}",
        together,
        f"{row['cudnn_ms']:.{digits}f}",
        f"{row['flash_ms']:.{digits}f}" if "flash_ms" in row else "–",
        speedup,
        f"{row['peak_gib']:.1f}",
    )


def _ratio(value: float) -> str:
    return f"{value:.{1 if value > 1.1 else 2}f}×"


if __name__ == "__main__":
    path = HERE / "RESULTS.md"
    path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
