"""What does stopping on held-out rewards/accuracies save when training goes on too long over noisy labels, and what
does it cost?

The pico task with a contextual reward, 256 pairs of which a fifth are labelled wrongly, 320 steps (40 epochs) at beta
0.1. Every 8 steps the held-out pairs are evaluated, as noisy as the others, and what only a known task tells is
measured. `dpo_ray.stopping.decide` is then asked after each evaluation, as in training: up to where it stops, the two
trainings are one. Three models are compared: `kept`, the best evaluated one, which a stopped run exports; `stop`, as
training left it; and `end`, as the last step would have. Control: clean labels, 2048 pairs, one epoch, evaluated every
2 steps, where a rule that stops in the first half would stop a run that is still learning.

    python benchmarks/findings/early_stopping.py [--seeds 12] [--steps 320] [--patience 5] [--control-pairs 2048]
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import difference, over_seeds, table, verdict, write
from benchmarks.findings.pico import Task, make_base, pico_run, quiet, train

SIZE, BETA, NOISE = 256, 0.1, 0.2
EVERY, CONTROL_EVERY = 8, 2
ALPHA = 0.01

ELSE = "**Other settings of the rule on the same trainings**, chosen with them at hand: a description, not a test."

METRICS = {
    "rewards/accuracies": "held-out accuracy",
    "loss": "held-out loss, nats",
    "sequence_kl": "KL(policy \\|\\| reference), nats",
    "forgetting": "rise of base-text log-loss, nats",
    "true_reward": "true reward, SD",
    "win_rate": "win rate against the reference",
}


class Stop(NamedTuple):
    """Where a rule ends a training; the last evaluation if it never does. Numbers of evaluations, from 0."""

    at: int
    kept: int
    """The best one up to there."""


def stop_of(history: Sequence[Any], patience: int, smoothing: int = 1) -> Stop:
    """Ask the rule after every evaluation but the last, as training does."""
    from dpo_ray.config import EarlyStoppingConfig
    from dpo_ray.stopping import best_evaluation, decide

    rule = EarlyStoppingConfig(patience=patience, smoothing=smoothing)
    at = next((i for i in range(len(history) - 1) if decide(rule, history[: i + 1]).stop), len(history) - 1)
    best = best_evaluation(history[: at + 1], rule.metric)
    return Stop(at, next(i for i, evaluation in enumerate(history) if evaluation is best))


def measure(base: Path, storage: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Both trainings of a seed: their evaluations."""
    task = Task(base, seed, contextual=True)

    def histories(name: str, num_pairs: int, noise: float, ask: Any, **overrides: Any) -> list[Any]:
        # Pairs of a held-out pair's prompt are not trained on, and some are alike: more are made than are asked for.
        train_file = task.pairs(2 * num_pairs, noise=noise).write(storage / f"{name}.jsonl")
        held_out = task.pairs(options.held_out, noise=noise).write(storage / f"{name}-held-out.jsonl")
        run = pico_run(task, storage, [train_file], held_out, num_pairs, loss__beta=BETA, **overrides)
        return train(run, ask).evaluations

    noisy = histories("noisy", SIZE, NOISE, task.measure, train__max_steps=options.steps, eval__every_steps=EVERY)
    control = histories("control", options.control_pairs, 0.0, None, eval__every_steps=CONTROL_EVERY)
    return {"seed": seed, "noisy": written(noisy), "control": written(control)}


def written(history: Sequence[Any]) -> list[dict[str, Any]]:
    """Evaluations as the results keep them: the metrics that are reported."""
    names = ("num_pairs", *METRICS)
    return [
        {"step": step, "metrics": {name: round(metrics[name], 6) for name in names if name in metrics}}
        for step, metrics in history
    ]


class Outcome(NamedTuple):
    """The noisy trainings of all seeds under one rule."""

    histories: list[list[Any]]
    places: dict[str, list[int]]
    """`kept`, `stop`, `end`, and where the true reward is `highest` -> number of the evaluation, by seed."""

    def of(self, metric: str, place: str) -> list[float]:
        """One value a seed."""
        return [history[i].metrics[metric] for history, i in zip(self.histories, self.places[place], strict=True)]

    def saved(self) -> list[float]:
        """Share of the steps, by seed."""
        return [1 - stop / end for stop, end in zip(self.steps("stop"), self.steps("end"), strict=True)]

    def steps(self, place: str) -> list[int]:
        return [history[i].step for history, i in zip(self.histories, self.places[place], strict=True)]


def outcome_of(runs: Sequence[dict[str, Any]], patience: int, smoothing: int = 1) -> Outcome:
    histories = [evaluations(run["noisy"]) for run in runs]
    stops = [stop_of(history, patience, smoothing) for history in histories]
    rewards = [[evaluation.metrics["true_reward"] for evaluation in history] for history in histories]
    places = {
        "kept": [stop.kept for stop in stops],
        "stop": [stop.at for stop in stops],
        "end": [len(history) - 1 for history in histories],
        "highest": [values.index(max(values)) for values in rewards],
    }
    return Outcome(histories, places)


def evaluations(told: Sequence[dict[str, Any]]) -> list[Any]:
    from dpo_ray.stopping import Evaluation

    return [Evaluation(**evaluation) for evaluation in told]


def comparison_table(outcome: Outcome) -> str:
    from dpo_ray.comparisons import paired_t_test

    places = ("kept", "stop", "end")
    rows = [["steps", *(over_seeds(outcome.steps(place), 0) for place in places), "", ""]]
    for metric, meaning in METRICS.items():
        values = {place: outcome.of(metric, place) for place in places}
        told = []
        for place in ("kept", "stop"):
            test = paired_t_test(values[place], values["end"])
            change = difference(values[place], values["end"], 3)
            told.append(f"{change}, p {test.p_value:.2g}, {test.wins} up, {test.losses} down")
        rows.append([meaning, *(over_seeds(values[place], 3) for place in places), *told])
    return table(["", *places, "kept less end", "stop less end"], rows)


def verdict_table(outcome: Outcome, runs: Sequence[dict[str, Any]], patience: int) -> str:
    from dpo_ray.comparisons import p_greater

    saved = outcome.saved()
    rows = []

    def claim(text: str, numbers: str, p: float) -> None:
        rows.append([text, numbers, f"{p:.2g}", verdict(p < ALPHA)])

    claim("more than half of the steps are saved", f"share {over_seeds(saved)}", p_greater(saved, [0.5] * len(saved)))
    for metric, text in (
        ("sequence_kl", "KL at the stop is below the end's"),
        ("loss", "held-out loss at the stop is below the end's"),
        ("forgetting", "the rise of base-text log-loss at the stop is below the end's"),
    ):
        stop, end = (outcome.of(metric, place) for place in ("stop", "end"))
        claim(text, difference(stop, end, 3), p_greater(end, stop))
    kept, end = (outcome.of("rewards/accuracies", place) for place in ("kept", "end"))
    text = "held-out accuracy of the kept model is above the end's (it was picked by it, on the same pairs)"
    claim(text, difference(kept, end, 3), p_greater(kept, end))

    ended = control_ends(runs, patience)
    num_late = sum(share >= 0.5 for share in ended)
    told = f"{num_late} of {len(runs)} seeds; ended after {', '.join(f'{share:.0%}' for share in ended)} of the steps"
    text = "control, clean labels and one epoch: not stopped in its first half"
    rows.append([text, told, "", verdict(num_late == len(runs))])
    return table(["expected", "found", "one-sided p", f"at {ALPHA}"], rows)


def control_ends(runs: Sequence[dict[str, Any]], patience: int, smoothing: int = 1, every: int = 1) -> list[float]:
    """Share of its steps after which each control ends, when asked at every `every`-th of its evaluations."""
    histories = [evaluations(run["control"])[every - 1 :: every] for run in runs]
    return [history[stop_of(history, patience, smoothing).at].step / history[-1].step for history in histories]


def other_rules(runs: Sequence[dict[str, Any]]) -> str:
    """The same trainings under other settings of the rule: no verdicts, they were chosen with the runs at hand."""
    rows = []
    for patience in (3, 5, 8):
        for smoothing in (1, 3):
            outcome = outcome_of(runs, patience, smoothing)
            cost = difference(outcome.of("true_reward", "kept"), outcome.of("true_reward", "end"))
            gain = difference(outcome.of("rewards/accuracies", "kept"), outcome.of("rewards/accuracies", "end"), 3)
            late = [sum(share >= 0.5 for share in control_ends(runs, patience, smoothing, every)) for every in (1, 2)]
            told = [f"{count} of {len(runs)}" for count in late]
            rows.append([str(patience), str(smoothing), over_seeds(outcome.saved()), gain, cost, *told])
    head = [
        "patience",
        "smoothing",
        "share of steps saved",
        "accuracy, kept less end",
        "true reward, kept less end, SD",
        f"controls that pass, asked every {CONTROL_EVERY} steps",
        f"every {2 * CONTROL_EVERY}",
    ]
    return table(head, rows)


def report(runs: Sequence[dict[str, Any]], patience: int) -> str:
    """Both tables for one patience, and what stopping costs in the true reward."""
    from dpo_ray.comparisons import paired_t_test

    outcome = outcome_of(runs, patience)
    num_whole = sum(stop == end for stop, end in zip(outcome.places["stop"], outcome.places["end"], strict=True))
    end, costs = outcome.of("true_reward", "end"), []
    for place in ("kept", "stop"):
        test = paired_t_test(outcome.of("true_reward", place), end)
        found = "better" if test.difference.estimate > 0 else "worse"
        found = found if test.p_value < ALPHA else "not distinguishable"
        told = difference(outcome.of("true_reward", place), end)
        costs.append(f"of the `{place}` model {told} SD, p {test.p_value:.2g}: {found}")
    return "\n\n".join(
        [
            f"**Patience {patience}**, {len(runs)} seeds, of which {num_whole} never stopped. Means over seeds with "
            "95 % intervals; differences are paired by seed, their p two-sided.",
            comparison_table(outcome),
            verdict_table(outcome, runs, patience),
            f"True reward against the end's: {'; '.join(costs)}. At its highest over the evaluations, which only a "
            f"known task shows and luck flatters, it is {over_seeds(outcome.of('true_reward', 'highest'))} SD, at step "
            f"{over_seeds(outcome.steps('highest'), 0)}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--patience", type=int, nargs="+", default=[5, 3], help="5; and 3, the recipe's default")
    parser.add_argument("--held-out", type=int, default=512)
    parser.add_argument("--control-pairs", type=int, default=2048)
    parser.add_argument("--base", type=Path, help="folder of the base model, made there if it is not; null: not kept")
    options = parser.parse_args()
    quiet()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(options.base or Path(folder) / "base")
        for seed in range(options.seeds):
            storage = Path(folder) / f"seed-{seed}"
            storage.mkdir()
            runs.append(measure(base, storage, seed, options))
            print(f"seed {seed + 1}/{options.seeds}", file=sys.stderr)
    parts = "\n\n".join([*(report(runs, patience) for patience in options.patience), ELSE, other_rules(runs)])
    asked = vars(options) | {"base": None, "patience": " ".join(map(str, options.patience))}
    write("early_stopping", asked, runs, parts)


if __name__ == "__main__":
    main()
