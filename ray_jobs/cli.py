"""The command line, `gsa`.

Exit codes: 0 done, 1 a run failed, 2 the request was wrong, 130 interrupted (state saved, resume command printed).
"""

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.logging import RichHandler

from gsa.errors import InfrastructureError, RequestError, RunError
from gsa.paths import of_user, sqlite_uri
from gsa.store import TrackingConfig
from ray_jobs.commands import Options, at_storage, at_store, gsa, shell
from ray_jobs.options import one_source, one_store, refuse_unused
from ray_jobs.signals import interrupt, stops_go_to
from ray_jobs.terminal import console, errors, failed, interrupted, print_error, suggest

app = typer.Typer(
    help="Find the best Gated Sparse Attention model for your data and your hardware.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


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
NewStorage = Annotated[
    str | None, typer.Option(help="folder of runs; default: train.storage of CONFIG, with --resume `runs`")
]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow tracking URI; default: SQLite in the storage folder")]
Address = Annotated[
    str, typer.Option(envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"], help="http://HOST:PORT of the head's dashboard")
]
Experiment = Annotated[str, typer.Option(help="MLflow experiment")]


@app.command(epilog="Example: `gsa train configs/train/tiny.yaml training.optimizer.learning_rate=1e-3`")
def train(config: Config, overrides: Overrides = None) -> None:
    """Train one model. Run again after an interruption, it goes on from its newest checkpoint."""
    from ray_jobs.given import refuse_other_file

    refuse_other_file(config, "train")  # before anything heavy is imported
    from ray_jobs.train import load_train, run_train

    settings = load_train(config, overrides)
    command = gsa("train", config, *(overrides or []))
    try:
        done = run_train(settings, console, ["gsa", "train", str(config), *(overrides or [])])
    except KeyboardInterrupt as stop:
        interrupted(command, stop)
    except RunError as error:
        failed(
            error, f"what was trained is in {settings.storage}/train/{settings.name}; to go on from there: {command}"
        )
    bits = done.metrics.get("held_out_bits_per_byte", float("nan"))
    console.print(f"held-out loss {done.metrics['held_out_loss']:.4f} nats per token, {bits:.4f} bits per byte")
    console.print(f"checkpoints: {done.folder}", markup=False, highlight=False, soft_wrap=True)
    place = {**at_storage(settings.storage), **at_store(settings.tracking, settings.storage)}
    suggest(gsa("eval", done.run_id, options=place), _ui(settings.tracking, settings.storage))


@app.command(epilog="Example: `gsa sweep configs/sweep/quickstart.yaml num_samples=20`")
def sweep(
    config: Sweep = None,
    overrides: Overrides = None,
    resume: Resume = None,
    storage: NewStorage = None,
) -> None:
    """Search. Ends with the leaderboard and the Pareto front."""
    given = _given("sweep", config, overrides, resume)
    from ray_jobs.leaderboard import show
    from ray_jobs.sweep import load_sweep, read_sweep, resume_sweep, run_sweep, sweep_folder

    if resume is not None:
        name, folder = resume, storage or "runs"
    else:
        settings = load_sweep(Path(given[0]), given[1:], storage)
        name, folder = settings.name, settings.train.storage
    again = gsa("sweep", options={"--resume": name, **at_storage(folder)})
    try:
        report = resume_sweep(name, folder, console, given) if resume is not None else run_sweep(settings, console)
    except KeyboardInterrupt as stop:
        interrupted(again, stop)
    except InfrastructureError as error:
        failed(error, f"no trial is lost. To go on: {again}")
    except RunError as error:
        tracking = read_sweep(sweep_folder(folder, name) / "sweep.yaml").train.tracking
        failed(error, f"to see what happened: {gsa('report', name, options=at_store(tracking, folder))}")
    tracking = read_sweep(sweep_folder(folder, name) / "sweep.yaml").train.tracking
    show(report, console)
    suggest(_ui(tracking, folder), gsa("report", name, options={"--json": None, **at_store(tracking, folder)}))


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
    storage: NewStorage = None,
) -> None:
    """Run a sweep as a job on a Ray cluster. The job goes on when this command is interrupted."""
    given = _given("submit", config, overrides, resume)
    from ray_jobs import submit as jobs

    if resume is not None:
        submission = jobs.resumed_sweep(resume, storage or "runs", given, working_dir)
    else:
        submission = jobs.new_sweep(Path(given[0]), given[1:], working_dir, storage)
    client, job = jobs.submit(submission, address)
    commands = [
        shell("ray", "job", "logs", "--address", address, "--follow", job),
        shell("ray", "job", "stop", "--address", address, job),
        shell("ray", "job", "list", "--address", address),
    ]
    console.print(f"job {job}: {submission.entrypoint}", markup=False, highlight=False, soft_wrap=True)
    if not wait:
        suggest(*commands)
        return
    try:
        jobs.follow(client, job, console)
    except KeyboardInterrupt:
        errors.print(f"the job goes on; to see it: {commands[0]}", markup=False, highlight=False, soft_wrap=True)
        raise
    except RunError as error:
        place: Options = {"--address": address, "--storage": submission.storage, "--working-dir": working_dir}
        failed(error, f"to go on: {gsa('submit', options={'--resume': submission.sweep, **place})}")


@app.command(epilog="Example: `gsa report quickstart --html report.html`")
def report(
    ctx: typer.Context,
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
    from gsa.tracking import open_run
    from ray_jobs.export import export_study, write_parquet
    from ray_jobs.leaderboard import show
    from ray_jobs.report import read_report
    from ray_jobs.reporting.page import write_html
    from ray_jobs.runs import run_key

    one_store(ctx, storage, tracking_uri)
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
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(help="MLflow run id, `runs:/ID`, or a checkpoint folder", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    storage: Storage = Path("runs"),
    tracking_uri: TrackingUri = None,
    experiment: Experiment = "gsa",
) -> None:
    """Held-out loss, retrieval and diagnostics by layer of a trained checkpoint."""
    from gsa.evaluation.report import evaluate_checkpoint
    from ray_jobs.checkpoint_tables import show
    from ray_jobs.given import refuse_other_source

    refuse_other_source(run)
    one_source(ctx, run)
    found = evaluate_checkpoint(run, TrackingConfig(tracking_uri, experiment), storage)
    if json:
        print(found.to_json())
        return
    show(found, console)


@app.command(epilog="Example: `gsa ui --port 5001`")
def ui(
    ctx: typer.Context,
    storage: Storage = Path("runs"),
    tracking_uri: TrackingUri = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="port on localhost")] = 5000,
) -> None:
    """Browse runs in the MLflow UI, on localhost only."""
    from gsa.tracking import open_store
    from ray_jobs import ui

    one_store(ctx, storage, tracking_uri)
    uri = open_store(TrackingConfig(tracking_uri), storage).uri
    if not uri.startswith("sqlite:"):
        refuse_unused(ctx, ["port"], f"{uri} is a server already")
        console.print(f"the MLflow server of this store: {uri}", markup=False)
        return
    server = ui.mlflow_server(uri, port)
    ui.serve(server, port, lambda address: console.print(f"MLflow: {address} (Ctrl-C ends it)"))


@app.command(epilog="Example: `gsa move http://127.0.0.1:5001`")
def move(
    uri: Annotated[str, typer.Argument(help="of the MLflow server", show_default=False)],
    storage: Storage = Path("runs"),
) -> None:
    """Copy every run of the storage folder's MLflow store to a server; cut short, the same command goes on."""
    from gsa.move import move as copy
    from gsa.store import absolute_uri
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
    export = shell("export", f"MLFLOW_TRACKING_URI={uri}")
    suggest(f"{export}    # gsa commands and resumed sweeps use it from now on")


@app.command(epilog="Example: `gsa doctor --cluster cluster.yaml --sweep configs/sweep/quickstart.yaml`")
def doctor(
    ctx: typer.Context,
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
    from ray_jobs.doctor import examine, examine_cluster, show
    from ray_jobs.given import refuse_other_file

    if sweep and cluster is None:
        raise RequestError("gsa doctor --sweep: needs --cluster, the file of the cluster that it is to run on")
    if cluster is not None:
        refuse_unused(ctx, ["storage"], "--cluster looks at a file, not at this machine")
        for path, wanted in ((cluster, "cluster"), *((path, "sweep") for path in sweep or [])):
            refuse_other_file(path, wanted)
    findings = examine(storage) if cluster is None else examine_cluster(cluster, sweep or [])
    show(findings, console)
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)
    if cluster is None:
        suggest(gsa("sweep", "configs/sweep/quickstart.yaml"))
    else:
        suggest(f"{shell('ray', 'up', cluster)}    # on Kubernetes: {shell('kubectl', 'apply', '-f', cluster)}")


@app.command(epilog="Example: `gsa bench --length 131072 --operation forward --json`")
def bench(
    ctx: typer.Context,
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
    from kernels.bench import BenchConfig
    from ray_jobs.bench import checkpoint_rows, run_bench, show
    from ray_jobs.given import refuse_other_source

    usual = BenchConfig()
    settings = BenchConfig(
        tuple(length or usual.lengths), heads, kv_heads, head_dim, k, tuple(overlap or usual.overlaps),
        tuple(batch or usual.batches), tuple(operation or usual.operations),
    )  # fmt: skip
    measured = None
    if run is None:
        refuse_unused(ctx, ["storage", "tracking_uri", "experiment"], "they say where --run finds its checkpoint")
        if "decode" not in settings.operations:
            refuse_unused(ctx, ["batch"], "it is of --operation decode")
        if set(settings.operations) == {"decode"}:
            refuse_unused(ctx, ["overlap"], "decoding is measured with random selections")
    else:
        own = ["heads", "kv_heads", "head_dim", "k", "overlap", "batch", "operation"]
        refuse_unused(ctx, own, "with --run the checkpoint says it")
        refuse_other_source(run)
        one_source(ctx, run)
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
    ctx: typer.Context,
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
    from ray_jobs.given import refuse_other_source
    from ray_jobs.proposal import measure, propose_space, show, write

    refuse_other_source(run)
    one_source(ctx, run)
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
        settled = shell(*(f"{key}={value}" for key, value in found.settings.items()))
        console.print(f"nothing is left to search; settled: {settled or 'nothing'}", markup=False, soft_wrap=True)
        return
    suggest(gsa("sweep", path))


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
        print_error(str(error))
        sys.exit(2)
    except RunError as error:
        print_error(str(error))
        sys.exit(1)
    except (KeyboardInterrupt, BrokenPipeError):  # who read a `--json` has gone
        sys.exit(130)
    sys.exit(0)


def _given(command: str, config: Path | None, overrides: list[str] | None, resume: str | None) -> list[str]:
    """The configuration and the overrides of a sweep to start, or the overrides of one to resume."""
    from ray_jobs.given import refuse_other_file

    if config is None and resume is None:
        raise RequestError(f"gsa {command}: give either a CONFIG to start, or --resume NAME to continue")
    if resume is not None and config is not None and "=" not in str(config):
        raise RequestError(
            f"gsa {command} --resume {resume}: goes on with its own configuration, not with {config}; settings that"
            " may change are given as key=value"
        )
    if resume is None and config is not None:
        refuse_other_file(config, "sweep")
    return [*([] if config is None else [str(config)]), *(overrides or [])]


def _ui(tracking: TrackingConfig, storage: str) -> str:
    options = at_store(tracking, storage)
    return gsa("ui", options={name: value for name, value in options.items() if name != "--experiment"})


if __name__ == "__main__":
    main()
