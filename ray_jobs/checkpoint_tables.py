"""What `gsa eval` has measured of a checkpoint, on a terminal."""

from rich.console import Console

from gsa.evaluation.report import CheckpointReport
from ray_jobs.tables import Column, header_of, show_columns


def show(found: CheckpointReport, console: Console) -> None:
    """Print losses, attention by layer and retrieval."""
    console.print(
        f"step {found.step}: held-out loss {found.metrics['held_out_loss']:.4f} nats per token, "
        f"{found.metrics['held_out_bits_per_byte']:.4f} bits per byte"
    )
    layer = Column("layer", [str(i) for i in range(len(found.layers))], right=True)
    measured = [
        Column(header_of(name), [f"{row[name]:.4f}" if name in row else "" for row in found.layers], right=True)
        for name in found.layer_names
    ]
    show_columns(console, "attention by layer, held-out text", [layer], measured)
    if found.retrieval_refused:
        console.print(f"no pass-key retrieval: {found.retrieval_refused}", markup=False)
        return
    rows = found.retrieval
    retrieval = [
        Column("accuracy", [f"{r.accuracy:.2f}" for r in rows], right=True),
        Column("loss", [f"{r.loss:.3f}" for r in rows], right=True),
        Column("loss\nwithout", [f"{r.loss_without:.3f}" for r in rows], right=True),
    ]
    show_columns(console, "pass-key retrieval", [Column("depth", [f"{r.depth:.2f}" for r in rows])], retrieval)
