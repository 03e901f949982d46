"""Small random text, and the settings of a model that trains on it within a second or two."""

import random
from pathlib import Path
from typing import Any

WORDS = [
    "if",
    "else",
    "for",
    "in",
    "return",
    "def",
    "import",
    "x",
    "y",
    "z",
    "self",
    "None",
    "=",
    "+",
    "(",
    ")",
    ":",
    "é",
    "漢",
]


def write_files(folder: Path, seed: int, files: int = 6, lines: int = 60) -> list[str]:
    """Text files of random lines with some structure; returns their paths."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(files):
        rows = (
            " ".join(draw.choices(WORDS, weights=range(len(WORDS), 0, -1), k=draw.randint(1, 9))) for _ in range(lines)
        )
        path = folder / f"{i}.txt"
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        paths.append(str(path))
    return paths


def tiny(folder: Path, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A training configuration as plain data; `changes` are dotted keys with `__` for the dots."""
    config: dict[str, Any] = {
        "name": "tiny",
        "storage": str(folder / "runs"),
        "seed": seed,
        "model": {
            "num_layers": 2,
            "intermediate_size": 24,
            "attention": {
                "hidden_size": 16,
                "num_heads": 2,
                "num_kv_heads": 1,
                "head_dim": 8,
                "indexer": {"num_heads": 2, "head_dim": 8},
                "controller": {"kind": "variance", "k": 6, "k_min": 2, "k_max": 12},
            },
        },
        "data": {
            "corpus": {"source": "text", "files": write_files(folder / "text", seed), "held_out_fraction": 0.3},
            "tokenizer": {"kind": "byte"},
            "context_length": 24,
        },
        "training": {
            "stages": [
                {"kind": "dense", "steps": 4},
                {"kind": "warmup", "steps": 4},
                {"kind": "sparse", "steps": 4},
            ],
            "batch_size": 4,
            "micro_batch_size": 2,
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
            "log_every": 2,
            "checkpoint_every": 3,
        },
        "evaluation": {"every": 4, "sequences": 6, "batch_size": 4},
        "tracking": {"system_metrics": False},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        place = config
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return config
