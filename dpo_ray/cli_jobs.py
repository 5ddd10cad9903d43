"""`dpo-ray submit` and `dpo-ray jobs`: parse, check here, send, follow. No logic lives here."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dpo_ray.errors import InputError
from dpo_ray.terminal import AsJson, console, explained, result_stream, say

jobs = typer.Typer(no_args_is_help=True, help="Jobs on a cluster: list them, follow them, stop them.")

Dashboard = Annotated[
    str | None, typer.Option(help="The cluster's dashboard, such as http://HEAD:8265. Default: RAY_ADDRESS.")
]
JobId = Annotated[str, typer.Argument(help="As `dpo-ray jobs list` shows it.", show_default=False)]


@explained
def submit(
    context: typer.Context,
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="-- COMMAND RECIPE [KEY=VALUE]...",
            help="train, sweep, acquire, score, evaluate or serve, as it would be typed here.",
            show_default=False,
        ),
    ],
    address: Dashboard = None,
    wait: Annotated[
        bool, typer.Option("--wait/--detach", help="Follow the log and end as the job does, or return at once.")
    ] = True,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=VALUE]", help="Variable of the job; alone: as it is set here.")
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=FILE]", help="The same for a secret: in no log, and not in Ray's job list."),
    ] = None,
    shared: Annotated[
        list[Path] | None, typer.Option(metavar="FOLDER", help="Every node mounts this folder where it is here.")
    ] = None,
    working_dir: Annotated[
        Path | None, typer.Option(help="Ship this folder too; default: what the command and the recipe name.")
    ] = None,
    ship_code: Annotated[
        bool | None,
        typer.Option("--ship-code/--no-ship-code", help="Run this dpo-ray there; default: from a checkout, yes."),
    ] = None,
    job_id: Annotated[str | None, typer.Option("--id", help="Of the job; default: by its command and recipe.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Start a job anew that is done.")] = False,
    cpus: Annotated[
        float | None, typer.Option(min=0, help="Put the command itself on a node with these; default: the head.")
    ] = None,
    gpus: Annotated[float | None, typer.Option(min=0, help="As --cpus.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a command as a job on a Ray cluster; the same again follows it, and takes it up where it broke off."""
    from dpo_ray.jobs import Cluster
    from dpo_ray.shipping import environment, is_checkout, left_behind, read_secrets
    from dpo_ray.submit import Sight, build

    typed = parsed(context, command, as_json=as_json)
    kept, given = read_secrets(secret or ()), environment(env or ())
    with result_stream(as_json) as emit:
        cluster = Cluster(address)
        job = build(
            typed,
            Sight(cluster.is_this_machine(), tuple(map(str, shared or ()))),
            working_dir=working_dir,
            ships_code=is_checkout() if ship_code is None else ship_code,
            job_id=job_id,
            kept=kept,
        )
        if missing := left_behind(kept):
            say(f"set here, and not sent: {', '.join(missing)} (--secret NAME sends one)")
        attempt = cluster.submit(job, given=given, kept=kept, cpus=cpus, gpus=gpus, again=again, say=say)
        if wait:
            watch(cluster, attempt, emit, as_json)
        else:
            say(f"follow it: dpo-ray jobs logs --follow {attempt}")
            emit(shown(cluster.attempt(attempt)), lambda tree: None)


@jobs.command("list")
@explained
def list_jobs(address: Dashboard = None, as_json: AsJson = False) -> None:
    """Every job of dpo-ray on the cluster, the newest last."""
    from dpo_ray.jobs import Cluster

    with result_stream(as_json) as emit:
        emit([shown(attempt) for attempt in Cluster(address).attempts()], show_jobs)


@jobs.command()
@explained
def status(job: JobId, address: Dashboard = None, as_json: AsJson = False) -> None:
    """How a job is doing, and why it failed if it did."""
    from dpo_ray.jobs import Cluster

    with result_stream(as_json) as emit:
        attempt = Cluster(address).attempt(job)
        emit(shown(attempt), lambda tree: show_jobs([tree]))
        if attempt.status == "FAILED":
            say(attempt.ending)


@jobs.command()
@explained
def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until it ends, and exit as it does.")] = False,
    address: Dashboard = None,
) -> None:
    """What a job has written."""
    from dpo_ray.jobs import Cluster

    cluster = Cluster(address)
    if follow:
        watch(cluster, job, lambda result, show: None, as_json=False)
    else:
        print(cluster.log(job), end="")


@jobs.command()
@explained
def stop(job: JobId, address: Dashboard = None) -> None:
    """Let a job save and end; submitted again it goes on."""
    from dpo_ray.jobs import Cluster

    attempt = Cluster(address).stop(job, say)
    say(f"{attempt.id} {attempt.ending}")


def parsed(context: typer.Context, command: list[str], as_json: bool) -> Any:
    """What stands behind `--`, by the parser of that very command: a wrong option is found here, not on the cluster."""
    from dpo_ray.submit import COMMANDS, Typed

    name, words = command[0], command[1:]
    if name not in COMMANDS:
        raise InputError(f"submit what? {', '.join(COMMANDS)}; not `{name}`")
    own: Any = context.find_root().command
    there = own.commands[name]
    with there.make_context(f"dpo-ray {name}", words) as inner:
        values = {
            parameter.name: inner.params[parameter.name]
            for parameter in there.params
            if inner.get_parameter_source(parameter.name).name == "COMMANDLINE"
        }
    spelling = {
        parameter.name: next((text for text in parameter.opts if text.startswith("--")), None)
        for parameter in there.params
    }
    if as_json and "as_json" in spelling:
        values["as_json"] = True
    return Typed(name, values, spelling)


def watch(cluster: Any, job_id: str, emit: Any, as_json: bool) -> None:
    """Follow a job to its end, and end as it did; Ctrl-C leaves it alone."""
    from dpo_ray.jobs import result_in

    def write(text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)

    try:
        attempt = cluster.follow(job_id, write, say)
    except KeyboardInterrupt:
        say(f"\n{job_id} goes on. Follow it: dpo-ray jobs logs --follow {job_id}; end it: dpo-ray jobs stop {job_id}")
        raise typer.Exit(130) from None
    say(f"{attempt.id} {attempt.ending}")
    result = result_in(cluster.log(job_id)) if as_json else None
    emit({**shown(attempt), "result": result}, lambda tree: None)
    if attempt.code:
        raise typer.Exit(attempt.code)


def shown(attempt: Any) -> dict[str, Any]:
    """What is told of a job."""
    seconds = round((attempt.ended or time.time()) - attempt.started, 1)
    return {name: value for name, value in attempt._asdict().items() if name != "message"} | {"seconds": seconds}


def show_jobs(listed: list[dict[str, Any]]) -> None:
    table = Table()
    for heading in ("job", "status", "began", "took", "command"):
        table.add_column(heading, overflow="fold")
    for job in listed:
        code = f" ({job['exit_code']})" if job["exit_code"] else ""
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(job["started"]))
        table.add_row(job["id"], job["status"].lower() + code, began, f"{job['seconds']:.0f} s", job["line"])
    console.print(table)
