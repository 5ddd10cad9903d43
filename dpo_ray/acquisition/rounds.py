"""Rounds of active learning: choose pairs, ask for labels, train, evaluate, again. One strategy with one seed.

Muldrew et al. 2024 (arXiv:2402.08114), algorithm 1. Each step of a round ends in a file that is written whole, and the
next run takes up what is there: `choices.json` fixes what is asked, every answer is a line of `labels.jsonl` at once,
and `round.json` closes the round. So nothing is chosen, asked or trained twice, whenever it was killed.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_ray import launch
from dpo_ray.acquisition.answers import Answer, Oracle, plain_text
from dpo_ray.acquisition.choose import Batch, Choice, KCenter, Limits, LogDet, Noise, Selection, Top, choose
from dpo_ray.acquisition.features import Encoded, Models, columns_for, gather
from dpo_ray.acquisition.oracles import make_oracle
from dpo_ray.acquisition.pool import Pool
from dpo_ray.acquisition.samples import written
from dpo_ray.acquisition.scores import STRATEGIES, Ask, Features, implicit_gaps, pseudo_labels, uniform
from dpo_ray.config import RECIPE_FILE, AcquireConfig, BatchRuleConfig, RunConfig, parse_run
from dpo_ray.data.encode import PairEncoder
from dpo_ray.data.formats import to_row
from dpo_ray.launch import Display, Interrupt
from dpo_ray.lineage import LABELS_TAG
from dpo_ray.metrics import METRICS
from dpo_ray.models import ModelSource, policy_source
from dpo_ray.pairs import Candidate, PreferencePair, content_hash
from dpo_ray.prepare import reference_source, resolve
from dpo_ray.storage import Folder, read_lines

CHOICES_FILE, CANDIDATES_FILE, ROUND_FILE = "choices.json", "candidates.jsonl", "round.json"
LABELS_FILE, PAIRS_FILE, HELD_OUT_FILE = "labels.jsonl", "pairs.jsonl", "held_out.jsonl"
PROMPTS_PER_LABEL, SPARE_PROMPTS = 8, 1.25
"""Prompts that get responses, per label, where the recipe does not say; the second where nothing is scored, since some
prompts get the same response twice."""
DONE = ("completed", "stopped_early")
ELSEWHERE = ("name", "storage", "data", "reference", "cluster", "tracking", "checkpoint", "acquire")
"""Sections that do not name a training: they change no number of it, or stand in its name by their content."""


class Interrupted(Exception):
    """A person asked to end; everything so far is on disk."""


class Task(NamedTuple):
    """What all arms of an acquisition share."""

    run: RunConfig
    """Resolved, with an `acquire` section."""

    pool: Pool
    encoder: PairEncoder
    folder: Folder
    """Of the acquisition; it holds `held_out.jsonl`."""

    gpus: float
    tags: Mapping[str, str]
    """Of the tracked training runs."""

    @property
    def acquire(self) -> AcquireConfig:
        assert self.run.acquire is not None
        return self.run.acquire


class Arm:
    """One strategy with one seed, in a folder of its own."""

    def __init__(self, task: Task, strategy: str, seed: int, display: Display, interrupt: Interrupt) -> None:
        own = task.acquire.model_copy(
            update={
                "strategy": strategy,
                "seed": seed,
                # Options are of the recipe's own strategy; the others of a comparison have their defaults.
                "options": task.acquire.options if strategy == task.acquire.strategy else {},
            }
        )
        self.task = task._replace(run=task.run.model_copy(update={"acquire": own}))
        self.folder = task.folder / f"seed-{seed}" / strategy
        self._display, self._interrupt = display, interrupt
        self.asked: dict[str, Answer] = {}
        for line in read_lines(_read(self.folder, LABELS_FILE)):
            self.asked[line["candidate_id"]] = Answer(**{name: line[name] for name in Answer._fields})
        self.known: dict[str, Candidate] = {candidate.candidate_id: candidate for candidate in task.pool.candidates}
        for name in self.folder.folders():
            self.known |= {c.candidate_id: c for c in _candidates_of(self.folder / name)}

    @property
    def _acquire(self) -> AcquireConfig:
        return self.task.acquire

    def go(self) -> None:
        """Rounds until the budget is spent, the target is reached, nothing gets better, or nothing is left.

        Raises:
            Interrupted: A person asked to end.
        """
        while self.stop_reason() is None:
            self._one_round(len(self.results()) + 1)

    def results(self) -> list[dict[str, Any]]:
        """`round.json` of every finished round, in order."""
        return results_of(self.folder)

    def stop_reason(self) -> str | None:
        """Why there is no further round."""
        results = self.results()
        if not results:
            return None
        acquire, last = self._acquire, results[-1]
        sign = 1 if METRICS[self.task.run.best_metric].direction == "max" else -1
        values = [sign * result["value"] for result in results if result["value"] is not None]
        if acquire.target is not None and values and values[-1] >= sign * acquire.target:
            return "target"
        patience = acquire.patience or len(values)
        if len(values) > patience and max(values[-patience:]) <= max(values[:-patience]):
            return "plateau"
        if last["asked"] >= acquire.budget:
            return "budget"
        return "pool" if last["new"] == 0 or not self._open() else None

    def _one_round(self, number: int) -> None:
        began = time.monotonic()
        folder = self.folder / f"round-{number:02d}"
        chosen = self._chosen(folder, number)
        scored = time.monotonic()
        self._check()
        fresh = [self.known[choice.candidate_id] for choice in chosen.choices]
        self._ask(fresh, number)
        answered = time.monotonic()
        self._check()
        pairs = self._pairs(chosen.pseudo)
        summary = self._train(pairs, number) if pairs else None
        if summary is not None and summary["status"] not in DONE:
            raise Interrupted
        seconds = {"choose": scored - began, "ask": answered - scored, "train": time.monotonic() - answered}
        result = self._result(number, chosen, fresh, pairs, summary)
        folder.write_json(ROUND_FILE, result | {"seconds": {name: round(s, 1) for name, s in seconds.items()}})
        told = "" if result["value"] is None else f", {self.task.run.best_metric} {result['value']:.4f}"
        self._display.phase(
            f"{self._acquire.strategy}, seed {self._acquire.seed}, round {number}: {result['asked']} labels{told}"
        )

    # Choosing

    def _chosen(self, folder: Folder, number: int) -> "Chosen":
        """What this round asks about: as decided before, else decided now."""
        if folder.exists(CHOICES_FILE):
            return Chosen.read(folder)
        base = policy_source(self.task.run.model)
        models = Models(self._policy(number), reference_source(self.task.run) or base)
        candidates = self._considered(folder, number, models)
        seed = _round_seed(self._acquire.seed, number)
        encoded = Encoded.of(candidates, self.task.encoder)
        columns = columns_for(self._acquire)
        gathered = gather(
            encoded,
            models,
            self.task.run,
            columns,
            labels=self._labels(),
            seed=seed,
            gpus_per_actor=self.task.gpus,
            on_progress=self._progress,
        )
        selection = choose(
            gathered.features,
            self._acquire.strategy,
            Ask(self._need(), seed),
            options=self._acquire.options,
            batch=batch_rule(self._acquire.batch),
            limits=limits_of(self._acquire.batch),
            labelled=set(self.asked) & set(encoded.candidates),
        )
        chosen = Chosen.of(selection, gathered.features, gathered.errors, self._pseudo(gathered.features), models)
        folder.write_json(CHOICES_FILE, chosen.tree)
        return chosen

    def _considered(self, folder: Folder, number: int, models: Models) -> list[Candidate]:
        """Candidates that the round looks at, and those with a label where greedy rules start, or heads learn, from
        them."""
        pool, acquire = self.task.pool, self._acquire
        is_greedy = columns_for(acquire) & {"hidden", "prompt_hidden", "head_margins", "text"}
        labelled = [self.known[name] for name in self.asked] if is_greedy else []
        if pool.kind != "prompts":
            keep = self._draw(self._open(), acquire.pool.per_label, number)
            return [*labelled, *(self.known[name] for name in keep)]
        if not folder.exists(CANDIDATES_FILE):
            prompts = {prompt.prompt_id: prompt for prompt in pool.prompts}
            over = PROMPTS_PER_LABEL if columns_for(acquire) else SPARE_PROMPTS
            keep = self._draw(self._open(), acquire.pool.per_label or over, number)
            is_offline = STRATEGIES[acquire.strategy].candidates == "reference"
            new = written(
                [prompts[name] for name in keep],
                models.reference if is_offline else models.policy,
                self.task.run,
                self.task.encoder,
                acquire.seed,
                self.task.gpus,
                self._progress,
            )
            folder.write_lines(CANDIDATES_FILE, (candidate.record for candidate in new))
        new = _candidates_of(folder)
        self.known |= {candidate.candidate_id: candidate for candidate in new}
        return [*labelled, *new]

    def _open(self) -> list[str]:
        """Ids of the candidates, or of the prompts, that no round has taken yet."""
        pool = self.task.pool
        if pool.kind != "prompts":
            return [candidate.candidate_id for candidate in pool.candidates if candidate.candidate_id not in self.asked]
        used = {candidate.prompt_id for candidate in self.known.values()}
        return [prompt.prompt_id for prompt in pool.prompts if prompt.prompt_id not in used]

    def _draw(self, ids: list[str], per_label: float | None, number: int) -> list[str]:
        """A random part of some ids, the same in any order."""
        if per_label is None:
            return sorted(ids)
        keys = uniform(np.array(ids), _round_seed(self._acquire.seed, number), "draw")
        first = np.argsort(keys, kind="stable")[: math.ceil(per_label * self._need())]
        return sorted(ids[row] for row in first)

    def _need(self) -> int:
        """Labels that the next round asks for."""
        return min(self._acquire.labels_per_round, self._acquire.budget - len(self.asked))

    def _policy(self, number: int) -> ModelSource:
        """The model whose opinion counts: that of the round before."""
        results = self.results()
        trained = [result["model"] for result in results[: number - 1] if result["model"] is not None]
        base = policy_source(self.task.run.model)
        return ModelSource(trained[-1], None, base.trust_remote_code) if trained else base

    def _labels(self) -> dict[str, bool]:
        return {name: a.preferred == "first" for name, a in self.asked.items() if a.preferred in ("first", "second")}

    def _pseudo(self, features: Features) -> dict[str, bool]:
        """Labels that ADPO takes from the model itself."""
        if self._acquire.strategy != "adpo":
            return {}
        options = {name: value for name, value in self._acquire.options.items() if name != "tolerance"}
        signs = pseudo_labels(features, **options)
        rows = zip(features.pair_id.tolist(), signs.tolist(), strict=True)
        return {name: sign > 0 for name, sign in rows if sign and name not in self.asked}

    # Asking

    def _ask(self, candidates: Sequence[Candidate], number: int) -> None:
        """Ask for those that have no answer yet; each answer is on disk before the next counts."""
        waiting = [candidate for candidate in candidates if candidate.candidate_id not in self.asked]
        if not waiting:
            return
        done = len(candidates) - len(waiting)

        def on_answer(answer: Answer) -> None:
            nonlocal done
            self.folder.append(LABELS_FILE, json.dumps({"round": number, **answer._asdict()}))
            self.asked[answer.candidate_id] = answer
            done += 1
            self._display.progress("labels", done, len(candidates))
            self._check()

        if self._acquire.oracle.kind == "people":
            self._display.phase(f"waiting for people: dpo-ray label {self._queue} --as NAME")
        self._oracle().ask(waiting, on_answer)

    @property
    def _queue(self) -> str:
        return (self.folder / "queue").path

    def _oracle(self) -> Oracle:
        return make_oracle(
            self._acquire.oracle,
            seed=self._acquire.seed,
            storage=self.task.run.storage.path,
            queue=self._queue,
            should_stop=lambda: self._interrupt.is_set,
        )

    # Training

    def _pairs(self, pseudo: Mapping[str, bool]) -> list[PreferencePair]:
        """All labelled pairs so far, by candidate; ties and missing answers teach nothing."""
        labelled = {
            name: self.known[name].labelled(is_first=is_first, margin=self.asked[name].margin)
            for name, is_first in self._labels().items()
        }
        own = {name: self.known[name].labelled(is_first=is_first) for name, is_first in pseudo.items()}
        return [pair for _, pair in sorted((own | labelled).items())]

    def _train(self, pairs: Sequence[PreferencePair], number: int) -> dict[str, Any]:
        """Train on the labels; equal labels with an equal recipe are trained once, whatever chose them."""
        rows = [to_row(pair) for pair in pairs]
        run = training_recipe(self.task, rows, self._policy(number), self._acquire.seed)
        folder = Folder(run.folder)
        if folder.exists(launch.SUMMARY_FILE) and folder.read_json(launch.SUMMARY_FILE)["status"] in DONE:
            summary: dict[str, Any] = folder.read_json(launch.SUMMARY_FILE)
            return summary | {"folder": folder.path}
        folder.write_lines(PAIRS_FILE, rows)
        resume = folder.exists(RECIPE_FILE)
        tags = {**self.task.tags, LABELS_TAG: f"{self.folder.path}/{LABELS_FILE}, round {number}"}
        result = launch.fit(run, resume=resume, display=self._display, interrupt=self._interrupt, tags=tags)
        return result.summary | {"folder": folder.path}

    # Telling

    def _result(
        self,
        number: int,
        chosen: "Chosen",
        fresh: Sequence[Candidate],
        pairs: Sequence[PreferencePair],
        summary: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """`round.json`."""
        answers = [self.asked[candidate.candidate_id] for candidate in fresh]
        metric = self.task.run.best_metric
        held_out = {} if summary is None else summary.get("best_eval") or summary.get("eval") or {}
        value = held_out.get(metric)
        return {
            "round": number,
            "asked": len(self.asked),
            "new": len(fresh),
            "answers": Counter(answer.preferred for answer in answers),
            "trained_on": len(pairs),
            "pseudo": len(chosen.pseudo),
            "undecided": chosen.undecided,
            "agreement": chosen.agreement(self.asked),
            "cost": _total_cost(answers),
            "errors": len(chosen.errors),
            "characters": round(float(np.mean([_length(candidate) for candidate in fresh])), 1) if fresh else None,
            "sources": Counter(candidate.source for candidate in fresh),
            "metric": metric,
            "value": value,
            "eval": held_out,
            "run": None if summary is None else summary["folder"],
            "model": None if summary is None else summary.get("model_path"),
            "mlflow_run_id": None if summary is None else summary.get("mlflow_run_id"),
        }

    def _progress(self, text: str, done: int, total: int) -> None:
        self._display.progress(text, done, total)
        self._check()

    def _check(self) -> None:
        if self._interrupt.is_set:
            raise Interrupted


class Explained(NamedTuple):
    """A choice, and why: see `choose.Choice`."""

    candidate_id: str
    rank: int
    score: float | None
    key: float | None
    strategy: str
    stage: str
    gap: float | None
    """Implicit margin over beta of the first response less the second, where it was computed."""


class Chosen(NamedTuple):
    """`choices.json`."""

    choices: list[Explained]
    undecided: str | None
    stages: dict[str, int]
    barred: dict[str, int]
    errors: dict[str, str]
    pseudo: dict[str, bool]
    policy: str

    @classmethod
    def of(
        cls,
        selection: Selection,
        features: Features,
        errors: dict[str, str],
        pseudo: dict[str, bool],
        models: Models,
    ) -> "Chosen":
        gaps: dict[str, float] = {}
        if features.policy_logps is not None and features.reference_logps is not None:
            gaps = dict(zip(features.pair_id.tolist(), implicit_gaps(features).tolist(), strict=True))
        taken = {choice.pair_id for choice in selection.choices}
        return cls(
            [_explained(choice, gaps.get(choice.pair_id)) for choice in selection.choices],
            selection.undecided,
            selection.stages,
            selection.barred,
            errors,
            {name: is_first for name, is_first in pseudo.items() if name not in taken},
            models.policy.path,
        )

    @classmethod
    def read(cls, folder: Folder) -> "Chosen":
        tree = folder.read_json(CHOICES_FILE)
        return cls(**tree | {"choices": [Explained(**choice) for choice in tree["choices"]]})

    @property
    def tree(self) -> dict[str, Any]:
        return self._asdict() | {"choices": [choice._asdict() for choice in self.choices]}

    def agreement(self, asked: Mapping[str, Answer]) -> float | None:
        """Share of the answers that name the side which the model's implicit reward preferred; None where the model had
        no opinion."""
        signs = {"first": 1.0, "second": -1.0}
        decided = [
            (choice.gap, signs[asked[choice.candidate_id].preferred])
            for choice in self.choices
            if choice.gap and asked[choice.candidate_id].preferred in signs
        ]
        return float(np.mean([gap * sign > 0 for gap, sign in decided])) if decided and not self.undecided else None


def _explained(choice: Choice, gap: float | None) -> Explained:
    def finite(value: float) -> float | None:
        return float(value) if np.isfinite(value) else None

    own = choice._asdict()
    own |= {"candidate_id": own.pop("pair_id"), "score": finite(choice.score), "key": finite(choice.key), "gap": gap}
    return Explained(**own)


def results_of(folder: Folder) -> list[dict[str, Any]]:
    """The finished rounds of an arm's folder, in order."""
    names = [name for name in folder.folders() if name.startswith("round-") and (folder / name).exists(ROUND_FILE)]
    return [folder.read_json(f"{name}/{ROUND_FILE}") for name in names]


def training_recipe(task: Task, rows: Sequence[Mapping[str, Any]], policy: ModelSource, seed: int) -> RunConfig:
    """The recipe that a round trains by, in a run folder that is named by its content."""
    run, acquire = task.run, task.acquire
    overrides: dict[str, Any] = {
        "acquire": None,
        "storage.path": f"{task.folder.path}/seed-{seed}/runs",
        "data.fraction": 1.0,
        "data.num_pairs": None,
        "data.eval": {"num_pairs": 0},
        "train.seed": run.train.seed + seed,
        "tracking.register_as": None,
    }
    if task.pool.held_out:
        file = f"{task.folder.path}/{HELD_OUT_FILE}"
        overrides["data.eval"] = {"num_pairs": len(task.pool.held_out), "sources": [{"path": file}]}
    if acquire.start_from == "last":
        overrides |= {"model.path": policy.path, "model.revision": policy.revision}
        overrides["reference.path"] = run.reference.path or run.model.path
    tree = run.model_dump(mode="json")
    decisive = {name: section for name, section in tree.items() if name not in ELSEWHERE}
    data = {name: value for name, value in tree["data"].items() if name not in ("sources", "eval")}
    model = [run.reference.path, *(overrides.get(name) for name in ("model.path", "reference.path", "train.seed"))]
    content = content_hash(sorted(map(json.dumps, rows)), task.pool.fingerprint, decisive, data, model)
    overrides["name"] = f"{len(rows)}-pairs-{content[:12]}"
    overrides["data.sources"] = [{"path": f"{overrides['storage.path']}/{overrides['name']}/{PAIRS_FILE}"}]
    return resolve(parse_run(tree, overrides))


def batch_rule(config: BatchRuleConfig) -> Batch:
    """The rule of `choose` that a recipe names."""
    if config.kind == "top":
        return Top()
    if config.kind == "k_center":
        return KCenter(config.over)
    if config.kind == "log_det":
        return LogDet(config.over)
    return Noise(config.kind, config.sharpness)


def limits_of(config: BatchRuleConfig) -> Limits:
    return Limits(
        per_prompt=config.per_prompt,
        per_source=config.per_source,
        per_cluster=config.per_cluster,
        num_clusters=config.num_clusters,
        max_cosine=config.max_cosine,
        max_jaccard=config.max_jaccard,
    )


def _round_seed(seed: int, number: int) -> int:
    """The same for all strategies, so that their random choices are the same."""
    return 1000 * seed + number


def _candidates_of(folder: Folder) -> list[Candidate]:
    """Those that a round generated."""
    return [Candidate.from_record(row) for row in read_lines(_read(folder, CANDIDATES_FILE))]


def _read(folder: Folder, name: str) -> bytes:
    return folder.read(name) if folder.exists(name) else b""


def _length(candidate: Candidate) -> float:
    return (len(plain_text(candidate.first)) + len(plain_text(candidate.second))) / 2


def _total_cost(answers: Sequence[Answer]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for answer in answers:
        total.update(answer.cost)
    return dict(total)
