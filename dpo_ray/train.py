"""What one worker does, top to bottom: load, check, step, evaluate, save.

Runs inside Ray Train's process group. All ranks hold the same plan and the same reduced numbers, so they decide alike
(evaluate, save, stop) without talking. Rank 0 writes `metrics.jsonl`; the driver reads it.
"""

import dataclasses
import json
import math
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray.train
import ray.train.collective
import torch
from ray.train import CheckpointUploadMode

from dpo_ray import attempts, checkpoint, manifest, pulse
from dpo_ray.anomalies import find_anomalies
from dpo_ray.checkpoint import TrainState
from dpo_ray.config import BatchConfig, RunConfig
from dpo_ray.data.batching import MicroBatch, lengths_of, make_batch, plan_step
from dpo_ray.data.encode import TokenFiles, TokenTable
from dpo_ray.device import peak_rate
from dpo_ray.engine import ZeroEngine, sharded_loading
from dpo_ray.errors import RunFailed
from dpo_ray.lease import holds
from dpo_ray.logps import tail_sums
from dpo_ray.losses import Loss, PairLogps, PairTerms, loss_function, match_gaps
from dpo_ray.metrics import MetricSums, held_out_names, means, means_with_interval, pair_sums
from dpo_ray.models import (
    DTYPES,
    ResponseLogps,
    copy_generation_settings,
    export,
    load_policy,
    load_tokenizer,
    policy_source,
    usable_layout,
)
from dpo_ray.notices import Notice, Watch, is_close
from dpo_ray.pairs import PairBatch, TokenizedPair
from dpo_ray.prepare import step_order
from dpo_ray.reference import ReferenceStore, ReferenceTable
from dpo_ray.stopping import Evaluation, best_evaluation, decide
from dpo_ray.storage import Folder, locate, read_lines
from dpo_ray.uploads import Uploads

METRICS_FILE = "metrics.jsonl"

BAD_FILE = "bad_steps.jsonl"
"""Pairs of the steps whose loss or gradient was not finite."""

LEAVE_MARGIN_S = 20.0
"""A node that goes within this time, and the time of two checkpoints, gets the last one now."""


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """What the driver sends to every worker: values only."""

    run: RunConfig
    train_pairs: TokenFiles
    held_out_pairs: TokenFiles
    reference: ReferenceStore | None
    """None for a loss without a reference."""
    reference_is_start: bool
    """The reference is the model before training, so the first loss must be ln 2."""
    lease: str
    """Token of the attempt; the workers stop when the run folder holds another."""


def train_loop(job: TrainJob) -> dict[str, Any]:
    """Train on this worker; returns the workers' part of `summary.json`."""
    run, context = job.run, ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    if rank == 0 and not holds(Folder(run.folder), job.lease):
        raise RunFailed(f"another attempt holds the run {run.folder}: this one does not start")
    torch.set_num_threads(max(1, int(run.cluster.cpus_per_worker)))
    order = step_order(run, job.train_pairs.num_pairs)
    pulse.enter("loading")
    with sharded_loading(run.engine, run.optim):
        model = load_policy(run.model, run.engine.precision, run.train.seed)
    worker = Worker(ZeroEngine(model, run.engine, run.optim, order.num_steps), run, rank, world_size, job.lease)
    tails = "tails" in worker.loss.needs
    train = PairSet(job.train_pairs, job.reference, worker.batch, tails)
    evaluation = PairSet(job.held_out_pairs, job.reference, worker.batch, tails)

    torch.manual_seed(run.train.seed + rank)
    pulse.enter("restoring")
    state, faults = restore(worker.engine, run, rank, world_size)
    resumed_from, state.stop_reason = state.step or None, None
    log = RunLog(run.folder, rank, state.step)
    log.started(state.step, world_size)
    for fault in faults:
        log.write({"step": state.step, "event": f"checkpoint not used, {fault}"})
    if worker.batch.layout == "padded" != run.batch.layout:
        log.write({"step": state.step, "event": "this architecture needs padded rows: every prompt is computed twice"})
    if state.step == 0:
        worker.self_check(train, order.pairs_of(1), job.reference_is_start)

    while state.step < order.num_steps and state.stop_reason is None:
        began = time.perf_counter()
        step = state.step + 1
        is_last = step == order.num_steps
        is_logged = step == 1 or step % run.train.log_every_steps == 0 or is_last
        timed = is_logged and step > 1
        sums, notices = worker.step(train, order.pairs_of(step), step, is_timed=timed)  # of a skipped step, its cost
        state.add_step(sums, time.perf_counter() - began)
        state.add_norm(worker.last_step.get("grad_norm", 0.0))

        if is_logged and state.since_log["num_pairs"] > 0:
            line = means(state.since_log) | worker.last_step | {"grad_norm_max": state.grad_norm_max}
            state.train_lines.append(Evaluation(step, line))
            state.since_log, state.grad_norm_max = {}, 0.0
            rate = order.pairs_before(step) / state.train_seconds
            log.write({"step": step, "epoch": order.epoch_at(step), **line, "pairs_per_second": rate})

        evaluated = len(evaluation.pairs) > 0 and (step % run.eval.every_steps == 0 or is_last)
        if evaluated:
            began = time.perf_counter()
            line, margins = worker.evaluate(evaluation)
            state.evaluation_seconds += time.perf_counter() - began
            state.evaluations.append(Evaluation(step, line))
            log.write({"step": step, "epoch": order.epoch_at(step), **held_out_names(line)})
            log.write_margins(step, margins)
            if run.early_stopping is not None and not is_last:
                state.stop_reason = decide(run.early_stopping, state.evaluations).reason
        if is_logged or evaluated:
            log.write_anomalies(state, order.num_steps, worker.times.waiting)
        if Notice.STOP in notices:
            state.stop_reason = "interrupted"
        going = worker.ask_about_nodes() if Notice.LOOK in notices else None

        best = best_evaluation(state.evaluations, run.best_metric)
        is_best = evaluated and best is not None and best.step == step
        is_due = (
            step % run.checkpoint.every_steps == 0 or Notice.SAVE in notices or (going is not None and going.is_due)
        )
        if is_best or is_last or state.stop_reason is not None or is_due:
            worker.timed_save(job, state, is_best)
        elif evaluated:
            ray.train.report(report_metrics(state), checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
        if going is not None and going.is_due:
            log.write({"step": step, "event": going.told})
            if going.is_now and not is_last and state.stop_reason is None:
                wait_to_be_ended()

    pulse.enter(pulse.FLUSHING)
    return {
        "state": dataclasses.asdict(state),
        "resumed_from_step": resumed_from,
        "peak_memory_gib": worker.peak_memory_gib(),
        "overflowed_steps": worker.engine.overflowed_steps,
        "time_split": worker.times.shares(),
        "mfu": worker.peak and state.flops / (state.train_seconds * worker.peak * world_size),
        "attention": str(worker.engine.model.attention),
        "pairs_seen": order.pairs_before(state.step),
        "num_steps": order.num_steps,
    }


class Departure(NamedTuple):
    """A node that will be taken away."""

    is_due: bool
    """A checkpoint is due: this is the first notice, or the last moment."""
    is_now: bool
    """It is the last moment: steps after this one would be lost."""
    told: str


class PairSet:
    """Tokenised pairs with their reference log-probs, cut into micro-batches on demand."""

    def __init__(
        self, files: TokenFiles, reference: ReferenceStore | None, batch: BatchConfig, tails: bool = False
    ) -> None:
        self.pairs: TokenTable = files.open()
        self.reference = None if reference is None else ReferenceTable(reference, self.pairs, tails=tails)
        self._batch = batch

    def plan(self, numbers: Sequence[int], num_workers: int) -> tuple[list[TokenizedPair], list[list[MicroBatch]]]:
        """The pairs of a step, and `plan[m][rank]` over them."""
        pairs = [self.pairs[number] for number in numbers]
        plan = plan_step(
            [lengths_of(pair) for pair in pairs],
            num_workers=num_workers,
            tokens_per_device=self._batch.tokens_per_device,
            row_tokens=self._batch.row_tokens,
            layout=self._batch.layout,
        )
        return pairs, plan


class Worker:
    """The engine with a loss: forward passes over planned pairs, for training and for evaluation alike."""

    def __init__(
        self, engine: ZeroEngine, run: RunConfig, rank: int, world_size: int, lease: str | None = None
    ) -> None:
        self.engine, self.rank, self.world_size = engine, rank, world_size
        self.last_step: dict[str, float] = {}
        self.times = StepTimes(engine)
        is_gpu = engine.device.type == "cuda"
        self.peak = peak_rate(engine.device, DTYPES[run.engine.precision]) if is_gpu else None
        """Operations a second that the device can do; not asked of a CPU, which others use too."""
        self._run = run
        layout = usable_layout(engine, engine.model, run.batch.layout, run.engine.precision)
        self.batch = run.batch.model_copy(update={"layout": layout})
        self.loss = loss_function(**run.loss.model_dump())
        self._folder = Folder(run.folder)
        minutes = run.checkpoint.every_minutes
        self._watch = Watch(self._folder, rank, lease, None if minutes is None else minutes * 60)
        self.uploads, self._save_seconds = Uploads(), 0.0
        self._knows_departure, self._num_skipped = False, 0

    def step(
        self, pair_set: PairSet, numbers: Sequence[int], step: int, *, is_timed: bool = False
    ) -> tuple[dict[str, float], Notice]:
        """One optimizer step on the pairs `numbers`: the exact mean gradient over them.

        Returns:
            Reduced sums, and what rank 0 has seen come in from outside.

        Args:
            is_timed: Take this step's times apart into `times`; all ranks must agree.

        Raises:
            RunFailed: Loss or gradient is not finite, and the recipe says stop or too many steps were skipped; or
                another attempt has taken the run over. Nothing of this step is saved.
        """
        pulse.enter(f"forward and backward of step {step}")
        self.engine.train(True)
        self.times.begin(is_timed)
        sums = self._pass(pair_set, numbers, divide_by=len(numbers))
        pulse.enter(f"sums of step {step}")
        seen = float(self._watch.notices())
        sums.add({"notices": torch.tensor(seen, dtype=torch.float64, device=self.engine.device)})
        with self.times.of("communication"):
            reduced = sums.reduced()
        notices = Notice(int(reduced.pop("notices")))
        if Notice.FENCED in notices:
            raise RunFailed(f"another attempt holds the run {self._run.folder}: this one stops at step {step - 1}")
        is_loss_finite = math.isfinite(reduced["loss"])
        if not is_loss_finite and self._run.train.on_non_finite == "stop":
            self._record_bad("loss", pair_set, numbers, step)
        pulse.enter(f"optimizer step {step}")
        with self.times.of("optimizer"):
            told = self.engine.step(step)
        self.times.begin(False)
        is_taken = math.isfinite(told["grad_norm"])
        if is_loss_finite and (is_taken or self._run.engine.precision == "fp16"):  # fp16: its loss scaler's business
            self.last_step = told
            return reduced, notices
        self._record_bad("gradient" if is_loss_finite else "loss", pair_set, numbers, step)
        if is_taken:
            raise RunFailed(
                f"the loss of step {step} is not finite but its gradient is: the step was taken; {BAD_FILE}"
            )
        self._num_skipped += 1
        if self._num_skipped > self._run.train.max_skipped_steps:
            raise RunFailed(
                f"{self._num_skipped} steps were skipped, more than `train.max_skipped_steps`; their pairs are in "
                f"{self._run.folder}/{BAD_FILE}"
            )
        costs = {name: reduced[name] for name in ("tokens", "slots", "filled", "flops")}
        return dict.fromkeys(reduced, 0.0) | costs, notices

    def _record_bad(self, name: str, pair_set: PairSet, numbers: Sequence[int], step: int) -> None:
        """Write the pairs of a step whose numbers are not finite; with `stop`, raise."""
        if self.rank == 0:
            ids = [pair_set.pairs[number].pair_id for number in numbers]
            self._folder.append(BAD_FILE, json.dumps({"step": step, "not_finite": name, "pair_ids": ids}))
        if self._run.train.on_non_finite == "stop":
            raise RunFailed(f"the {name} of step {step} is not finite; its pairs are in {self._run.folder}/{BAD_FILE}")

    def timed_save(self, job: TrainJob, state: TrainState, is_best: bool) -> None:
        """`save`, once the upload before has ended, with a clock: what training waits for is the checkpoints' cost."""
        pulse.enter(f"checkpoint of step {state.step}")
        began = time.perf_counter()
        self.uploads.begin()
        save(self, job, state, is_best)
        self._watch.saved()
        self._save_seconds = time.perf_counter() - began
        state.checkpoint_seconds += self._save_seconds

    def ask_about_nodes(self) -> Departure | None:
        """Whether a node of this run will be taken away. Every rank must call it."""
        info = ray.train.get_preemption_info()
        if info is None:
            return None
        margin = LEAVE_MARGIN_S + 2 * (self._save_seconds + self.uploads.seconds)
        is_now: bool = ray.train.collective.broadcast_from_rank_zero(is_close(info.deadline_ms, margin))
        is_new, self._knows_departure = not self._knows_departure, True
        ranks = ", ".join(map(str, info.preempted_ranks))
        left = "" if info.deadline_ms is None else f" in {max(0.0, info.deadline_ms / 1000 - time.time()):.0f} s"
        told = f"the node of worker {ranks} will be taken away{left}: saved" + (", waiting" if is_now else "")
        return Departure(is_new or is_now, is_now, told)

    def evaluate(self, pair_set: PairSet) -> tuple[dict[str, float], dict[str, float]]:
        """Means over all pairs of a set with their intervals, and the margin of each pair by its id."""
        pulse.enter("evaluation")
        self.engine.train(False)
        margins: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            sums = self._pass(pair_set, range(len(pair_set.pairs)), divide_by=None, margins=margins).reduced()
        own = {pair_id: float(margin) for pair_id, margin in margins.items()}
        everyones = {pair_id: margin for part in _from_all_ranks([own]) for pair_id, margin in part.items()}
        return means_with_interval(sums), everyones

    def _pass(
        self,
        pair_set: PairSet,
        numbers: Sequence[int],
        divide_by: int | None,
        loss_of: Loss | None = None,
        margins: dict[str, torch.Tensor] | None = None,
    ) -> MetricSums:
        """Forward (and backward, where the loss is divided) over this rank's micro-batches.

        Args:
            margins: Takes chosen less rejected reward of this rank's pairs, by their ids.
        """
        loss_of = loss_of or self.loss
        with self.times.of("data"):
            pairs, plan = pair_set.plan(numbers, self.world_size)
        device, sums = self.engine.device, MetricSums()
        matched = None
        if "matched_gap" in loss_of.needs:
            matched = self._matched_gaps(pair_set, numbers, pairs, [ranks[self.rank] for ranks in plan])
        for m, ranks in enumerate(plan):
            mine = ranks[self.rank]
            batch, responses, policy = self._forward(pairs, mine, tails="tails" in loss_of.needs)
            reference = None
            if pair_set.reference is not None:
                reference = pair_set.reference.logps([numbers[i] for i in mine.items], device)
            terms = PairTerms(
                weight=torch.tensor([pairs[i].weight for i in mine.items], device=device),
                margin=torch.tensor([pairs[i].margin for i in mine.items], device=device),
                alignment=responses.alignment.view(-1, 2).sum(1).exp(),
                matched_gap=None if matched is None else matched[mine.items],
            )
            loss = loss_of(policy, reference, terms)
            weights = torch.full_like(policy.chosen.detach(), float(mine.counts))
            if divide_by is not None:
                with self.times.of("backward"):
                    self.engine.backward((loss.loss * weights).sum() / divide_by, is_last=m == len(plan) - 1)
            counted = float(mine.counts)
            flops = 0  # counted in training alone, and only where a peak is known
            if self.peak and divide_by is not None:
                flops = self.engine.model.flops(lengths_of(pairs[i]) for i in mine.items)
            sums.add(pair_sums(policy, reference, loss, weights))
            gaps = loss.margins
            if margins is not None and mine.counts and gaps is not None:
                margins |= {pairs[i].pair_id: gap for i, gap in zip(mine.items, gaps.cpu(), strict=True)}
            sums.add(
                {
                    "entropy": responses.entropy.sum() * counted,
                    "flops": torch.tensor(flops * counted, dtype=torch.float64, device=device),
                    "tokens": torch.tensor(batch.num_tokens * counted, dtype=torch.float64, device=device),
                    "slots": torch.tensor(float(batch.num_slots), dtype=torch.float64, device=device),
                    "filled": torch.tensor(batch.num_filled * counted, dtype=torch.float64, device=device),
                }
            )
        return sums

    def _forward(
        self, pairs: Sequence[TokenizedPair], mine: MicroBatch, *, tails: bool
    ) -> tuple[PairBatch, ResponseLogps, PairLogps]:
        """A micro-batch, what the policy says of its responses, and the same by pair."""
        with self.times.of("data"):
            batch = make_batch([pair.branches for pair in pairs], mine.rows, self.batch.layout)
        with self.times.of("forward"):
            responses = self.engine(batch)
        columns = [responses.logps, responses.num_tokens]
        if tails:
            index = batch.response_index.to(self.engine.device)
            columns.append(tail_sums(responses.token_logps, index, responses.num_tokens))
        return batch, responses, PairLogps(*(side for column in columns for side in (column[0::2], column[1::2])))

    @torch.no_grad()
    def _matched_gaps(
        self, pair_set: PairSet, numbers: Sequence[int], pairs: Sequence[TokenizedPair], mine: Sequence[MicroBatch]
    ) -> torch.Tensor:
        """`match_gaps` over all pairs of the pass: a forward pass of its own, since a rank needs all others' pairs."""
        assert pair_set.reference is not None
        gaps = torch.zeros(len(pairs), dtype=torch.float64, device=self.engine.device)
        for micro_batch in mine:
            policy = self._forward(pairs, micro_batch, tails=False)[2]
            if micro_batch.counts:
                gaps[micro_batch.items] = policy.gap
        torch.distributed.all_reduce(gaps)
        return match_gaps(gaps, pair_set.reference.logps(numbers, self.engine.device).gap)

    def self_check(self, pair_set: PairSet, numbers: Sequence[int], reference_is_start: bool) -> None:
        """Refuse to train when the policy, before step 1, does not give its stored reference log-probs.

        Whatever the recipe's loss, that of DPO must then be ln 2.

        Raises:
            RunFailed: Says by how much it differs.
        """
        lora = self._run.model.lora
        if pair_set.reference is None or not reference_is_start or (lora is not None and lora.dropout > 0):
            return
        self.engine.train(False)
        with torch.no_grad():
            reduced = self._pass(pair_set, numbers, divide_by=None, loss_of=loss_function("dpo", beta=0.1)).reduced()
        loss, margin = (reduced[name] / reduced["num_pairs"] for name in ("loss", "rewards/margins"))
        tolerance = 1e-4 if self._run.engine.precision == "fp32" else 5e-2
        if abs(loss - math.log(2)) > tolerance:
            raise RunFailed(
                f"self-check: policy and reference differ before step 1: DPO's loss is {loss:.6f}, not ln 2, "
                f"mean reward margin {margin:.4g} over {len(numbers)} pairs; "
                f"is {self._run.reference.store} of this model?"
            )

    def peak_memory_gib(self) -> float:
        """Largest peak over ranks: of the GPU's memory, or of the process on a CPU."""
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        value = torch.tensor(peak / 2**30, dtype=torch.float64, device=self.engine.device)
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return float(value)


class StepTimes:
    """Where the time of a step goes, seen on some steps: a GPU then waits at every boundary, and collectives do not
    overlap with computation, so the times of a parallel run add up to more than its steps take."""

    def __init__(self, engine: ZeroEngine) -> None:
        self._engine, self._is_on = engine, False
        self._seconds: dict[str, float] = {}
        self._before: dict[str, float] = {}
        self.waiting: list[float] = []
        """Of each step that was seen, the share of its time that it waited for data."""

    def begin(self, is_timed: bool) -> None:
        """From here on, until the next call, `of` counts or does not."""
        if is_timed != self._is_on:
            self._engine.measure_communication(is_timed)
            if not is_timed:
                spent = {part: seconds - self._before.get(part, 0.0) for part, seconds in self._seconds.items()}
                self.waiting.append(spent["data"] / sum(spent.values()))
            self._before = dict(self._seconds)
        self._is_on = is_timed

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count what happens inside to `part`, but ZeRO's collectives in it to `communication`."""
        if not self._is_on:
            yield
            return
        began, before = self._now(), self._engine.communication_seconds()
        yield
        elapsed = self._now() - began
        # Collectives that run side by side are counted each, so their sum may be more than the time they cover.
        communication = min(self._engine.communication_seconds() - before, elapsed)
        spent = {part: elapsed - communication}
        spent["communication"] = spent.get("communication", 0.0) + communication
        for name, seconds in spent.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def shares(self) -> dict[str, float]:
        """Part -> share of the time of the steps that were seen; empty if none was."""
        total = sum(self._seconds.values())
        return {name: round(seconds / total, 4) for name, seconds in self._seconds.items()}

    def _now(self) -> float:
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)
        return time.perf_counter()


class RunLog:
    """`metrics.jsonl` of the run folder; rank 0 writes it, the others write nothing.

    Args:
        step: Where the run starts from; lines after it are dropped, they will be written again.
    """

    def __init__(self, folder: str, rank: int, step: int) -> None:
        self._folder, self._writes = Folder(folder), rank == 0
        self._reached = step
        if self._writes and self._folder.exists(METRICS_FILE):
            lines = list(read_lines(self._folder.read(METRICS_FILE)))
            self._reached = max([step, *(line["step"] for line in lines)])
            kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= step]
            self._folder.write(METRICS_FILE, "".join(kept).encode())

    def started(self, step: int, world_size: int) -> None:
        """Record that the workers begin, and tell why if it is not for the first time."""
        if not self._writes:
            return
        cause = attempts.why_again(attempts.history(self._folder))
        attempts.record(self._folder, attempts.START, step=step, reached=self._reached, world_size=world_size)
        if cause is not None:
            again = f"went on from step {step} with {world_size} worker{'s' if world_size > 1 else ''}: {cause}"
            self.write({"step": step, "event": again})

    def write(self, line: dict[str, Any]) -> None:
        if self._writes:
            self._folder.append(METRICS_FILE, json.dumps(line))

    def write_anomalies(self, state: TrainState, num_steps: int, waiting: Sequence[float]) -> None:
        """Look for what is wrong at this step, and keep and write what was not told before."""
        known = {anomaly.name for anomaly in state.anomalies}
        lines, evaluations = state.train_lines, state.evaluations
        for new in find_anomalies(lines, evaluations, num_steps=num_steps, waiting=waiting, known=known):
            state.anomalies.append(new)
            told = {"name": new.name, "evidence": new.evidence, "advice": new.advice}
            self.write({"step": new.step, "anomaly": told})

    def write_margins(self, step: int, margins: dict[str, float]) -> None:
        """Keep the margin of every held-out pair, so that runs can be compared pair by pair."""
        if self._writes and margins:
            ordered = {pair_id: round(margins[pair_id], 7) for pair_id in sorted(margins)}
            self._folder.write_json(margins_file(step), ordered)


def margins_file(step: int) -> str:
    return f"held_out/step-{step:06d}.json"


def wait_to_be_ended() -> None:
    """Ray Train ends all workers when the node goes, at its deadline at the latest; returning would end the run."""
    pulse.enter(pulse.LEAVING)
    while True:
        time.sleep(1)


def restore(engine: ZeroEngine, run: RunConfig, rank: int, world_size: int) -> tuple[TrainState, list[str]]:
    """Continue from the newest checkpoint of this run whose files are all as they were written, on all ranks the same.

    Returns:
        Progress, and what is wrong with newer checkpoints.

    Raises:
        InputError: The run had checkpoints, and none is whole.
    """
    faults: list[str] = []
    had_any = False
    for found, stored in _from_rank_0(_stored_checkpoints(Folder(run.folder)) if rank == 0 else []):
        wrong = [found.fault]
        if found.manifest is not None:
            with stored.as_directory() as folder:
                files = list(found.manifest.files.items())
                wrong = _from_all_ranks(manifest.changed(Folder(folder), files[rank::world_size]))
                if not wrong:
                    return _load(engine, Path(folder), run.train.seed, rank, world_size), faults
        had_any |= found.was_whole
        faults.append(f"{found.name}: {', '.join(wrong)}")
    if had_any:
        raise checkpoint.none_is_whole(Folder(run.folder), faults)
    return TrainState(world_size=world_size), faults


def _load(engine: ZeroEngine, folder: Path, seed: int, rank: int, world_size: int) -> TrainState:
    state = checkpoint.load_state(folder)
    state.world_size = world_size
    engine.load(folder)
    checkpoint.load_rng(folder, rank, seed=seed, step=state.step)
    torch.distributed.barrier()  # remote storage removes the folder when the first rank leaves
    return state


def _stored_checkpoints(folder: Folder) -> list[tuple[checkpoint.Found, ray.train.Checkpoint]]:
    """Newest first, each with Ray's handle, which downloads once for all ranks of a node."""
    found = []
    for one in checkpoint.find(folder):
        filesystem, path = locate(f"{folder.path}/{checkpoint.CHECKPOINTS}/{one.name}")
        found.append((one, ray.train.Checkpoint(path, filesystem=filesystem)))
    return found


def _from_rank_0(value: Any) -> Any:
    """What rank 0 passes, on every rank."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _from_all_ranks(values: list[Any]) -> list[Any]:
    """All ranks' values, in the order of the ranks."""
    gathered: list[list[Any]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, values)
    return [value for part in gathered for value in part]


def save(worker: Worker, job: TrainJob, state: TrainState, is_best: bool) -> None:
    """Report a checkpoint: every rank its part and its manifest, rank 0 also progress and the Hugging Face model."""
    folder = Path(tempfile.mkdtemp())
    worker.engine.save(folder)
    weights = worker.engine.full_weights()
    checkpoint.save_rng(folder, worker.rank)
    if worker.rank == 0:
        source, model_folder = policy_source(job.run.model), folder / checkpoint.MODEL_FOLDER
        export(
            worker.engine.model,
            weights,
            load_tokenizer(source),
            model_folder,
            dtype=job.run.model.dtype,
        )
        copy_generation_settings(source, model_folder)
        (folder / checkpoint.STATE_FILE).write_text(state.to_json())
    manifest.seal(folder, worker.rank, worker.world_size, step=state.step, is_best=is_best)
    # Ray takes rank 0's name for the folder.
    name = checkpoint.free_name(Folder(job.run.folder), state.step) if worker.rank == 0 else None
    # Ray keeps the highest scores, and the last one: a new best outranks the bests before it, and all that are none.
    score = float(state.step) - (0.0 if is_best else 1e9)
    ray.train.report(
        report_metrics(state) | {"checkpoint_score": score, "is_best": is_best},
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_dir_name=name,
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=worker.uploads,
        delete_local_checkpoint_after_upload=True,
    )


def report_metrics(state: TrainState) -> dict[str, Any]:
    """What Ray (and a Tune trial) sees: the step, the last training line and the last evaluation."""
    metrics: dict[str, Any] = {"step": state.step}
    if state.train_lines:
        metrics |= state.train_lines[-1].metrics
    if state.evaluations:
        metrics |= held_out_names(state.evaluations[-1].metrics)
    return metrics
