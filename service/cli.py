"""The `kbop` command: one function per subcommand.

Refuses to hold logic: it turns options into calls of the client, the server or the local run, and results
into text. Everything slow to import is imported inside the command that needs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from service.plan_command import plan
from service.spec_options import SpecInputError, SpecOptions

if TYPE_CHECKING:
    from service.client import KbopClient

EXIT_PROBLEM, EXIT_USAGE, EXIT_FAILED, EXIT_CANCELLED, EXIT_UNREACHABLE, EXIT_INTERRUPTED = 1, 2, 3, 4, 5, 130
OUTCOMES = {"succeeded": 0, "failed": EXIT_FAILED, "cancelled": EXIT_CANCELLED}

app = typer.Typer(
    name="kbop",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Turn language models into 1-bit ones with KBOP.\n\n"
    "Exit codes: 0 done (a watched job: succeeded), 1 a request or file was refused, 2 wrong options, "
    "3 the job failed, 4 the job was cancelled, 5 the server does not answer, 130 interrupted.\n\n"
    "Environment: KBOP_ENDPOINT (default http://127.0.0.1:8700) and KBOP_API_KEY for commands that talk to a "
    "server; KBOP_<SETTING> for `serve` and `worker`.",
)

Endpoint = Annotated[str | None, typer.Option("--endpoint", help="Server address; default: KBOP_ENDPOINT.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of the job, as `kbop jobs` shows it.")]
SpecFile = Annotated[
    Path | None, typer.Argument(metavar="SPEC.json", help="Job spec as JSON; `-` reads standard input.")
]
Model = Annotated[str | None, typer.Option(help="builtin:demo, a folder, or a hub id owner/name[@revision].")]
Data = Annotated[list[str] | None, typer.Option(help="Training text; may be repeated.")]
Eval = Annotated[
    list[str] | None,
    typer.Option("--eval", help="Evaluation text; may be repeated; default: a tenth of the data."),
]
Name = Annotated[str | None, typer.Option(help="A name for lists.")]
Effort = Annotated[str | None, typer.Option(help="quick (no training), standard or max.")]
Tokens = Annotated[int | None, typer.Option(help="Training tokens.")]
Gpus = Annotated[int | None, typer.Option(help="Ranks: GPUs, or CPU slots without GPUs.")]
GroupSize = Annotated[int | None, typer.Option(help="Weights that share a scale.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other field: --set method.flip_rate=0.002"),
]
DataDir = Annotated[Path | None, typer.Option(help="Database, artifacts, job folders.")]
CpuSlots = Annotated[int | None, typer.Option(help="Ranks at once where there is no GPU.")]
Roots = Annotated[list[Path] | None, typer.Option("--model-root", help="Folder models may come from; repeatable.")]
DataRoots = Annotated[list[Path] | None, typer.Option("--data-root", help="Folder text may come from; repeatable.")]
Owners = Annotated[list[str] | None, typer.Option("--hub-owner", help="Hub owner allowed, * for any; repeatable.")]

app.command()(plan)


def fail(message: str, hint: str = "", code: str = "", *, exit_code: int = EXIT_PROBLEM) -> NoReturn:
    """Ends the command with one paragraph on standard error."""
    from service.display import error_text

    typer.echo(error_text(message, hint, code), err=True)
    raise typer.Exit(exit_code)


@contextmanager
def connected(endpoint: str | None) -> Iterator[KbopClient]:
    """A client of the chosen server; whatever goes wrong with it ends the command in words."""
    from service.client import ClientError, KbopClient, ProblemError, Unreachable
    from service.settings import ClientSettings

    settings = ClientSettings()
    key = settings.api_key.get_secret_value() if settings.api_key is not None else None
    try:
        with KbopClient(endpoint or settings.endpoint, key) as client:
            yield client
    except Unreachable as error:
        fail(error.message, error.hint, exit_code=EXIT_UNREACHABLE)
    except ProblemError as error:
        fail(error.message, error.hint, error.code)
    except ClientError as error:
        fail(error.message, error.hint)
    except OSError as error:
        fail(f"{error.filename or 'a file'} cannot be written: {error.strerror}")


def spec_from(options: SpecOptions) -> dict[str, Any]:
    """The spec of the options; nonsense ends the command."""
    try:
        return options.build()
    except SpecInputError as error:
        fail(str(error), exit_code=EXIT_USAGE)


def show_json(value: Any) -> None:
    """Prints indented JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


@app.command()
def serve(  # noqa: PLR0913 (the options of a command)
    host: Annotated[str | None, typer.Option(help="Address to listen on; any but loopback needs KBOP_API_KEY.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port; 0 takes a free one.")] = None,
    data_dir: DataDir = None,
    model_root: Roots = None,
    data_root: DataRoots = None,
    hub_owner: Owners = None,
    cpu_slots: CpuSlots = None,
    scheduler: Annotated[
        bool | None,
        typer.Option("--scheduler/--no-scheduler", help="Start jobs from here, or leave it to a worker."),
    ] = None,
) -> None:
    """Run the server, with the scheduler inside it.

    Every option is also an environment variable: KBOP_HOST, KBOP_PORT, KBOP_DATA_DIR, KBOP_MODEL_ROOTS and so
    on. Ctrl-C or SIGTERM stops the server only: running jobs go on in processes of their own, and the next
    start finds them again.
    """
    from service.serve import run_server

    run_server(
        {
            "host": host,
            "port": port,
            "data_dir": data_dir,
            "model_roots": tuple(model_root or ()) or None,
            "data_roots": tuple(data_root or ()) or None,
            "hub_owners": tuple(hub_owner or ()) or None,
            "cpu_slots": cpu_slots,
            "embed_scheduler": scheduler,
        },
        fail,
    )


@app.command()
def worker(data_dir: DataDir = None, cpu_slots: CpuSlots = None) -> None:
    """Run the scheduler alone, for a server on the same data directory that runs with --no-scheduler.

    Ctrl-C or SIGTERM stops the scheduler only; running jobs go on, and the next start finds them again.
    """
    from service.serve import run_worker

    run_worker({"data_dir": data_dir, "cpu_slots": cpu_slots}, fail)


@app.command()
def submit(  # noqa: PLR0913 (the options of a command)
    spec: SpecFile = None,
    model: Model = None,
    data: Data = None,
    eval_: Eval = None,
    name: Name = None,
    effort: Effort = None,
    tokens: Tokens = None,
    gpus: Gpus = None,
    group_size: GroupSize = None,
    seed: Seed = None,
    settings: Settings = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")] = False,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Submit a job, from a spec file, from options, or both (options replace the file's fields)."""
    body = spec_from(
        SpecOptions(
            spec,
            model,
            tuple(data or ()),
            tuple(eval_ or ()),
            name,
            effort,
            tokens,
            gpus,
            group_size,
            seed,
            tuple(settings or ()),
        )
    )
    with connected(endpoint) as client:
        job = client.submit(body)
        if as_json:
            typer.echo(json.dumps(job, indent=None if watch else 2))
        else:
            typer.echo(f"{job['id']} {job['status']}")
        if watch:
            follow(client, job["id"], as_json=as_json)


@app.command()
def watch(job_id: JobId, endpoint: Endpoint = None, as_json: AsJson = False) -> None:
    """Follow a job to its end: stage, step, loss, flip rate, tokens per second and time left.

    On a terminal with a progress bar, elsewhere a line per stage and about every 5 seconds of progress;
    --json prints one event per line. Exits with 0 when the job succeeded, 3 when it failed, 4 when it was
    cancelled.
    """
    with connected(endpoint) as client:
        follow(client, job_id, as_json=as_json)


@app.command(name="jobs")
def list_jobs(
    status: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many, newest first.")] = 20,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with connected(endpoint) as client:
        page = client.list_jobs(limit=limit, status=status)
    if as_json:
        show_json(page)
        return
    from service.display import console, jobs_table

    if page["data"]:
        console().print(jobs_table(page["data"]))
    else:
        typer.echo("no jobs")


@app.command()
def cancel(job_id: JobId, endpoint: Endpoint = None, as_json: AsJson = False) -> None:
    """Cancel a job: at once while it waits, else when its processes have stopped."""
    with connected(endpoint) as client:
        job = client.cancel(job_id)
    if as_json:
        show_json(job)
    else:
        typer.echo(f"{job['id']} {job['status']}")


@app.command()
def metrics(
    job_id: JobId,
    since: Annotated[int, typer.Option(min=0, help="First step.")] = 0,
    layers: Annotated[bool, typer.Option("--layers", help="Flips and reversals per layer too.")] = False,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Show a job's training series: loss, flips, speed, seconds by phase and memory, with their curves.

    Of a long run a thinned series: at most about 500 steps, evenly spaced, and the newest.
    """
    with connected(endpoint) as client:
        series = client.metrics(job_id, since=since, layers=layers)
    if as_json:
        show_json(series)
        return
    from service.series_display import print_series

    print_series(series)


@app.command()
def report(
    job_id: JobId,
    html: Annotated[Path | None, typer.Option(help="Write the page with plots to this file instead.")] = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Show a finished job's report: perplexities, bits per weight, sizes, times, memory."""
    with connected(endpoint) as client:
        if html is not None:
            html.write_bytes(client.report_html(job_id))
            typer.echo(f"wrote {html}")
            return
        found = client.report(job_id)
    if as_json:
        show_json(found)
        return
    from service.display import print_report

    print_report(found)


@app.command()
def download(
    job_id: JobId,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files go.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite files with other content.")] = False,
    endpoint: Endpoint = None,
) -> None:
    """Download a job's published files; every one is checked against its sha256, and parts are resumed."""
    from service.display import DownloadView

    with connected(endpoint) as client, DownloadView() as view:
        files = client.download(job_id, folder, force=force, on_bytes=view.on_bytes)
    typer.echo(f"{len(files)} files in {folder}, all verified")


@app.command()
def binarize(  # noqa: PLR0913 (the options of a command)
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the checkpoint and its report.")],
    spec: SpecFile = None,
    model: Model = None,
    data: Data = None,
    eval_: Eval = None,
    name: Name = None,
    effort: Effort = None,
    tokens: Tokens = None,
    gpus: Gpus = None,
    group_size: GroupSize = None,
    seed: Seed = None,
    settings: Settings = None,
    work_dir: Annotated[Path | None, typer.Option(help="Keep the run's working files here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into DIR although it is not empty.")] = False,
) -> None:
    """Run one job here, without a server, and print its report. Ctrl-C cancels it."""
    from service.binarize import BinarizeRequest, run_here

    body = spec_from(
        SpecOptions(
            spec,
            model,
            tuple(data or ()),
            tuple(eval_ or ()),
            name,
            effort,
            tokens,
            gpus,
            group_size,
            seed,
            tuple(settings or ()),
        )
    )
    job = run_here(BinarizeRequest(body, out, work_dir, force), fail)
    if job.status == "succeeded":
        from service.display import print_report

        print_report(json.loads((out / "report" / "report.json").read_text(encoding="utf-8")))
        typer.echo(f"checkpoint and report are in {out}")
    conclude({"id": job.id, "status": str(job.status), "error": job.error})


def follow(client: KbopClient, job_id: str, *, as_json: bool) -> None:
    """Shows a job's events until it ends and exits with the code of its outcome."""
    from service.display import JobView

    job: dict[str, Any] = {}
    try:
        with JobView() as view:
            for event in client.watch(job_id):
                if event.kind == "done":
                    job = event.data
                elif as_json:
                    typer.echo(json.dumps(event.data))
                else:
                    view.show(event.kind, event.data["data"])
    except KeyboardInterrupt:
        typer.echo(f"\nthe job goes on: kbop watch {job_id}, or kbop cancel {job_id}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if as_json:
        typer.echo(json.dumps(job))
    conclude(job, quiet=as_json)


def conclude(job: dict[str, Any], *, quiet: bool = False) -> NoReturn:
    """Says how a job ended, on success not if `quiet`, and exits accordingly."""
    error = job.get("error") or {}
    if job["status"] == "failed":
        if error.get("log_tail"):
            typer.echo(f"the log ended with:\n{error['log_tail'].rstrip()}", err=True)
        message = f"job {job['id']} failed: {error.get('message', 'no reason was recorded')}"
        fail(message, error.get("hint") or "", error.get("code") or "", exit_code=EXIT_FAILED)
    if job["status"] != "succeeded" or not quiet:
        typer.echo(f"{job['id']} {job['status']}", err=job["status"] != "succeeded")
    raise typer.Exit(OUTCOMES[job["status"]])


if __name__ == "__main__":
    app()
