"""`dpo-ray evaluate`: is the model better, by whom, at what cost, and what has it forgotten.

Held-out pairs, answers to prompts judged against those of other models, general text, the distance to the reference:
each part is skipped where the recipe gives it nothing to work on. Writes `evaluation.json` and the texts beside it.
"""

import itertools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_ray.acquisition.answers import plain_text
from dpo_ray.acquisition.pool import OpenPrompt
from dpo_ray.config import RunConfig, SourceConfig, load_run, parse_run
from dpo_ray.data.mixture import load_pool
from dpo_ray.data.sources import read_rows
from dpo_ray.errors import InputError
from dpo_ray.evaluate import exports
from dpo_ray.evaluate.drift import Response, drift
from dpo_ray.evaluate.generations import Writer, Written, read_prompts
from dpo_ray.evaluate.held_out import HeldOut, evaluate_model, held_out_tree
from dpo_ray.evaluate.judging import Verdict, agreement_with_people, ask, check_judge, win_rate_tree
from dpo_ray.evaluate.retention import perplexities
from dpo_ray.evaluate.win_rates import bradley_terry
from dpo_ray.evaluation_report import write_evaluation_report
from dpo_ray.generate import Sampling
from dpo_ray.launch import SUMMARY_FILE, Display, check_cluster
from dpo_ray.model_card import write_model_card
from dpo_ray.models import ModelSource, weights_fingerprint
from dpo_ray.pairs import Candidate
from dpo_ray.prepare import HeldOutPairs, held_out_of, is_run, model_of, recipe_of, reference_source
from dpo_ray.report import write_report
from dpo_ray.run_record import EVALUATION_FILE
from dpo_ray.storage import Folder, redacted

EVALUATION_FOLDER, _, RESULT_FILE = EVALUATION_FILE.partition("/")


class Named(NamedTuple):
    """A model and what it is called."""

    name: str
    source: ModelSource


def folder_of(model: str, output: str | None, run: RunConfig | None = None) -> Folder:
    """Where the results of an evaluation are: in the run folder of the model, else in that of the recipe."""
    inside = model.rstrip("/") if run is None or is_run(model) else run.folder
    return Folder(output or f"{inside}/{EVALUATION_FOLDER}")


def recipe_for(
    model: str, recipe: Path | None, overrides: Mapping[str, Any], data: str | None, reference: str | None
) -> RunConfig:
    """The recipe of an evaluation: a given one, or the run's own, or what is needed to evaluate on some pairs.

    Raises:
        InputError: There is none, or no reference to measure rewards against.
    """
    laid_over = dict(overrides) | ({} if reference is None else {"reference.path": reference})
    if data is not None:
        sources = {"sources": [{"path": data}], "eval": {"num_pairs": 0}}
        if recipe is None and not is_run(model):
            run = parse_run({"name": "evaluate", "model": {"path": model}, "data": sources}, laid_over)
            if reference is None and reference_source(run) is not None:
                raise InputError("--data needs --reference: the model that rewards are measured against")
            return run
        laid_over |= {f"data.{key}": value for key, value in sources.items()}
    if recipe is not None:
        return load_run(recipe, laid_over)
    if is_run(model):
        return recipe_of(model, laid_over)
    raise InputError(f"{model} is not a run folder: name a RECIPE, or give --data and --reference")


def evaluate(
    run: RunConfig,
    model: str,
    against: Sequence[str] = (),
    *,
    all_pairs: bool,
    output: str | None,
    display: Display,
    connect: Callable[[], object],
) -> dict[str, Any]:
    """Evaluate a model by a resolved recipe, and write `evaluation.json` with its page, texts and exports.

    Args:
        model: A run folder, a model folder, or a hub id.
        against: What its answers are compared with, as `model`; none: its reference.
        all_pairs: Evaluate on all pairs of `data.sources`, not on those that are held out.
        output: Folder to write to; None: `evaluation` in the run folder of the model, or in the recipe's.

    Returns:
        What stands in `evaluation.json`.

    Raises:
        InputError: The recipe, the data, a model or the judge does not allow it.
    """
    began = time.monotonic()
    folder = folder_of(model, output, run)
    folder.check_writable()
    check_judge(run)
    display.phase("reading the data")
    held_out = held_out_of(run, all_pairs)
    prompts = read_prompts(run, held_out.pairs)
    if not held_out.pairs and not prompts and not run.evaluate.retention.sources:
        raise InputError(
            "nothing to evaluate on: the recipe holds no pairs out (data.eval) and names no prompts or texts"
        )
    connect()
    task = _task(run, model, against, folder, display, check_cluster(run))
    tree = {
        "folder": folder.path,
        "model": model,
        "model_fingerprint": weights_fingerprint(task.after.source),
        "against": [
            {"name": other.name, "path": other.source.path, "fingerprint": weights_fingerprint(other.source)}
            for other in task.others
        ],
        "reference": None if task.reference is None else task.reference.path,
        "data_fingerprint": _summary(model).get("data_fingerprint"),
        "held_out_fingerprint": held_out.fingerprint,
        "beta": run.loss.model_dump().get("beta"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("dpo-ray", "torch", "transformers", "ray")},
        **_held_out(task, held_out),
        **_generated(task, prompts),
        **_retention(task),
    }
    tree["seconds"] = round(time.monotonic() - began, 1)
    tree = json.loads(redacted(json.dumps(tree)))
    folder.write_json(RESULT_FILE, tree)
    write_evaluation_report(folder.path)
    if is_run(model) and Folder(model).exists(SUMMARY_FILE) and folder.path == folder_of(model, None).path:
        write_model_card(model)
        write_report(model)
    _track(run, model, tree, display)
    return dict(tree)


class Task(NamedTuple):
    """What is evaluated, and where."""

    run: RunConfig
    after: Named
    """The model under test."""
    others: list[Named]
    """What it is compared with; the first is the one before."""
    reference: ModelSource | None
    folder: Folder
    display: Display
    gpus: float

    @property
    def base(self) -> ModelSource | None:
        return self.others[0].source if self.others else None


def _task(run: RunConfig, model: str, against: Sequence[str], folder: Folder, display: Display, gpus: float) -> Task:
    """The models by name; those with equal last names are called by their whole paths."""
    reference = reference_source(run)
    after, *others = (Named(_name(path), model_of(path, run.model.trust_remote_code)) for path in (model, *against))
    if not others and reference is not None:
        others = [Named("reference", reference)]
    names = [after.name, *(other.name for other in others)]
    others = [one._replace(name=one.source.path) if names.count(one.name) > 1 else one for one in others]
    return Task(run, after, others, reference, folder, display, gpus)


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or path


def _held_out(task: Task, held_out: HeldOutPairs) -> dict[str, Any]:
    if not held_out.pairs:
        return {}
    task.display.phase(f"held-out pairs: {len(held_out.pairs)}")

    def score(source: ModelSource) -> HeldOut:
        return evaluate_model(
            task.run,
            source,
            task.reference,
            held_out.table,
            gpus_per_actor=task.gpus,
            on_progress=lambda done, total: task.display.progress(f"scoring {source.path}", done, total),
        )

    before = None if task.base is None or task.base == task.reference else score(task.base)
    sources = {pair.pair_id: pair.source for pair in held_out.pairs}
    return {"held_out": held_out_tree(score(task.after.source), before, held_out.table, sources)}


def _retention(task: Task) -> dict[str, Any]:
    """What was forgotten, on general text and at tasks."""
    settings, found = task.run.evaluate.retention, dict[str, Any]()
    if task.base is None:
        return {}
    if settings.sources:
        task.display.phase("perplexity on general text")

        def on_progress(done: int, total: int) -> None:
            task.display.progress("texts", done, total)

        found["perplexity"] = perplexities(task.run, task.base, task.after.source, task.gpus, on_progress)
    if settings.tasks:
        from dpo_ray.evaluate.harness import tasks

        task.display.phase(f"tasks: {', '.join(settings.tasks)}")
        found["tasks"] = tasks(task.run, task.base, task.after.source, task.gpus)
    return {"retention": found} if found else {}


def _track(run: RunConfig, model: str, tree: Mapping[str, Any], display: Display) -> None:
    """The numbers go to the MLflow run of the model's training; a store that is away costs nothing but that."""
    summary = _summary(model)
    if summary.get("mlflow_run_id") is None or run.tracking.kind == "none":
        return
    from dpo_ray.tracking import open_tracker

    try:
        tracker = open_tracker(run)
        tracker.start(run.name, {}, resume=summary["mlflow_run_id"])
    except InputError as error:
        display.phase(f"MLflow does not get the evaluation: {error}")
        return
    tracker.log(flat_numbers(tree), int(summary.get("best_step") or summary.get("steps") or 0))
    tracker.log_file(json.dumps(tree, indent=2), EVALUATION_FILE)
    tracker.finish(summary["status"])


def flat_numbers(tree: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation under names for MLflow, each `..._low` and `..._high` beside it."""
    found: dict[str, Any] = {}
    for name in ("length_controlled_accuracy", "longer_is_better"):
        found |= {name: tree.get("held_out", {}).get(name)}
    for rate in tree.get("win_rate", []):
        found |= {f"win_rate/{rate['against']}": rate}
        found |= {f"length_controlled_win_rate/{rate['against']}": rate["length_controlled"]}
    for number, text in enumerate(tree.get("retention", {}).get("perplexity", [])):
        found |= {f"perplexity_change/{number}": {**text, "value": text["change"]}}
    for task in tree.get("retention", {}).get("tasks", []):
        found |= {f"task_change/{task['task']}": {**task, "value": task["change"]}}
    found |= {"kl": tree.get("kl")}
    flat = {f"evaluate/{name}": value for name, value in tree.get("held_out", {}).get("metrics", {}).items()}
    for name, value in found.items():
        if value is not None:
            ends = {"": "value", "_low": "low", "_high": "high"}
            flat |= {f"evaluate/{name}{end}": value[key] for end, key in ends.items()}
    return {re.sub(r"[^\w\-./ ]", "_", name): float(value) for name, value in flat.items()}


def _summary(model: str) -> dict[str, Any]:
    """`summary.json` of a run that has one."""
    folder = Folder(model)
    return dict(folder.read_json(SUMMARY_FILE)) if is_run(model) and folder.exists(SUMMARY_FILE) else {}


def _generated(task: Task, prompts: Sequence[OpenPrompt]) -> dict[str, Any]:
    """What comes of the models' answers: win rates, ranking, drift, examples, KL; the texts go into files."""
    run, display = task.run, task.display
    writer, models = Writer(run, task.gpus, display.progress), [task.after, *task.others]
    if run.evaluate.mt_bench is not None:
        display.phase("answers to MT-Bench questions")
        _write_mt_bench(run, models, writer, task.folder)
    if not prompts:
        return {}
    display.phase(f"answers to {len(prompts)} prompts by {len(models)} models")
    write = run.evaluate.write
    sampling = Sampling(write.max_tokens, write.temperature, write.top_p)
    written = {
        one.name: writer.write(one.source, prompts, sampling, write.num_responses, place)
        for place, one in enumerate(models)
    }
    answered = [i for i in range(len(prompts)) if all(written[one.name][i] for one in models)]
    texts = {name: [[answer.text for answer in answers[i]] for i in answered] for name, answers in written.items()}
    asked = [prompts[i] for i in answered]
    _write_texts(task.folder, asked, texts)
    tree: dict[str, Any] = {"num_prompts": len(asked), "unanswered_prompts": len(prompts) - len(asked)}
    games: Games = {}
    if run.evaluate.judge is not None and task.others:
        games = _judged(run, _candidates(asked, texts), display)
        tree["win_rate"] = [
            {"against": other.name} | win_rate_tree(*games[task.after.name, other.name]) for other in task.others
        ]
        if len(models) > 2:
            tree["ranking"] = _ranking([one.name for one in models], games)
        task.folder.write_lines("verdicts.jsonl", _verdict_rows(games))
    if task.others:
        before, after = task.others[0].name, task.after.name
        tree["drift"] = _drift(asked, [written[name] for name in (before, after)], answered, run)
        verdicts = games[after, before].verdicts if games else []
        tree["examples"] = _examples(asked, texts[before], texts[after], verdicts, run)
    origin = task.reference or task.base
    if origin is not None:
        display.phase(f"KL to {origin.path}")
        tree["kl"] = writer.kl(task.after.source, origin, prompts)
    return tree


class Played(NamedTuple):
    """Two models' answers as candidates, the first model's first, and what the judge says."""

    verdicts: list[Verdict]
    candidates: list[Candidate]


Games = dict[tuple[str, str], Played]
"""By the names of both models."""

Texts = Mapping[str, Sequence[Sequence[str]]]
"""Model -> prompt -> its answers."""


def _candidates(prompts: Sequence[OpenPrompt], texts: Texts) -> dict[tuple[str, str], list[Candidate]]:
    """The k-th answers of each two models to each prompt, side by side."""
    return {
        (one, other): [
            prompt.ordered(first, second)
            for prompt, mine, theirs in zip(prompts, texts[one], texts[other], strict=True)
            for first, second in zip(mine, theirs, strict=True)
        ]
        for one, other in itertools.combinations(texts, 2)
    }


def _judged(run: RunConfig, games: Mapping[tuple[str, str], list[Candidate]], display: Display) -> Games:
    """All games in one go, so that a judge's pace and a model's loading are paid once."""
    assert run.evaluate.judge is not None
    display.phase(f"judging {sum(map(len, games.values()))} pairs of answers")
    verdicts = iter(
        ask(
            run.evaluate.judge,
            [candidate for candidates in games.values() for candidate in candidates],
            seed=run.evaluate.seed,
            storage=run.storage.path,
            on_progress=lambda done, total: display.progress("verdicts", done, total),
        )
    )
    return {names: Played([next(verdicts) for _ in candidates], candidates) for names, candidates in games.items()}


def _ranking(names: Sequence[str], games: Games) -> list[dict[str, Any]]:
    """Bradley-Terry ratings of all models, the best first."""
    wins = np.zeros((len(names), len(names)))
    for (one, other), played in games.items():
        i, j = names.index(one), names.index(other)
        scores = [verdict.score for verdict in played.verdicts if verdict.score is not None]
        wins[i, j] += sum(scores)
        wins[j, i] += len(scores) - sum(scores)
    rated = [
        {"model": name, "rating": rating, "low": low, "high": high}
        for name, (rating, low, high) in zip(names, bradley_terry(wins), strict=True)
    ]
    return sorted(rated, key=lambda row: -float(row["rating"]))


def _verdict_rows(games: Games) -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": candidate.prompt_id,
            "model": one,
            "against": other,
            "score": verdict.score,
            "orders": list(verdict.orders),
            "note": verdict.note,
            "cost": dict(verdict.cost),
        }
        for (one, other), played in games.items()
        for verdict, candidate in zip(*played, strict=True)
    ]


def _drift(
    prompts: Sequence[OpenPrompt],
    written: Sequence[Sequence[Sequence[Written]]],
    answered: Sequence[int],
    run: RunConfig,
) -> list[dict[str, Any]]:
    """How the answers changed, whoever is right."""
    before, after = (
        [
            Response(prompt.prompt_id, answer.text, len(answer.ids), answer.is_finished)
            for prompt, i in zip(prompts, answered, strict=True)
            for answer in of_model[i]
        ]
        for of_model in written
    )
    return [change._asdict() for change in drift(before, after, seed=run.evaluate.seed)]


def _examples(
    prompts: Sequence[OpenPrompt],
    before: Sequence[Sequence[str]],
    after: Sequence[Sequence[str]],
    verdicts: Sequence[Verdict],
    run: RunConfig,
) -> list[dict[str, Any]]:
    """The first prompts, by content: not the best ones."""
    per_prompt = run.evaluate.write.num_responses
    return [
        {
            "prompt": plain_text(prompt.prompt),
            "before": before[i][0],
            "after": after[i][0],
            "preferred": _preferred(verdicts[i * per_prompt].score) if verdicts else None,
            "note": verdicts[i * per_prompt].note if verdicts else None,
        }
        for i, prompt in enumerate(prompts[: run.evaluate.num_examples])
    ]


def _preferred(score: float | None) -> str | None:
    if score is None:
        return None
    return "after" if score > 0.5 else "before" if score < 0.5 else "tie"


def _write_texts(folder: Folder, prompts: Sequence[OpenPrompt], texts: Texts) -> None:
    """All answers, and the first of each prompt as AlpacaEval reads them."""
    folder.write_lines(
        "generations.jsonl",
        (
            {"prompt_id": prompt.prompt_id, "prompt": plain_text(prompt.prompt), "model": name, "responses": list(said)}
            for name, answers in texts.items()
            for prompt, said in zip(prompts, answers, strict=True)
        ),
    )
    questions = [plain_text(prompt.prompt) for prompt in prompts]
    for name, answers in texts.items():
        outputs = exports.to_alpaca_eval(questions, [said[0] for said in answers], name)
        folder.write_json(f"alpaca_eval/{name.replace('/', '_')}.json", outputs)


def _write_mt_bench(run: RunConfig, models: Sequence[Named], writer: Writer, folder: Folder) -> None:
    """Each model's answers to both turns of all questions, where FastChat's tools look for them."""
    path, write = str(run.evaluate.mt_bench), run.evaluate.write
    questions = exports.mt_bench_questions(rows_of(path), path)
    sampling = Sampling(write.max_tokens, write.temperature, write.top_p)
    for one in models:
        said = writer.converse(one.source, [question.turns for question in questions], sampling)
        rows = exports.to_mt_bench(questions, said, one.name, time.time())
        folder.write_lines(f"mt_bench/model_answer/{one.name.replace('/', '_')}.jsonl", rows)


def rows_of(path: str) -> list[dict[str, Any]]:
    """The rows of a file of any format of `data`.

    Raises:
        InputError: Nothing is there, or a row cannot be read.
    """
    rows = []
    for row in read_rows(SourceConfig(path=path)):
        if row.value is None:
            raise InputError(f"{row.source}:{row.number}: {row.error}")
        rows.append(row.value)
    return rows


def import_annotations(folder: Folder, path: str, model: str | None = None) -> dict[str, Any]:
    """Put the win rates that an outside judge's file gives into `evaluation.json`, in place of those it gave before.

    Args:
        folder: That of an evaluation.
        path: `annotations.json` of AlpacaEval, or a pairwise judgement of MT-Bench.
        model: Name of the model under test in the file; None: the one of the evaluation.

    Returns:
        What stands in `evaluation.json` then.

    Raises:
        InputError: The file is of neither kind, or has no comparison of the model.
    """
    if not folder.exists(RESULT_FILE):
        raise InputError(f"no {RESULT_FILE} in {folder.path}: dpo-ray evaluate MODEL comes first")
    tree = folder.read_json(RESULT_FILE)
    rows = rows_of(path)
    read = exports.from_mt_bench if rows and "g1_winner" in rows[0] else exports.from_alpaca_eval
    by_model = exports.of_model(read(rows, path), model or _name(tree["model"]))
    if not by_model:
        raise InputError(f"{path} compares nothing with {model or _name(tree['model'])}; --as names the model in it")
    judge = f"annotations:{path}"
    imported = [exports.win_rate_of(annotations, against, judge) for against, annotations in by_model.items()]
    tree["win_rate"] = [row for row in tree.get("win_rate", []) if row["judge"] != judge] + imported
    folder.write_json(RESULT_FILE, tree)
    write_evaluation_report(folder.path)
    return dict(tree)


def measure_judge(run: RunConfig, display: Display) -> dict[str, Any]:
    """Measure `evaluate.judge` against the labels of the recipe's pairs, and write `judge.json` into the run folder.

    Raises:
        InputError: The recipe names no judge, or the judge cannot be had.
    """
    if run.evaluate.judge is None:
        raise InputError("`evaluate.judge` is null: there is no judge to measure")
    folder = Folder(run.folder)
    folder.check_writable()
    display.phase("reading the pairs")
    whole = run.data.model_copy(update={"eval": run.data.eval.model_copy(update={"num_pairs": 0})})
    pairs = load_pool(whole).train[: run.data.num_pairs]
    candidates = [
        Candidate.of(p.prompt, p.chosen, p.rejected, 1.0, tools=p.tools, source=p.source, row=p.row) for p in pairs
    ]
    display.phase(f"judging {len(candidates)} pairs")
    verdicts = ask(
        run.evaluate.judge,
        candidates,
        seed=run.evaluate.seed,
        storage=run.storage.path,
        on_progress=lambda done, total: display.progress("verdicts", done, total),
    )
    found = {"judge": next((v.by for v in verdicts if v.by), None), **agreement_with_people(verdicts, candidates)}
    folder.write_json("judge.json", found)
    return found
