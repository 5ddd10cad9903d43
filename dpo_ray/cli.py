"""The `dpo-ray` command: parse, build one recipe, hand it on, show how it goes. No logic lives here.

Exit codes: 0 done; 2 the user's input is wrong; 3 the run failed; 130 interrupted, state saved. Logs and progress go to
stderr; with `--json` the result, and nothing else, goes to stdout.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_ray import __version__, job_env
from dpo_ray.cli_jobs import jobs, submit
from dpo_ray.config import RunConfig, load_run, parse_override, recipe_schema, split_recipe
from dpo_ray.displays import (
    Live,
    StudyLive,
    flat_shares,
    show_acquisition,
    show_data,
    show_evaluation,
    show_findings,
    show_metrics,
    show_plan,
    show_study,
    show_summary,
    show_versions,
)
from dpo_ray.errors import InputError
from dpo_ray.terminal import AsJson, console, explained, result_stream, say

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(jobs, name="jobs")

Recipe = Annotated[Path, typer.Argument(help="Recipe: a YAML run file.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as loss.beta=0.3.")]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster; `local` starts one here. Default: RAY_ADDRESS, else one on this machine."),
]


def main() -> None:
    """Entry point of the console script."""
    job_env.load()
    app()


@app.command()
@explained
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue this run from its last checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and the plan; train nothing.")
    ] = False,
    device_gib: Annotated[
        float | None, typer.Option(help="Memory that the dry run is to fit, of one device; default: as here.")
    ] = None,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Align a model with preference pairs, as the recipe says."""
    run = load_run(recipe, dict(map(parse_override, overrides or [])))
    with result_stream(as_json) as emit:
        if dry_run:
            from dpo_ray.prepare import check_recipe, describe_plan, prepare, resolve

            run = resolve(run)
            check_recipe(run)
            prepared = prepare(run)
            plan = describe_plan(run, prepared, device_gib)
            emit({"recipe": run.model_dump(mode="json"), "plan": plan}, show_plan)
            return
        emit(train_here(run, resume=resume, address=address), show_summary)


def train_here(run: RunConfig, *, resume: bool, address: str | None) -> dict[str, Any]:
    """Connect, train, show; the run's summary. Exits with 130 when it was interrupted."""
    from dpo_ray.launch import Interrupt, fit

    interrupt = Interrupt()
    with signals_set(interrupt), Live() as display:
        summary = fit(
            run, resume=resume, display=display, interrupt=interrupt, connect=lambda: connect(address)
        ).summary
    if summary["status"] == "interrupted":
        console.print(f"interrupted at step {summary['steps']}, saved; continue with --resume")
        raise typer.Exit(130)
    return summary


@app.command()
@explained
def data(
    recipe: Recipe,
    overrides: Overrides = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Prompts, or pairs, that will be evaluated on: any source of data.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder; default: NAME-data in the recipe's storage.")] = None,
    tokens: Annotated[bool, typer.Option(help="Count tokens; without, no model is needed.")] = True,
    as_json: AsJson = False,
) -> None:
    """Look into the data of a recipe: duplicates, contradictions, contamination, length bias, suspicious labels."""
    from dpo_ray.data_report import report_data

    run = load_run(recipe, dict(map(parse_override, overrides or [])))
    with result_stream(as_json) as emit, Live() as display:
        tree = report_data(run, against=against or (), output=output, with_tokens=tokens, on_progress=display.progress)
        emit(tree, show_data)


@app.command()
@explained
def sweep(
    recipe: Recipe,
    overrides: Overrides = None,
    space: Annotated[
        str,
        typer.Option(
            help="What varies: beta, beta_and_lr, data_size, mixture, loss_family, lora, a YAML file, M:NAME."
        ),
    ] = "beta",
    search: Annotated[
        str, typer.Option(help="grid, random or optuna; default: grid, or random where ranges vary.")
    ] = "",
    scheduler: Annotated[
        str, typer.Option(help="asha, median or none: what breaks trials off; default: asha, none where data varies.")
    ] = "",
    metric: Annotated[
        list[str] | None, typer.Option(help="Objective, such as rewards/accuracies or kl:min; several for optuna.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="At most so many trials.")] = None,
    hours: Annotated[float | None, typer.Option(help="Stop after so many hours.")] = None,
    pairs: Annotated[int | None, typer.Option(help="Stop after training on so many pairs, over all trials.")] = None,
    plateau: Annotated[
        int | None, typer.Option(help="Stop after so many trials in a row without a better one.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds of each configuration.")] = None,
    confirm: Annotated[int, typer.Option(min=0, help="Run the best so many configurations again on fresh seeds.")] = 0,
    confirm_seeds: Annotated[int, typer.Option(min=1, help="So many fresh seeds.")] = 3,
    grace_steps: Annotated[
        int | None, typer.Option(help="No trial is broken off before; default: 2 evaluations.")
    ] = None,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="Trials at a time; default: what has room.")] = None,
    search_seed: Annotated[int, typer.Option(help="Seed of the search itself.")] = 0,
    name: Annotated[str | None, typer.Option(help="Folder of the study; default: recipe and space.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the study; finished trials stay.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the trials; run nothing.")] = False,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Try settings of a recipe: each trial a whole run, poor ones broken off, learning curves and a report."""
    from dpo_ray.launch import Interrupt
    from dpo_ray.prepare import resolve
    from dpo_ray.space import load_space

    run = resolve(load_run(recipe, dict(map(parse_override, overrides or []))))
    found = load_space(space, run, metric or (), seeds)
    interrupt = Interrupt()
    with result_stream(as_json) as emit:
        from dpo_ray.sweep import Search, default_scheduler, default_search, plan
        from dpo_ray.sweep import sweep as run_study

        how = Search(
            search=search or default_search(found),
            scheduler=scheduler or default_scheduler(found),
            grace_steps=grace_steps,
            trials=trials,
            hours=hours,
            pairs=pairs,
            plateau=plateau,
            confirm=confirm,
            confirm_seeds=confirm_seeds,
            max_concurrent=max_concurrent,
            random_seed=search_seed,
        )
        if dry_run:
            listed = [trial._asdict() for trial in plan(found, how) or []]
            emit({"space": found.name, "search": how.search, "scheduler": how.scheduler, "trials": listed}, show_plan)
            return
        with signals_set(interrupt), StudyLive() as display:
            study = run_study(
                run,
                found,
                how,
                name=name,
                resume=resume,
                display=display,
                interrupt=interrupt,
                connect=lambda: connect(address),
            )
        emit(study, show_study)
    if study["status"] == "interrupted":
        console.print("interrupted; continue with --resume")
        raise typer.Exit(130)


@app.command()
@explained
def acquire(
    recipe: Recipe,
    overrides: Overrides = None,
    strategy: Annotated[
        str, typer.Option(help="Strategies to compare, such as random,certainty; default: the recipe's.")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Arms of each strategy, with seeds of their own.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Continue; nothing is asked or trained twice.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the pool and the rounds; ask nothing.")] = False,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Active learning: choose pairs, ask for labels, train, evaluate, again; strategies compared over paired seeds."""
    from dpo_ray.acquire import acquire as run_acquisition
    from dpo_ray.acquire import plan
    from dpo_ray.launch import Interrupt

    run = load_run(recipe, dict(map(parse_override, overrides or [])))
    strategies = [name.strip() for name in strategy.split(",") if name.strip()]
    interrupt = Interrupt()
    with result_stream(as_json) as emit:
        if dry_run:
            emit(plan(run, strategies, seeds), show_plan)
            return
        with signals_set(interrupt), Live() as display:
            found = run_acquisition(
                run,
                strategies=strategies,
                num_seeds=seeds,
                resume=resume,
                display=display,
                interrupt=interrupt,
                connect=lambda: connect(address),
            )
        emit(found, lambda tree: show_acquisition(tree, run.folder))
    if found["status"] == "interrupted":
        console.print("interrupted; continue with --resume")
        raise typer.Exit(130)


@app.command()
@explained
def score(
    recipe: Recipe,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="The policy: a run folder or a model; default: the recipe's `model`.")
    ] = None,
    entropy: Annotated[bool, typer.Option("--entropy", help="Also sample responses, for their entropy.")] = False,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Score a pool of pairs under policy and reference, and write the ranking; again: only what is missing."""
    from dpo_ray.score import score_pool

    run = load_run(recipe, dict(map(parse_override, overrides or [])))
    with result_stream(as_json) as emit, Live() as display:
        summary = score_pool(run, model=model, entropy=entropy, display=display, connect=lambda: connect(address))
        emit(summary, lambda values: show_metrics("Scored pool", values))


@app.command()
@explained
def label(
    folder: Annotated[Path, typer.Argument(help="The `queue` folder of an acquisition with people as oracle.")],
    person: Annotated[str, typer.Option("--as", help="Your name: no pair is given to a person twice.")],
) -> None:
    """Label the pairs that wait in a queue: 1, 2, t for a tie, s to skip, u to undo, q to quit."""
    from dpo_ray.acquisition.label_queue import label_in_terminal, open_queue

    label_in_terminal(open_queue(folder), person)


@app.command()
@explained
def evaluate(
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, a hub id, or models:/NAME@ALIAS.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="A run folder brings its own recipe.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="The same as RECIPE.")] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Whose answers are compared with; default: the reference. Repeatable.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Pairs to evaluate on, all of them, instead of a recipe's.")] = None,
    reference: Annotated[str | None, typer.Option(help="Reference model; default: the recipe's.")] = None,
    output: Annotated[
        str | None, typer.Option(help="Folder of the results; default: `evaluation` in the run folder.")
    ] = None,
    annotations: Annotated[
        str | None, typer.Option(help="Only add the win rates of an outside judge: AlpacaEval's or MT-Bench's file.")
    ] = None,
    called: Annotated[str | None, typer.Option("--as", help="Name of the model in --annotations.")] = None,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Is the model better: held-out metrics, win rate by a judge, what it forgot, KL, drift, and a report of it."""
    from dpo_ray import evaluation
    from dpo_ray.prepare import resolve

    if annotations is not None:
        with result_stream(as_json) as emit:
            emit(
                evaluation.import_annotations(evaluation.folder_of(model, output), annotations, called), show_evaluation
            )
        return
    named, settings = split_recipe(overrides or [])
    run = resolve(evaluation.recipe_for(model, named or recipe, dict(map(parse_override, settings)), data, reference))
    with result_stream(as_json) as emit, Live() as display:
        tree = evaluation.evaluate(
            run,
            model,
            against or (),
            all_pairs=data is not None,
            output=output,
            display=display,
            connect=lambda: connect(address),
        )
        emit(tree, show_evaluation)


@app.command()
@explained
def judge(recipe: Recipe, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Measure the judge of a recipe (`evaluate.judge`) against the labels of its pairs."""
    from dpo_ray.evaluation import measure_judge
    from dpo_ray.prepare import resolve

    run = resolve(load_run(recipe, dict(map(parse_override, overrides or []))))
    with result_stream(as_json) as emit, Live() as display:
        emit(measure_judge(run, display), lambda found: show_metrics("Judge against the labels", flat_shares(found)))


@app.command()
@explained
def serve(
    model: Annotated[
        str | None, typer.Argument(help="A run folder, a model folder, a hub id, or models:/name@alias.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What requests call it; default: the name of the run.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="What rewards are measured against; default: the run's.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="A further LoRA adapter on the same weights.")
    ] = None,
    also: Annotated[list[str] | None, typer.Option(metavar="NAME=MODEL", help="A further model.")] = None,
    split: Annotated[
        list[str] | None, typer.Option(metavar="NAME=A:0.9,B:0.1", help="A/B: a name, and who answers what share.")
    ] = None,
    preferences: Annotated[
        str, typer.Option(help="Folder that collects preferences; `none`: takes none and compares nothing.")
    ] = "runs/preferences",
    queue: Annotated[Path | None, typer.Option(help="The `queue` folder of an acquisition, to be labelled.")] = None,
    keys: Annotated[Path | None, typer.Option(help="YAML file of API keys, by their hashes.")] = None,
    new_key: Annotated[
        str | None, typer.Option(metavar="NAME", help="Print a new key and the entry of it for --keys; serve nothing.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Answer anybody, on loopback only.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    cors: Annotated[list[str] | None, typer.Option(help="Origin whose pages may ask.")] = None,
    replicas: Annotated[str, typer.Option(help="Engines of each model: 2, or 1:4 to scale by the load.")] = "1",
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Such as concurrency=64, limits.max_tokens=512."),
    ] = None,
    log_text: Annotated[bool, typer.Option("--log-text", help="Write prompts and answers into the log.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Return once it serves; again: a rolling update.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the service on the cluster.")] = False,
    address: Address = None,
) -> None:
    """Host a model over HTTP: OpenAI's API, rewards, preferences, and pages to chat, compare and label."""
    from serve.command import Wanted, deploy, print_new_key, stop_service

    if new_key is not None:
        print_new_key(new_key)
        return
    if stop:
        connect(address)
        stop_service()
        return
    if model is None:
        raise InputError("serve what? A run folder, a model folder, a hub id, or models:/name@alias")
    wanted = Wanted(
        model=model,
        name=name,
        reference=reference,
        adapters=tuple(adapter or ()),
        also=tuple(also or ()),
        split=tuple(split or ()),
        preferences=None if preferences == "none" else preferences,
        queue=queue,
        keys=keys,
        insecure=insecure,
        host=host,
        port=port,
        cors=tuple(cors or ()),
        replicas=replicas,
        settings=tuple(map(parse_override, setting or ())),
        log_text=log_text,
    )
    deploy(wanted, tell=say, connect=lambda: connect(address), is_detached=detach)


app.command()(submit)


@app.command()
@explained
def export(
    run_dir: Annotated[str, typer.Argument(help="A run folder.")],
    output: Annotated[str | None, typer.Option(help="Where to; default: RUN_DIR/model.")] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint of this step; default: the best, else the last.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model, as the run did.")
    ] = False,
) -> None:
    """Write the model of a checkpoint as a Hugging Face folder."""
    from dpo_ray.launch import SUMMARY_FILE, write_model
    from dpo_ray.prepare import recipe_of
    from dpo_ray.storage import Folder

    folder = Folder(run_dir)
    run = recipe_of(run_dir, {"model.trust_remote_code": True} if trust_remote_code else None)
    summary = folder.read_json(SUMMARY_FILE) if folder.exists(SUMMARY_FILE) else None
    target = Folder(output) if output else folder / "model"
    if output and target.names():
        raise InputError(f"{output} is not empty")
    chosen = write_model(folder, run, target, summary, step)
    console.print(f"checkpoint of step {chosen} -> {target.path}", highlight=False)


@app.command()
@explained
def promote(
    name: Annotated[str, typer.Argument(help="A registered model.")],
    version: Annotated[int | None, typer.Option(help="Which version; default: the challenger.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Recorded comparison; default: evaluation/evaluation.json of the version's run.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Promote whatever the comparison says; needs --reason.")
    ] = False,
    reason: Annotated[str | None, typer.Option(help="Why it is forced; it is written down.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Show the versions; promote nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a registered model's challenger its champion, if a recorded comparison shows that it wins."""
    from dpo_ray.promote import listing
    from dpo_ray.promote import promote as promote_version
    from dpo_ray.tracking import ModelRegistry

    if force != bool(reason):
        raise InputError("--force and --reason TEXT go together")
    registry = ModelRegistry(name)
    with result_stream(as_json) as emit:
        if show:
            emit(listing(registry), lambda versions: show_versions(name, versions))
            return
        number = None if version is None else str(version)
        promoted = promote_version(registry, number=number, evaluation=evaluation, reason=reason)
        emit(promoted, lambda values: show_metrics(f"models:/{name}@champion", values))


@app.command()
@explained
def report(
    folders: Annotated[list[str], typer.Argument(help="A run, a study or an acquisition; or several runs.")],
    output: Annotated[str | None, typer.Option(help="Of several runs: where to; default: what holds them.")] = None,
) -> None:
    """Write a report of what a run, a study or an acquisition wrote; of several runs, a comparison."""
    from dpo_ray.acquire_report import write_acquire_report
    from dpo_ray.report import write_report
    from dpo_ray.run_comparison import write_comparison
    from dpo_ray.storage import Folder
    from dpo_ray.study_report import write_study_report

    folder = Folder(folders[0])
    if len(folders) > 1:
        written = write_comparison(folders, output)
    elif output is not None:
        raise InputError("--output is for several runs: the report of one is written into its folder")
    elif folder.exists("study.json"):
        written = write_study_report(folders[0])
    elif folder.exists("acquire.json"):
        written = write_acquire_report(folders[0])
    else:
        written = write_report(folders[0])
    for path in written:
        console.print(path, highlight=False, soft_wrap=True)


@app.command()
@explained
def doctor(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="Also look at the storage and the tracking of this recipe.", show_default=False),
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Also look at this folder or URI; default: storage.path of the recipe.")
    ] = None,
    patience: Annotated[float, typer.Option(min=1, help="Seconds until a node that says nothing is given up.")] = 60.0,
    as_json: AsJson = False,
    address: Annotated[
        str | None, typer.Option(help="Also look at every node of this Ray cluster; `auto`: the one that runs here.")
    ] = None,
) -> None:
    """What this machine and cluster can do, what is missing, and how to mend it."""
    from dpo_ray.doctor import findings, is_healthy, look_here

    run = None if recipe is None else load_run(recipe)
    with result_stream(as_json) as emit:
        if address is not None:
            dashboard = connect(address)
        facts = look_here(run, storage)
        if address is not None:
            from dpo_ray.cluster_facts import ask_cluster

            facts = ask_cluster(facts, dashboard, patience)
        found = findings(facts)
        emit([finding._asdict() for finding in found], show_findings)
    if not is_healthy(found):
        raise typer.Exit(3)


@app.command()
def schema() -> None:
    """JSON schema of a recipe."""
    print(json.dumps(recipe_schema(), indent=2))


@app.command()
@explained
def demo(
    folder: Annotated[Path | None, typer.Option(help="Where to write; default: runs/demo, or the next free.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat with so many seeds.")] = 1,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """The embedded task, end to end, on this machine: no downloads, a few minutes."""
    from dpo_ray.demo import next_folder, run_demo
    from dpo_ray.launch import Interrupt

    interrupt = Interrupt()
    with result_stream(as_json) as emit, signals_set(interrupt), Live() as display:
        connect(address)
        result = run_demo(folder or next_folder(), seeds=range(seeds), display=display, interrupt=interrupt)
        emit(result, lambda result: None)


def version_and_exit(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=version_and_exit, is_eager=True)] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the logs of libraries and workers.")] = False,
) -> None:
    """Align language models with preferences on a Ray cluster."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr, format="%(message)s")
    os.environ["DPO_RAY_VERBOSE"] = "1" if verbose else "0"
    for notice in job_env.version_notice():
        say(notice)


def connect(address: str | None) -> str | None:
    """Join a Ray cluster, or start one here; nothing else in dpo-ray does. The address of its dashboard."""
    from dpo_ray.reach import check_address

    check_address(address or os.environ.get("RAY_ADDRESS"))
    import ray
    from ray.exceptions import AuthenticationError

    verbose = os.environ.get("DPO_RAY_VERBOSE") == "1"
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        joined = ray.init(
            address=address,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
            ignore_reinit_error=True,
        )
    except (ConnectionError, ValueError, RuntimeError, AuthenticationError) as error:
        told = " ".join(str(error).split())
        raise InputError(f"no Ray cluster at {address or os.environ.get('RAY_ADDRESS')}: {told}") from None
    finally:
        signal.signal(signal.SIGTERM, on_term)  # Ray sets its own, which ends this process before it has saved
    return str(joined.dashboard_url) if joined.dashboard_url else None


@contextmanager
def signals_set(interrupt: Any) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks the run to save and end; the second ends this process at once."""

    def ask(number: int, frame: Any) -> None:
        if interrupt.is_set:
            raise KeyboardInterrupt
        interrupt.is_set = True  # printing here could run inside another print; the run itself tells

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
