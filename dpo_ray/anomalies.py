"""What goes wrong in a run, by name, with the evidence and what to try. Pure: history of the lines -> findings.

One short function for each anomaly. Each looks at the end of the history only, so that a run may ask after every line,
and a resumed run finds what an unbroken one does. Thresholds and their reasons stand beside the rules. One run is one
seed: what these rules can tell from noise is noise of held-out pairs, not of seeds (`trends` has the tests over seeds).
"""

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from dpo_ray.metrics import standard_error, wilson_interval
from dpo_ray.stopping import Evaluation

ACCURACIES = "rewards/accuracies"


class Anomaly(NamedTuple):
    """Something that is wrong with a run."""

    name: str
    step: int
    """Of the line at which it was found."""
    evidence: str
    advice: str
    """What to try."""


class History(NamedTuple):
    """A run up to its last line. `held_out` has no evaluation of step 0, where every reward is zero."""

    train: Sequence[Evaluation]
    held_out: Sequence[Evaluation]
    num_steps: int
    """Of the whole run."""
    waiting: Sequence[float]
    """Of each step that was timed so far: the share of its time that went into reading and planning its batch."""

    @property
    def step(self) -> int:
        return max(line.step for line in (*self.train[-1:], *self.held_out[-1:]))

    @property
    def judged(self) -> Sequence[Evaluation]:
        """The evaluations; the training lines of a run that holds no pairs out."""
        return self.held_out or self.train


LEFT_KL = 0.1
"""Nats per token: the data's responses have a tenth more perplexity than under the reference. Below it, displacement
is what every run of DPO shows in its first steps."""


def likelihood_displacement(history: History) -> str | None:
    """Chosen log-probs sank by more than the margin that it bought, in two evaluations in a row.

    Both responses of a pair lose probability, to something that is in neither (Razin et al. 2024, arXiv:2410.08847).
    A slight fall is normal. Counted is one with `kl` above `LEFT_KL`; for a loss without a reference, which has no
    `kl`, one of a tenth of the best log-prob so far.
    """
    last = history.judged[-2:]
    if len(last) < 2:
        return None
    if all("kl" in line.metrics and "rewards/margins" in line.metrics for line in last):
        if all(_is_displaced(line.metrics) for line in last):
            now = last[-1].metrics
            return (
                f"chosen rewards fell to {now['rewards/chosen']:.3g} for margins of {now['rewards/margins']:.3g}, and "
                f"the data's responses lost {now['kl']:.2g} nats per token"
            )
        return None
    if any("kl" in line.metrics for line in last) or not history.held_out:
        return None
    best = max(line.metrics["logps/chosen"] for line in history.held_out)
    if all(line.metrics["logps/chosen"] < 1.1 * best for line in last):
        return f"logps/chosen sank from {best:.4g} to {last[-1].metrics['logps/chosen']:.4g} nats"
    return None


def _is_displaced(metrics: dict[str, float]) -> bool:
    return metrics["kl"] > LEFT_KL and metrics["rewards/chosen"] < -max(metrics["rewards/margins"], 0.0)


LENGTH_GAP = 0.2
"""Between the two accuracies: below it length is one feature among others, however many pairs say so."""


def length_hacking(history: History) -> str | None:
    """The reward follows length: pairs whose chosen response is the longer are ranked rightly, the others wrongly.

    In two evaluations in a row the one accuracy is above a half and the other below, both by their 95 % interval, and
    `LENGTH_GAP` lies between. Comparing the two groups leaves out how often the data's chosen response is the longer
    (Park et al. 2024, arXiv:2403.19159, on why DPO takes to length).
    """
    last = history.held_out[-2:]
    if len(last) < 2 or not all(_follows_length(line.metrics) for line in last):
        return None
    now = last[-1].metrics
    return (
        f"held-out {ACCURACIES} is {now[f'{ACCURACIES}_longer']:.2f} on {now['num_longer']:.0f} pairs whose chosen "
        f"response is the longer, {now[f'{ACCURACIES}_shorter']:.2f} on {now['num_shorter']:.0f} where it is shorter"
    )


def _follows_length(metrics: dict[str, float]) -> bool:
    longer, shorter = metrics.get(f"{ACCURACIES}_longer"), metrics.get(f"{ACCURACIES}_shorter")
    if longer is None or shorter is None:
        return False
    low, _ = wilson_interval(longer, int(metrics["num_longer"]))
    _, high = wilson_interval(shorter, int(metrics["num_shorter"]))
    return low > 0.5 > high and longer - shorter > LENGTH_GAP


MOST_KL = 1.0
"""Nats per token: the data's typical token has 37 % of its probability left, 50 nats are gone on 50 tokens, where
budgets of published runs are 10 to 20 nats a response."""


def exploding_kl(history: History) -> str | None:
    """`kl` above `MOST_KL` in an evaluation, or in two training lines in a row: one may be of few odd pairs."""
    for what, last, needed in (("held-out", history.held_out[-1:], 1), ("training", history.train[-2:], 2)):
        if len(last) == needed and all(line.metrics.get("kl", 0.0) > MOST_KL for line in last):
            return (
                f"the responses of {what} pairs lost {last[-1].metrics['kl']:.3g} nats per token against the reference"
            )
    return None


PLATEAU = 8
"""Evaluations at least."""
PLATEAU_ERROR, PLATEAU_ACCURACY = 0.035, 0.9
"""A larger standard error (fewer than some 200 pairs) hides a rise; at so high an accuracy a plateau is the goal."""


def accuracy_plateau(history: History) -> str | None:
    """Held-out accuracy kept within one standard error over half of the evaluations so far, `PLATEAU` at least.

    Evaluations share their pairs, so where the policy no longer changes its mind they hardly differ, and a rise of
    less than the error could not be told from luck. Not told where the learning rate has fallen below a fifth of its
    highest: then the schedule ends.
    """
    seen = [line for line in history.held_out if ACCURACIES in line.metrics]
    last = seen[-max(PLATEAU, len(seen) // 2) :]
    if len(last) < PLATEAU or not _is_learning(history, 0.2):
        return None
    values = [line.metrics[ACCURACIES] for line in last]
    error = _error(last[-1])
    if max(values) - min(values) > error or error > PLATEAU_ERROR or statistics.median(values) > PLATEAU_ACCURACY:
        return None
    return (
        f"held-out {ACCURACIES} stayed between {min(values):.3f} and {max(values):.3f} from step {last[0].step} to "
        f"{last[-1].step}, at a standard error of {error:.3f}"
    )


DIP_ERRORS = 3.0


def accuracy_dip(history: History) -> str | None:
    """Held-out accuracy fell below its best by more than `DIP_ERRORS` standard errors of the difference.

    Compared are medians of the last three evaluations: one unlucky evaluation is no dip. The best of many is in part
    the luckiest, so the errors are three and not two.
    """
    seen = [line for line in history.held_out if ACCURACIES in line.metrics]
    if len(seen) < 4:
        return None
    smooth = [
        statistics.median(line.metrics[ACCURACIES] for line in seen[max(0, i - 2) : i + 1]) for i in range(len(seen))
    ]
    earlier = smooth[:-3]
    best = max(range(len(earlier)), key=earlier.__getitem__)
    fall = smooth[best] - smooth[-1]
    if fall <= DIP_ERRORS * math.hypot(_error(seen[best]), _error(seen[-1])):
        return None
    return (
        f"held-out {ACCURACIES} fell from {smooth[best]:.3f} around step {seen[best].step} to {smooth[-1]:.3f} "
        f"(medians of three; standard error of one {_error(seen[-1]):.3f})"
    )


SPIKE_LINES, SPIKE_FACTOR, SPIKE_DEVIATIONS = (8, 20), 6.0, 6.0
"""Least and most lines that make the usual norm, and how far above it a spike is."""


def gradient_spike(history: History) -> str | None:
    """The largest gradient norm since the last line is above `SPIKE_FACTOR` times the usual one, and `SPIKE_DEVIATIONS`
    robust standard deviations above it.

    Usual is the median of the logarithms of the lines before; their deviation is 1.4826 median absolute deviations,
    so that neither an earlier spike nor the slow growth of norms counts.
    """
    norms = [_log_norm(line) for line in history.train[-SPIKE_LINES[1] - 1 :]]
    *before, now = norms or [None]
    usual = [norm for norm in before if norm is not None]
    if now is None or len(usual) < SPIKE_LINES[0]:
        return None
    middle = statistics.median(usual)
    deviation = 1.4826 * statistics.median(abs(norm - middle) for norm in usual)
    if now - middle <= max(math.log(SPIKE_FACTOR), SPIKE_DEVIATIONS * deviation):
        return None
    return f"gradient norm {math.exp(now):.3g}, {math.exp(now - middle):.1f} times the usual {math.exp(middle):.3g}"


def _log_norm(line: Evaluation) -> float | None:
    """None where it is not finite, which is the business of fp16's loss scaler, or 0."""
    norm = line.metrics.get("grad_norm_max", 0.0)
    return math.log(norm) if 0 < norm < math.inf else None


STILL_REWARD, STILL_KL = 1e-3, 1e-4
"""Nats, and nats per token: a preference that moved by less has changed its probability by less than 0.025 %."""


def dead_learning_rate(history: History) -> str | None:
    """After a quarter of the run rewards and `kl` are still where they began, with the rate far from its end.

    Whether the rate is too small, or gradients vanish or are rounded away: nothing moves. Read off the last evaluation
    or, where there is none yet, the last training line; of losses with a reference only, whose rewards begin at 0.
    """
    if history.step < history.num_steps / 4 or len(history.train) < 3 or not _is_learning(history, 0.1):
        return None
    now = (history.held_out[-1] if history.held_out else history.train[-1]).metrics
    if "kl" not in now or "rewards/margins" not in now:
        return None
    rewards = max(abs(now[f"rewards/{name}"]) for name in ("chosen", "rejected", "margins"))
    if rewards >= STILL_REWARD or abs(now["kl"]) >= STILL_KL:
        return None
    return (
        f"after {history.step} of {history.num_steps} steps no mean reward is further than {rewards:.1g} from 0, at a "
        f"learning rate of {history.train[-1].metrics['learning_rate']:.2g}"
    )


STARVED_SHARE, STARVED_STEPS = 0.3, 5
"""Of a step's time, and steps that must have been timed: the first ones fill caches."""


def loader_starvation(history: History) -> str | None:
    """At the median of the last timed steps the model waited for its batch longer than `STARVED_SHARE` of the time."""
    last = history.waiting[-STARVED_STEPS:]
    if len(last) < STARVED_STEPS or statistics.median(last) <= STARVED_SHARE:
        return None
    return f"{statistics.median(last):.0%} of a step's time is spent on reading and planning its batch"


def overtraining(history: History) -> str | None:
    """Accuracy on training pairs rises while the held-out one falls and chosen log-probs sink.

    That is the signature of DPO that only pushes responses away (Rafailov et al. 2024, arXiv:2406.02900). Looks at the
    last three evaluations and the training lines between them; the fall must be more than two standard errors of the
    difference.
    """
    recent = history.held_out[-3:]
    if len(recent) < 3 or ACCURACIES not in recent[0].metrics:
        return None
    first, last = recent[0], recent[-1]
    before = [line for line in history.train if line.step <= first.step][-1:]
    after = [line for line in history.train if line.step <= last.step][-1:]
    if not before or not after:
        return None
    fall = first.metrics[ACCURACIES] - last.metrics[ACCURACIES]
    sinks = last.metrics["logps/chosen"] < first.metrics["logps/chosen"]
    rises = after[0].metrics[ACCURACIES] > before[0].metrics[ACCURACIES]
    if not (rises and sinks and fall > 2 * math.hypot(_error(first), _error(last))):
        return None
    return (
        f"from step {first.step} to {last.step} {ACCURACIES} rose on training pairs to "
        f"{after[0].metrics[ACCURACIES]:.2f} while the held-out one fell by {fall:.3f} and chosen log-probs sank"
    )


def _error(line: Evaluation) -> float:
    return standard_error(ACCURACIES, line.metrics[ACCURACIES], int(line.metrics["num_pairs"]))


def _is_learning(history: History, share: float) -> bool:
    """The learning rate is at least so large a share of its highest."""
    rates = [line.metrics["learning_rate"] for line in history.train if "learning_rate" in line.metrics]
    return bool(rates) and rates[-1] >= share * max(rates) > 0


DETECTORS: dict[str, tuple[Callable[[History], str | None], str]] = {
    "likelihood_displacement": (
        likelihood_displacement,
        "a smaller learning rate or fewer epochs, a larger beta, DPO-Positive (loss.kind=dpop) or an added likelihood "
        "term, pairs that differ more",
    ),
    "length_hacking": (
        length_hacking,
        "more pairs whose chosen response is the shorter, a length-normalised loss or LD-DPO, a larger beta",
    ),
    "exploding_kl": (
        exploding_kl,
        "a smaller learning rate, a larger beta, early_stopping.max_kl",
    ),
    "accuracy_plateau": (
        accuracy_plateau,
        "early stopping; more or other data; a larger learning rate if training accuracy stands still too",
    ),
    "accuracy_dip": (
        accuracy_dip,
        "early stopping, which keeps the best checkpoint; a smaller learning rate or fewer epochs",
    ),
    "gradient_spike": (
        gradient_spike,
        "optim.max_grad_norm, longer warm-up, more pairs per step; look for odd or wrongly labelled pairs",
    ),
    "dead_learning_rate": (
        dead_learning_rate,
        "a larger learning rate, fp32 weights if updates are rounded away, the targets of the adapter",
    ),
    "loader_starvation": (
        loader_starvation,
        "storage nearer to the workers, more CPUs per worker, more tokens per device",
    ),
    "overtraining": (
        overtraining,
        "early stopping, fewer epochs, more data, a larger beta",
    ),
}
"""Name -> rule, and what to try."""


def find_anomalies(
    train: Sequence[Evaluation],
    held_out: Sequence[Evaluation],
    *,
    num_steps: int,
    waiting: Sequence[float] = (),
    known: Collection[str] = (),
) -> list[Anomaly]:
    """What is wrong at the end of a history, in the order of `DETECTORS`.

    Args:
        train: Training lines, each over the steps since the one before.
        held_out: Evaluations; step 0 is not looked at.
        num_steps: Of the whole run.
        waiting: Of each step that was timed so far, the share of its time spent on reading and planning its batch.
        known: Names that were told before: each is told once in a run, at its first step.
    """
    history = History(train, [line for line in held_out if line.step > 0], num_steps, waiting)
    if not history.train and not history.held_out:
        return []
    found = []
    for name, (detector, advice) in DETECTORS.items():
        evidence = None if name in known else detector(history)
        if evidence is not None:
            found.append(Anomaly(name, history.step, evidence, advice))
    return found
