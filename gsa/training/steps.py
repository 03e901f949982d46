"""Where the checkpoints of a run are. Light: nothing of torch."""

from pathlib import Path

PREFIX = "step-"


def steps(folder: Path) -> list[Path]:
    """The finished checkpoints in a folder, oldest first."""
    return sorted(folder.glob(f"{PREFIX}*"))
