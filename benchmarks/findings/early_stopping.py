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

from benchmarks.common import table, write
from benchmarks.findings.pico import Task, make_base, pico_run, quiet, told_interval, told_verdict, train

SIZE, BETA, NOISE = 256, 0.1, 0.2
EVERY, CONTROL_EVERY = 8, 2
ALPHA = 0.01

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


def stop_of(history: Sequence[Any], patience: int) -> Stop:
    """Ask the rule after every evaluation but the last, as training does."""
    from dpo_ray.config import EarlyStoppingConfig
    from dpo_ray.stopping import best_evaluation, decide

    rule = EarlyStoppingConfig(patience=patience)
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
    return {"seed": seed, "noisy": [e._asdict() for e in noisy], "control": [e._asdict() for e in control]}


def report(runs: Sequence[dict[str, Any]], patience: int) -> str:
    """The tables and the verdicts, for one patience."""
    from dpo_ray.comparisons import p_greater, paired_t_test
    from dpo_ray.stopping import Evaluation

    histories = [[Evaluation(**e) for e in run["noisy"]] for run in runs]
    stops = [stop_of(history, patience) for history in histories]

    def values(metric: str, at: Sequence[int]) -> list[float]:
        return [history[i].metrics[metric] for history, i in zip(histories, at, strict=True)]

    places = {
        "kept": [stop.kept for stop in stops],
        "stop": [stop.at for stop in stops],
        "end": [len(history) - 1 for history in histories],
    }
    steps = {name: [h[i].step for h, i in zip(histories, at, strict=True)] for name, at in places.items()}
    rows = [["steps", *(told_interval(steps[name], 0) for name in places), "", ""]]
    for metric, meaning in METRICS.items():
        by_place = {name: values(metric, at) for name, at in places.items()}
        against = [paired_t_test(by_place[name], by_place["end"]) for name in ("kept", "stop")]
        told = [f"{t.difference.estimate:+.3f} (p {t.p_value:.2g}; {t.wins} up, {t.losses} down)" for t in against]
        rows.append([meaning, *(told_interval(v, 3) for v in by_place.values()), *told])

    saved = [1 - stop / end for stop, end in zip(steps["stop"], steps["end"], strict=True)]

    def lower(metric: str) -> tuple[str, float]:
        stop, end = (values(metric, places[name]) for name in ("stop", "end"))
        change = paired_t_test(stop, end).difference
        return f"{change.estimate:+.3f} ({change.low:+.3f} to {change.high:+.3f})", p_greater(end, stop)

    kept, end = (values("rewards/accuracies", places[name]) for name in ("kept", "end"))
    gain = paired_t_test(kept, end).difference
    checks = [
        (
            "half of the steps or more are saved",
            f"share saved {told_interval(saved)}",
            p_greater(saved, [0.5] * len(saved)),
        ),
        ("KL at the stop is below that at the end", *lower("sequence_kl")),
        ("so is held-out loss", *lower("loss")),
        ("so is the rise of base-text log-loss", *lower("forgetting")),
        (
            "held-out accuracy of the kept model is above the end's (it was picked by it, on the same pairs)",
            f"{gain.estimate:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})",
            p_greater(kept, end),
        ),
    ]
    verdicts = [[claim, numbers, f"{p:.2g}", told_verdict(p < ALPHA)] for claim, numbers, p in checks]

    best = [max(range(len(h)), key=lambda i, h=h: h[i].metrics["true_reward"]) for h in histories]
    best_step = [h[i].step for h, i in zip(histories, best, strict=True)]
    peak = f"{told_interval(values('true_reward', best))} at step {told_interval(best_step, 0)}"
    controls = [[Evaluation(**e) for e in run["control"]] for run in runs]
    control_at = [stop_of(history, patience).at for history in controls]
    shares = [history[i].step / history[-1].step for history, i in zip(controls, control_at, strict=True)]
    is_late = sum(share >= 0.5 for share in shares)
    verdicts.append(
        [
            "control: clean labels, one epoch, not stopped in its first half",
            f"{is_late} of {len(runs)} seeds; stopped at {', '.join(f'{share:.0%}' for share in shares)} of its steps",
            "",
            told_verdict(is_late == len(runs)),
        ]
    )
    never = sum(stop.at == len(history) - 1 for stop, history in zip(stops, histories, strict=True))
    return "\n\n".join(
        [
            f"**Patience {patience}**: {len(runs)} seeds, {never} of them never stopped. Means over seeds with 95 % "
            "intervals; differences to the end paired by seed, two-sided t-tests.",
            table(["", "kept", "stop", "end", "kept less end", "stop less end"], rows),
            f"True reward at its highest over the evaluations (known only here, and picked with luck): {peak}.",
            table(["claim", "numbers", "one-sided p", f"at {ALPHA}"], verdicts),
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
    parts = "\n\n".join(report(runs, patience) for patience in options.patience)
    asked = vars(options) | {"base": None, "patience": " ".join(map(str, options.patience))}
    write("early_stopping", asked, runs, parts)


if __name__ == "__main__":
    main()
