"""The command line, `gsa`.

Exit codes: 0 done, 1 a run failed, 2 the request was wrong, 130 interrupted (state saved, resume command printed).
"""

import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn, TextIO, cast

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from gsa.errors import InfrastructureError, RequestError, RunError
from gsa.paths import of_user, sqlite_uri
from ray_jobs.signals import Saved, interrupt, stops_go_to
from ray_jobs.streams import Stream

app = typer.Typer(
    help="Find the best Gated Sparse Attention model for your data and your hardware.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console(file=cast(TextIO, Stream("stdout")))
errors = Console(file=cast(TextIO, Stream("stderr")))
LINE = 1000  # characters of an error


def _path(text: str | Path) -> Path:
    """A path as a user writes it; no shell fills in `~` in `--option=~/file`."""
    return Path(of_user(str(text)))


Config = Annotated[
    Path, typer.Argument(parser=_path, help="YAML file of the configuration", metavar="CONFIG", show_default=False)
]
Sweep = Annotated[Path | None, typer.Argument(parser=_path, help="YAML file of the sweep", metavar="CONFIG")]
Resume = Annotated[str | None, typer.Option(metavar="NAME", help="continue this sweep, whatever ended it")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings to replace", metavar="[key=value]...")]
Storage = Annotated[Path, typer.Option(parser=_path, metavar="PATH", help="folder of runs, checkpoints and caches")]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow tracking URI; default: SQLite in the storage folder")]
Address = Annotated[
    str, typer.Option(envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"], help="http://HOST:PORT of the head's dashboard")
]
Experiment = Annotated[str, typer.Option(help="MLflow experiment")]


@app.command(epilog="Example: `gsa train configs/train/tiny.yaml training.optimizer.learning_rate=1e-3`")
def train(config: Config, overrides: Overrides = None) -> None:
    """Train one model. Run again after an interruption, it goes on from its newest checkpoint."""
    from ray_jobs.train import load_train, run_train

    settings = load_train(config, overrides)
    command = " ".join(["gsa train", str(config), *(overrides or [])])
    try:
        done = run_train(settings, console, ["gsa", "train", str(config), *(overrides or [])])
    except KeyboardInterrupt as stop:
        _interrupted(command, stop)
    except RunError as error:
        _failed(
            error, f"what was trained is in {settings.storage}/train/{settings.name}; to go on from there: {command}"
        )
    bits = done.metrics.get("held_out_bits_per_byte", float("nan"))
    console.print(f"held-out loss {done.metrics['held_out_loss']:.4f} nats per token, {bits:.4f} bits per byte")
    console.print(f"checkpoints: {done.folder}", markup=False, highlight=False, soft_wrap=True)
    _next(f"gsa eval {done.run_id}{_storage_option(settings.storage)}", f"gsa ui{_storage_option(settings.storage)}")


@app.command(epilog="Example: `gsa sweep configs/sweep/quickstart.yaml num_samples=20`")
def sweep(
    config: Sweep = None,
    overrides: Overrides = None,
    resume: Resume = None,
    storage: Storage = Path("runs"),
) -> None:
    """Search. Ends with the leaderboard and the Pareto front."""
    from ray_jobs.report import show
    from ray_jobs.sweep import load_sweep, resume_sweep, run_sweep

    given = _given("gsa sweep", config, overrides, resume)
    if resume is not None:
        name, folder = resume, str(storage)
    else:
        settings = load_sweep(Path(given[0]), given[1:])
        name, folder = settings.name, settings.train.storage
    try:
        report = resume_sweep(name, folder, console, given) if resume is not None else run_sweep(settings, console)
    except KeyboardInterrupt as stop:
        _interrupted(f"gsa sweep --resume {name}{_storage_option(folder)}", stop)
    except InfrastructureError as error:
        _failed(error, f"no trial is lost. To go on: gsa sweep --resume {name}{_storage_option(folder)}")
    except RunError as error:
        _failed(error, f"to see what happened: gsa report {name}{_storage_option(folder)}")
    show(report, console)
    _next(f"gsa ui{_storage_option(folder)}", f"gsa report {name} --json{_storage_option(folder)}")


@app.command(epilog="Example: `gsa submit configs/sweep/quickstart.yaml train.storage=/shared/runs`")
def submit(
    config: Sweep = None,
    overrides: Overrides = None,
    resume: Resume = None,
    address: Address = "http://127.0.0.1:8265",
    working_dir: Annotated[
        Path, typer.Option(parser=_path, metavar="PATH", help="folder that is uploaded: the project's root")
    ] = Path("."),
    wait: Annotated[bool, typer.Option(help="follow the job's output to its end")] = True,
    storage: Annotated[str, typer.Option(help="with --resume: the cluster's folder of runs")] = "runs",
) -> None:
    """Run a sweep as a job on a Ray cluster. The job goes on when this command is interrupted."""
    from ray_jobs import submit as jobs

    given = _given("gsa submit", config, overrides, resume)
    if resume is not None:
        submission = jobs.resumed_sweep(resume, storage, given, working_dir)
    else:
        submission = jobs.new_sweep(Path(given[0]), given[1:], working_dir)
    client, job = jobs.submit(submission, address)
    there = f"--address {address}"
    commands = [f"ray job logs {there} --follow {job}", f"ray job stop {there} {job}", f"ray job list {there}"]
    console.print(f"job {job}: {submission.entrypoint}", markup=False, highlight=False, soft_wrap=True)
    if not wait:
        _next(*commands)
        return
    try:
        jobs.follow(client, job, console)
    except KeyboardInterrupt:
        errors.print(f"the job goes on; to see it: {commands[0]}", markup=False, highlight=False, soft_wrap=True)
        raise
    except RunError as error:
        _failed(error, f"to go on: gsa submit --resume {submission.sweep} {there} --storage STORAGE")


@app.command(epilog="Example: `gsa report quickstart --html report.html`")
def report(
    sweep: Annotated[str, typer.Argument(help="name of the sweep", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    html: Annotated[
        Path | None, typer.Option(parser=_path, metavar="FILE", help="write a page with plots, one file")
    ] = None,
    parquet: Annotated[
        Path | None, typer.Option(parser=_path, metavar="FILE", help="write a table of all trials")
    ] = None,
    optuna: Annotated[
        str | None, typer.Option(metavar="URL|FILE", help="write an Optuna study, to a database or a journal")
    ] = None,
    storage: Storage = Path("runs"),
    tracking_uri: TrackingUri = None,
    experiment: Annotated[
        str | None, typer.Option(help="MLflow experiment; default: the one that holds the sweep")
    ] = None,
) -> None:
    """Leaderboard, Pareto front and what matters in a sweep, running or ended."""
    from gsa.store import TrackingConfig
    from gsa.tracking import open_run
    from ray_jobs.export import export_study, write_parquet
    from ray_jobs.report import read_report, show
    from ray_jobs.reporting.page import write_html
    from ray_jobs.runs import run_key

    tracking = open_run(TrackingConfig(tracking_uri), storage, run_key(sweep), experiment)
    found = read_report(tracking, sweep)
    if html is not None:
        write_html(found, html)
    if parquet is not None:
        write_parquet(found, parquet)
    if optuna is not None:
        export_study(tracking, found, optuna)
    if json:
        print(found.to_json())
        return
    show(found, console)
    for written in (html, parquet, optuna):
        if written is not None:
            console.print(f"written: {written}", markup=False, highlight=False, soft_wrap=True)


@app.command(name="eval", epilog="Example: `gsa eval 2f0c…` or `gsa eval runs/train/tiny`")
def evaluate(
    run: Annotated[str, typer.Argument(help="MLflow run id, `runs:/ID`, or a checkpoint folder", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    storage: Storage = Path("runs"),
    tracking_uri: TrackingUri = None,
    experiment: Experiment = "gsa",
) -> None:
    """Held-out loss, retrieval and diagnostics by layer of a trained checkpoint."""
    from gsa.evaluation.report import evaluate_checkpoint
    from gsa.store import TrackingConfig

    found = evaluate_checkpoint(run, TrackingConfig(tracking_uri, experiment), storage)
    if json:
        print(found.to_json())
        return
    console.print(f"step {found.step}: held-out loss {found.metrics['held_out_loss']:.4f} nats per token, ", end="")
    console.print(f"{found.metrics['held_out_bits_per_byte']:.4f} bits per byte")
    table = Table("layer", *found.layer_names, title="attention by layer, held-out text", title_justify="left")
    for i, row in enumerate(found.layers):
        table.add_row(str(i), *(f"{row[name]:.4f}" if name in row else "" for name in found.layer_names))
    console.print(table)
    if found.retrieval_refused:
        console.print(f"no pass-key retrieval: {found.retrieval_refused}", markup=False)
        return
    table = Table("depth", "accuracy", "loss", "loss without", title="pass-key retrieval", title_justify="left")
    for r in found.retrieval:
        table.add_row(f"{r.depth:.2f}", f"{r.accuracy:.2f}", f"{r.loss:.3f}", f"{r.loss_without:.3f}")
    console.print(table)


@app.command(epilog="Example: `gsa ui --port 5001`")
def ui(
    storage: Storage = Path("runs"),
    tracking_uri: TrackingUri = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="port on localhost")] = 5000,
) -> None:
    """Browse runs in the MLflow UI, on localhost only."""
    from gsa.store import TrackingConfig
    from gsa.tracking import open_store

    uri = open_store(TrackingConfig(tracking_uri), storage).uri
    if not uri.startswith("sqlite:"):
        console.print(f"the MLflow server of this store: {uri}", markup=False)
        return
    artifacts = (storage.absolute() / "artifacts").as_uri()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--default-artifact-root", artifacts]
    command += ["--allowed-hosts", f"localhost:{port},127.0.0.1:{port}"]
    console.print(f"MLflow: http://127.0.0.1:{port} (Ctrl-C ends it)")
    sys.exit(subprocess.run(command, check=False).returncode)


@app.command(epilog="Example: `gsa move http://127.0.0.1:5001`")
def move(
    uri: Annotated[str, typer.Argument(help="of the MLflow server", show_default=False)],
    storage: Storage = Path("runs"),
) -> None:
    """Copy every run of the storage folder's MLflow store to a server; cut short, the same command goes on."""
    from gsa.move import move as copy
    from gsa.store import TrackingConfig, absolute_uri
    from gsa.tracking import connect, open_store

    if not uri:
        raise RequestError("tracking.uri = '': must be sqlite:///PATH, http://HOST or https://HOST")
    database = sqlite_uri(storage.resolve() / "mlflow.db")  # whatever MLFLOW_TRACKING_URI names
    source = open_store(TrackingConfig(database), storage)
    if absolute_uri(uri) == database:
        raise RequestError(f"{uri}: is the store of {storage} itself")
    found = copy(source, connect(TrackingConfig(uri), storage), lambda line: console.print(line, markup=False))
    earlier = f" ({found.earlier} of them earlier)" if found.earlier else ""
    what = f"{found.runs} runs{earlier}, {found.values} values of metrics, {found.files} files, {found.versions} models"
    console.print(f"copied to {uri}: {what}", markup=False, highlight=False, soft_wrap=True)
    _next(f"export MLFLOW_TRACKING_URI={uri}    # gsa commands and resumed sweeps use it from now on")


@app.command(epilog="Example: `gsa doctor --cluster cluster.yaml --sweep configs/sweep/quickstart.yaml`")
def doctor(
    storage: Storage = Path("runs"),
    cluster: Annotated[
        Path | None,
        typer.Option(parser=_path, metavar="PATH", help="check this file of `ray up` or KubeRay, with no cloud"),
    ] = None,
    sweep: Annotated[
        list[Path] | None,
        typer.Option(parser=_path, metavar="PATH", help="with --cluster: can it run there? may be repeated"),
    ] = None,
) -> None:
    """What this machine, or a cluster that is not there yet, can and cannot do, and why."""
    from ray_jobs.doctor import examine, examine_cluster

    if sweep and cluster is None:
        raise RequestError("gsa doctor --sweep: needs --cluster, the file of the cluster that it is to run on")
    findings = examine(storage) if cluster is None else examine_cluster(cluster, sweep or [])
    table = Table("", "what", "found", show_header=False)
    for finding in findings:
        mark = {True: "[green]ok[/]", False: "[red]wrong[/]", None: "[yellow]no[/]"}[finding.ok]
        table.add_row(mark, escape(finding.name), escape(finding.detail))
    console.print(table)
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)
    _next(
        "gsa sweep configs/sweep/quickstart.yaml"
        if cluster is None
        else f"ray up {cluster}    # on Kubernetes: kubectl apply -f"
    )


@app.command(epilog="Example: `gsa bench --length 131072 --operation forward --json`")
def bench(
    length: Annotated[list[int] | None, typer.Option(help="tokens; give it several times for several lengths")] = None,
    heads: Annotated[int, typer.Option(help="query heads")] = 32,
    kv_heads: Annotated[int, typer.Option(help="key/value heads")] = 8,
    head_dim: Annotated[int, typer.Option(help="channels of a head")] = 128,
    k: Annotated[int, typer.Option(help="keys that a query selects")] = 2048,
    overlap: Annotated[
        list[float] | None, typer.Option(help="u(32), keys of 32 neighbours' union over k; 32: random")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="sequences decoded at once")] = None,
    operation: Annotated[list[str] | None, typer.Option(help="forward, training, warmup, decode; default: all")] = None,
    run: Annotated[str | None, typer.Option(help="measure each layer of this checkpoint on its held-out text")] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON, with the time split by stage")] = False,
    storage: Storage = Path("runs"),
    tracking_uri: TrackingUri = None,
    experiment: Experiment = "gsa",
) -> None:
    """Sparse attention on the kernels against PyTorch's dense attention, on this GPU, in one run."""
    from gsa.store import TrackingConfig
    from kernels.bench import BenchConfig
    from ray_jobs.bench import checkpoint_rows, run_bench, show

    usual = BenchConfig()
    settings = BenchConfig(
        tuple(length or usual.lengths), heads, kv_heads, head_dim, k, tuple(overlap or usual.overlaps),
        tuple(batch or usual.batches), tuple(operation or usual.operations),
    )  # fmt: skip
    measured = None
    if run is not None:
        if len(length or []) > 1:
            raise RequestError("gsa bench --run: give no more than one --length")
        tracking = TrackingConfig(tracking_uri, experiment)
        measured = partial(checkpoint_rows, run, length[0] if length else None, tracking, storage)
    found = run_bench(settings, None if json else console, measured)
    if json:
        print(found.to_json())
    else:
        show(found, console)


@app.command(epilog="Example: `gsa propose 2f0c… --out configs/sweep/layers.yaml`")
def propose(
    run: Annotated[str, typer.Argument(help="MLflow run id, `runs:/ID`, or a checkpoint folder", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(parser=_path, metavar="PATH", help="YAML file; default: proposals/NAME-layers.yaml in storage"),
    ] = None,
    max_dimensions: Annotated[int, typer.Option(min=1, help="dimensions of the space, over all settings")] = 6,
    json: Annotated[bool, typer.Option("--json", help="print JSON; write YAML only with --out")] = False,
    storage: Storage = Path("runs"),
    tracking_uri: TrackingUri = None,
    experiment: Experiment = "gsa",
) -> None:
    """A sweep over selection by layer, drawn from what a trained model's layers do on its held-out text."""
    from gsa.store import TrackingConfig
    from ray_jobs.proposal import measure, propose_space, show, write

    config, layers = measure(run, TrackingConfig(tracking_uri, experiment), storage)
    found = propose_space(layers, config, max_dimensions)
    path = out or storage / "proposals" / f"{config.name}-layers.yaml"
    if found.space and (out is not None or not json):
        write(found, config, path)
    if json:
        print(found.to_json())
        return
    show(found, console)
    if not found.space:
        settled = " ".join(f"{key}={value}" for key, value in found.settings.items())
        console.print(f"nothing is left to search; settled: {settled or 'nothing'}", markup=False, soft_wrap=True)
        return
    _next(f"gsa sweep {path}")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; errors that a user can act on become one line and an exit code."""
    handler = RichHandler(console=errors, show_path=False, log_time_format="%X")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("gsa").setLevel(logging.INFO)
    logging.getLogger("ray_jobs").setLevel(logging.INFO)
    try:
        with stops_go_to(interrupt):
            app(arguments, standalone_mode=True)
    except RequestError as error:
        _print_error(str(error))
        sys.exit(2)
    except RunError as error:
        _print_error(str(error))
        sys.exit(1)
    except (KeyboardInterrupt, BrokenPipeError):  # who read a `--json` has gone
        sys.exit(130)
    sys.exit(0)


def _given(command: str, config: Path | None, overrides: list[str] | None, resume: str | None) -> list[str]:
    """The configuration and the overrides of a sweep to start, or the overrides of one to resume."""
    if config is None and resume is None:
        raise RequestError(f"{command}: give either a CONFIG to start, or --resume NAME to continue")
    if resume is not None and config is not None and "=" not in str(config):
        raise RequestError(f"{command} --resume {resume}: goes on with its own configuration, not with {config}")
    return [*([] if config is None else [str(config)]), *(overrides or [])]


def _print_error(text: str) -> None:
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(shown) > LINE:
        shown = f"{shown[: LINE // 2]} … {shown[-LINE // 2 :]}"  # what was given, and what is allowed
    errors.print("error:", shown, style="red", markup=False, highlight=False, soft_wrap=True)


def _failed(error: RunError, advice: str) -> NoReturn:
    _print_error(str(error))
    errors.print(advice, markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


def _interrupted(command: str, stop: KeyboardInterrupt) -> NoReturn:
    saved = "everything is saved" if isinstance(stop, Saved) else "steps since the last checkpoints are trained again"
    errors.print(f"interrupted; {saved}. To go on: {command}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(130)


def _next(*commands: str) -> None:
    console.print("next: " + "\n      ".join(commands), markup=False, highlight=False, soft_wrap=True)


def _storage_option(storage: str) -> str:
    return "" if os.path.abspath(storage) == os.path.abspath("runs") else f" --storage {storage}"


if __name__ == "__main__":
    main()
