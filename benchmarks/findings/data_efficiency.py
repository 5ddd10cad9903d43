"""How do beta, the number of pairs and their mixture act together? The questions of Bernardelle & Demartini 2024
(arXiv:2410.16586) and of the Pythia/BTLM study of beta, in miniature.

The pico task with a contextual reward; pairs are samples of the reference, a tenth of them labelled wrongly.

- Sizes: nested subsets, three epochs, at each beta; curve, dips and plateaus by `dpo_ray.trends`.
- Steps: at a fixed number of epochs, steps grow with pairs. Beside it, all sizes are trained for as many steps.
- Mixture: the topics in three sources; each alone and all in equal shares, of the same total, measured on all topics.

Not here: that conversational data taught more than question answering. Sources of this grammar differ in their topics,
not in kind, so nothing in it could show or deny that. Texts have no meaning: signs carry over, sizes of effects do not.

    python benchmarks/findings/data_efficiency.py [--seeds 8] [--sizes 32 ... 2048] [--betas 0.05 0.2 1.0]
        [--fixed-steps 48] [--mixture-sizes 128 512] [--minutes M]
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import difference, over_seeds, table, verdict, write
from benchmarks.findings.pico import (
    NUM_TOPICS,
    Task,
    make_base,
    pico_run,
    quiet,
    train,
)

NOISE = 0.1
EPOCHS = 3.0
MIDDLE_BETA = 0.2
"""Of the runs of fixed steps and of the mixtures."""

SOURCES = {"A": (0, 3, 6), "B": (1, 4, 7), "C": (2, 5)}
"""Source -> its topics; each has some that leave little open and some that leave much."""

METRICS = {
    "true_reward": "true reward, SD",
    "sequence_kl": "KL(policy \\|\\| reference), nats",
    "rewards/accuracies": "held-out accuracy",
    "win_rate": "win rate against the reference",
}
CHANGES = {"rewards/accuracies": (0.01, 0.02), "true_reward": (0.05, 0.1)}
"""Metric -> the smallest change that may be called a dip, and the half width of a plateau."""

Row = dict[str, Any]
"""A training: what it was (`study`, `seed`, `size`, `beta`, `source`) and its metrics at the end."""


def measure(base: Path, storage: Path, seed: int, options: argparse.Namespace) -> list[Row]:
    """All trainings of a seed. They share reward, test prompts, held-out pairs and the order of the data."""
    task = Task(base, seed, contextual=True)
    rows: list[Row] = []

    def file(name: str, count: int, topics: Sequence[int]) -> Path:
        # Pairs of a held-out pair's prompt are not trained on, and some are alike: more are made than are asked for.
        return task.pairs(5 * count // 4, noise=NOISE, topics=topics).write(storage / f"{name}.jsonl")

    def run(study: str, sources: Sequence[Path], size: int, beta: float, source: str, **overrides: Any) -> None:
        settings = pico_run(task, storage, sources, held_out, size, loss__beta=beta, **overrides)
        metrics = train(settings, task.measure).evaluations[-1].metrics
        told = {"study": study, "seed": seed, "size": size, "beta": beta, "source": source}
        rows.append(told | {name: metrics[name] for name in (*METRICS, "loss", "forgetting")})

    everything = range(NUM_TOPICS)
    held_out = task.pairs(512, noise=NOISE).write(storage / "held-out.jsonl")
    whole = file("all", max(options.sizes), everything)
    for size in options.sizes:
        for beta in options.betas:
            run("size", [whole], size, beta, "all", train__epochs=EPOCHS)
        run("steps", [whole], size, MIDDLE_BETA, "all", train__max_steps=options.fixed_steps)
    files = {name: file(name, max(options.mixture_sizes), topics) for name, topics in SOURCES.items()}
    for size in options.mixture_sizes:
        for name, path in files.items():
            run("mixture", [path], size, MIDDLE_BETA, name, train__epochs=EPOCHS)
        run("mixture", list(files.values()), size, MIDDLE_BETA, "mix", train__epochs=EPOCHS)
    return rows


class Results:
    """The trainings of all seeds, by what they were."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.seeds = sorted({row["seed"] for row in rows})
        self.sizes = sorted({row["size"] for row in rows if row["study"] == "size"})
        self.betas = sorted({row["beta"] for row in rows if row["study"] == "size"})
        self.mixture_sizes = sorted({row["size"] for row in rows if row["study"] == "mixture"})

    def of(self, metric: str, **wanted: Any) -> list[float]:
        """One value a seed, in the order of the seeds."""
        found = {
            row["seed"]: row[metric] for row in self.rows if all(row[key] == value for key, value in wanted.items())
        }
        return [found[seed] for seed in self.seeds]

    def curve(self, metric: str, study: str, beta: float) -> Any:
        from dpo_ray.curves import Run, study_of

        wanted = (row for row in self.rows if row["study"] == study and row["beta"] == beta)
        return study_of((Run(row["size"], row["seed"], row[metric]) for row in wanted), direction="max")


def size_table(results: Results) -> str:
    rows = []
    for size in results.sizes:
        for beta in results.betas:
            told = (over_seeds(results.of(name, study="size", size=size, beta=beta)) for name in METRICS)
            rows.append([str(size), f"{beta:g}", *told])
    return table(["pairs", "beta", *METRICS.values()], rows)


def steps_table(results: Results) -> str:
    rows = []
    for size in results.sizes:
        told = (over_seeds(results.of(name, study="steps", size=size)) for name in METRICS)
        rows.append([str(size), *told])
    return table(["pairs", *METRICS.values()], rows)


def trend_table(results: Results) -> str:
    """Dips and plateaus of every curve, by test."""
    from dpo_ray.trends import trend

    rows = []
    curves = [("size", beta) for beta in results.betas] + [("steps", MIDDLE_BETA)]
    for study, beta in curves:
        for metric, (smallest_change, delta) in CHANGES.items():
            found = trend(results.curve(metric, study, beta), smallest_change=smallest_change, delta=delta)
            told = [f"{step.larger}: {step.difference.estimate:+.3f}, {step.verdict}" for step in found.steps]
            plateau = "none shown" if found.plateau_from is None else f"from {found.plateau_from}"
            name = f"{'3 epochs' if study == 'size' else 'fixed steps'}, beta {beta:g}"
            rows.append([name, METRICS[metric], "; ".join(told), plateau])
    return table(["curve", "metric", "each step up to", "plateau"], rows)


def mixture_table(results: Results) -> str:
    rows = []
    for size in results.mixture_sizes:
        mix = results.of("true_reward", study="mixture", size=size, source="mix")
        rows.append([str(size), "mix", over_seeds(mix), ""])
        for name in SOURCES:
            single = results.of("true_reward", study="mixture", size=size, source=name)
            rows.append([str(size), name, over_seeds(single), contrast(mix, single)])
    return table(["pairs", "source", "true reward, SD", "mix less this"], rows)


def contrast(first: Sequence[float], second: Sequence[float]) -> str:
    """`difference` with its one-sided p and the number of seeds in which the first is the larger."""
    from dpo_ray.comparisons import p_greater

    wins = sum(one > two for one, two in zip(first, second, strict=True))
    return f"{difference(first, second)}, p {p_greater(first, second):.2g}, {wins} of {len(first)} seeds"


def verdict_table(results: Results) -> str:
    """What was expected beforehand, and whether it holds."""
    rows = [
        *rises_with_pairs(results),
        *falls_with_beta(results),
        *accuracy_gains(results),
        kl_ratio(results),
        mixture_covers(results),
    ]
    return table(["expected", "found", ""], rows)


def rises_with_pairs(results: Results) -> Iterator[list[str]]:
    from scipy.stats import spearmanr

    num_seeds = len(results.seeds)
    for beta in results.betas:
        values = results.curve("true_reward", "size", beta).values
        ranks = [float(spearmanr(results.sizes, row).statistic) for row in values]
        high = sum(rank >= 0.9 for rank in ranks)
        yield [
            f"(a) beta {beta:g}: true reward rises with pairs, Spearman's rho of at least 0.9 in 5 of 6 seeds",
            f"{high} of {num_seeds} seeds; least {min(ranks):.2f}",
            verdict(high >= 5 / 6 * num_seeds),
        ]


def falls_with_beta(results: Results) -> Iterator[list[str]]:
    from dpo_ray.comparisons import p_greater

    most = results.sizes[-1]
    for metric, name in (("true_reward", "true reward"), ("sequence_kl", "KL")):
        for low, high in itertools.pairwise(results.betas):
            first, second = (results.of(metric, study="size", size=most, beta=beta) for beta in (low, high))
            claim = f"(b) {most} pairs: {name} at beta {low:g} is above that at {high:g}, p < 0.01"
            yield [claim, contrast(first, second), verdict(p_greater(first, second) < 0.01)]


def accuracy_gains(results: Results) -> Iterator[list[str]]:
    from dpo_ray.comparisons import p_greater

    most = results.sizes[-1]
    fewest = 128 if 128 in results.sizes else results.sizes[0]
    for beta in results.betas:
        first, second = (
            results.of("rewards/accuracies", study="size", size=size, beta=beta) for size in (most, fewest)
        )
        p_any, p_more = p_greater(first, second), p_greater(first, second, 0.08)
        is_large = float(np.mean(first) - np.mean(second)) > 0.08
        yield [
            f"(c) beta {beta:g}: held-out accuracy of {most} pairs is above that of {fewest}, p < 0.01, "
            "in the mean by more than 0.08",
            f"{difference(first, second, 3)}, p {p_any:.2g}; of more than 0.08 by test, p {p_more:.2g}",
            verdict(is_large and p_any < 0.01),
        ]


def kl_ratio(results: Results) -> list[str]:
    most, low, high = results.sizes[-1], results.betas[0], results.betas[-1]
    first, second = (float(np.mean(results.of("sequence_kl", study="size", size=most, beta=b))) for b in (low, high))
    return [
        f"(d) {most} pairs: KL at beta {low:g} is at least 5 times that at {high:g}",
        f"{first:.2f} against {second:.2f} nats, {first / second:.1f} times",
        verdict(first >= 5 * second),
    ]


def mixture_covers(results: Results) -> list[str]:
    from dpo_ray.comparisons import p_greater

    size = results.mixture_sizes[-1]
    mix = results.of("true_reward", study="mixture", size=size, source="mix")
    alone = [results.of("true_reward", study="mixture", size=size, source=name) for name in SOURCES]
    mean = [float(np.mean(values)) for values in zip(*alone, strict=True)]
    wins = sum(one > two for one, two in zip(mix, mean, strict=True))
    return [
        f"(e) {size} pairs: the mixture's true reward is above its sources' mean, p < 0.05 and in 7 of 8 seeds",
        contrast(mix, mean),
        verdict(p_greater(mix, mean) < 0.05 and wins >= 7 / 8 * len(mix)),
    ]


def report(results: Results, fixed_steps: int) -> str:
    return "\n\n".join(
        [
            f"{len(results.seeds)} seeds; means over them with 95 % intervals; tests are paired by seed, "
            "and one-sided.",
            "**Verdicts**",
            verdict_table(results),
            "What this does not replicate: that conversational data beats question answering (arXiv:2410.16586) has no "
            "counterpart here, since the sources differ in topics and not in kind. (e) shows coverage, the mechanism "
            "behind a combination that is best, and no more.",
            f"**Pairs and beta, {EPOCHS:g} epochs.** Confounded: a run of twice the pairs takes twice the steps.",
            size_table(results),
            f"**The same pairs at beta {MIDDLE_BETA:g}, {fixed_steps} steps for every size**, so that only the pairs "
            f"differ; {results.sizes[0]} pairs are then seen {fixed_steps * 32 / results.sizes[0]:.0f} times.",
            steps_table(results),
            "**Dips and plateaus by test.** A dip or rise: Holm-adjusted one-sided p below 0.05 and more than 0.01 "
            "(accuracy) or 0.05 SD (reward). A plateau: equivalence with every later size within 0.02 or 0.1 SD.",
            trend_table(results),
            f"**Mixture**, beta {MIDDLE_BETA:g}, {EPOCHS:g} epochs, measured on all topics.",
            mixture_table(results),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.05, 0.2, 1.0])
    parser.add_argument("--fixed-steps", type=int, default=48)
    parser.add_argument("--mixture-sizes", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--minutes", type=float, help="begin no further seed after so many")
    parser.add_argument("--base", type=Path, help="folder of the base model, made there if it is not; null: not kept")
    options = parser.parse_args()
    quiet()
    rows: list[Row] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(options.base or Path(folder) / "base")
        for seed in range(options.seeds):
            if options.minutes is not None and time.monotonic() - began > options.minutes * 60:
                break
            storage = Path(folder) / f"seed-{seed}"
            storage.mkdir()
            rows += measure(base, storage, seed, options)
            print(f"seed {seed + 1}/{options.seeds}", file=sys.stderr)
    asked = {
        key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in vars(options).items()
    }
    write("data_efficiency", asked | {"base": None}, rows, report(Results(rows), options.fixed_steps))


if __name__ == "__main__":
    main()
