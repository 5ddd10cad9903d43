"""From a recipe to everything that training needs, on the driver: token files, held-out pairs, the plan.

Runs before any process group exists and without Ray, so `--dry-run` and every check of the user's input live here.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from dpo_ray.config import RECIPE_FILE, BatchConfig, RunConfig, parse_run
from dpo_ray.data.batching import StepOrder, lengths_of, plan_step
from dpo_ray.data.encode import PairEncoder, TokenFiles, TokenTable, encode_to_files
from dpo_ray.data.mixture import load_pool
from dpo_ray.device import device_memory
from dpo_ray.errors import InputError
from dpo_ray.losses import loss_function
from dpo_ray.memory import memory_estimate, model_shape, settings_that_fit
from dpo_ray.metrics import OBJECTIVES
from dpo_ray.models import ModelSource, end_token_ids, load_tokenizer, policy_source, read_config
from dpo_ray.pairs import PreferencePair, TokenizedPair
from dpo_ray.stopping import check_metric
from dpo_ray.storage import Folder, absolute


class Prepared(NamedTuple):
    """Encoded pairs of a run and what is known about them."""

    train: TokenFiles
    held_out: TokenFiles
    report: dict[str, Any]
    """`data_report.json`."""
    train_pairs: TokenTable
    held_out_pairs: TokenTable


def resolve(run: RunConfig) -> RunConfig:
    """The recipe with local paths made absolute, so that it means the same on every node and in a later command."""

    def existing(path: str) -> str:
        """Hub names stay; what is there on this disk becomes absolute."""
        return absolute(path) if path.startswith(("~", ".")) or Folder(path).exists() else path

    def sources(listed: Any) -> tuple[Any, ...]:
        return tuple(source.model_copy(update={"path": existing(source.path)}) for source in listed)

    storage = run.storage.model_copy(update={"path": absolute(run.storage.path)})
    store = run.reference.store or f"{storage.path}/.reference"
    reference_path = None if run.reference.path is None else existing(run.reference.path)
    reference = run.reference.model_copy(update={"path": reference_path, "store": absolute(store)})
    held_out = run.data.eval.model_copy(update={"sources": sources(run.data.eval.sources)})
    data = run.data.model_copy(update={"sources": sources(run.data.sources), "eval": held_out})
    model = run.model.model_copy(update={"path": existing(run.model.path)})
    retention = run.evaluate.retention.model_copy(update={"sources": sources(run.evaluate.retention.sources)})
    evaluate = run.evaluate.model_copy(update={"prompts": sources(run.evaluate.prompts), "retention": retention})
    parts = {"storage": storage, "reference": reference, "data": data, "model": model, "evaluate": evaluate}
    return run.model_copy(update=parts)


def is_run(path: str) -> bool:
    """Whether a folder, local or remote, is that of a run."""
    return Folder(path).exists(RECIPE_FILE)


def recipe_of(run_dir: str, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The recipe that a run folder was written with.

    Raises:
        InputError: It is no run folder, or would have code run that the overrides do not allow: who wrote a folder does
            not decide that.
    """
    if not is_run(run_dir):
        raise InputError(f"{run_dir} is not a run folder: it has no {RECIPE_FILE}")
    run = parse_run(yaml.safe_load(Folder(run_dir).read(RECIPE_FILE)), overrides)
    if run.model.trust_remote_code and "model.trust_remote_code" not in (overrides or {}):
        raise InputError(
            f"the recipe in {run_dir} would run Python code that comes with its model; if you have read it, say so "
            "(evaluate: model.trust_remote_code=true; export: --trust-remote-code; serve: --set trust_remote_code=true)"
        )
    return run


def registered(path: str) -> str:
    """The folder of `models:/NAME@ALIAS` or `models:/NAME/VERSION`; any other path as it is."""
    if not path.startswith("models:/"):
        return path
    from dpo_ray.tracking import registered_model  # MLflow takes seconds to load

    return registered_model(path)


def model_of(path: str, trust_remote_code: bool = False) -> ModelSource:
    """The model that a run wrote, where the path is a run folder, or a registered one, or the one there or on the hub.

    Raises:
        InputError: `models:/NAME@ALIAS` is not in the registry.
    """
    path = registered(path)
    return ModelSource(f"{path}/model" if is_run(path) else path, None, trust_remote_code)


def reference_source(run: RunConfig) -> ModelSource | None:
    """The frozen model of the loss: the named one, or the policy before training; None where the loss has none."""
    if "reference" not in loss_function(**run.loss.model_dump()).needs:
        return None
    if run.reference.path is None:
        return policy_source(run.model)
    return ModelSource(run.reference.path, run.reference.revision, run.model.trust_remote_code)


def check_recipe(run: RunConfig) -> None:
    """What can be known to be wrong before the data is read.

    Raises:
        InputError: Names the key.
    """
    if run.early_stopping is not None:
        missing = {"kl"} if reference_source(run) is None else set()
        if run.loss.kind == "sft":
            missing |= {name for name in OBJECTIVES if name.startswith("rewards/")}
        check_metric(run.early_stopping.metric, [name for name in OBJECTIVES if name not in missing])
    context = getattr(read_config(policy_source(run.model)), "max_position_embeddings", None)
    if context is not None and run.data.max_tokens > context:
        raise InputError(
            f"`data.max_tokens`={run.data.max_tokens} is more than the {context} positions of {run.model.path}"
        )


def prepare(run: RunConfig) -> Prepared:
    """Read, check, split and encode the pairs of a resolved recipe.

    Raises:
        InputError: Bad input, named by key, or file and row; or no pair is left.
    """
    policy = policy_source(run.model)
    encoder = PairEncoder(load_tokenizer(policy), run.data, end_token_ids(policy))
    pool = load_pool(run.data, is_usable=lambda pair: bool(encoder.encode([pair]).pairs))
    check_columns(run, [*pool.train, *pool.held_out])
    cache = Folder(run.storage.path) / ".tokens"
    train, encoded = encode_to_files(pool.train, encoder, cache, run.data.num_pairs)
    held_out, encoded_held_out = encode_to_files(pool.held_out, encoder, cache)
    if train.num_pairs == 0:
        reasons = ", ".join(f"{reason} {count}" for reason, count in encoded["dropped"].items())
        raise InputError(
            f"none of {len(pool.train)} training pairs can be used: {reasons}"
            + (f"; `data.max_tokens` is {run.data.max_tokens}" if "over_long" in reasons else "")
        )
    train_pairs, held_out_pairs = train.open(), held_out.open()
    check_budget(run.batch, train_pairs)
    check_budget(run.batch, held_out_pairs)
    report = {
        **pool.report,
        "train": {"pairs": train.num_pairs, **encoded, **token_report(train_pairs)},
        "held_out": {"pairs": held_out.num_pairs, **encoded_held_out, **token_report(held_out_pairs)},
        "fingerprint": data_fingerprint(train, held_out),
    }
    return Prepared(train, held_out, report, train_pairs, held_out_pairs)


class HeldOutPairs(NamedTuple):
    """Pairs to evaluate on, as text and as ids in the same order."""

    pairs: list[PreferencePair]
    table: TokenTable
    fingerprint: str
    """Hash of the pairs as ids."""


def held_out_of(run: RunConfig, all_pairs: bool = False) -> HeldOutPairs:
    """The held-out pairs of a resolved recipe that can be encoded; or all its pairs, none held out.

    Raises:
        InputError: As `prepare`.
    """
    policy = policy_source(run.model)
    encoder = PairEncoder(load_tokenizer(policy), run.data, end_token_ids(policy))
    pool = load_pool(run.data, is_usable=lambda pair: bool(encoder.encode([pair]).pairs))
    pairs = [pair for pair in (pool.train if all_pairs else pool.held_out) if encoder.encode([pair]).pairs]
    pairs = pairs[: run.data.num_pairs] if all_pairs else pairs
    check_columns(run, pairs)
    files, _ = encode_to_files(pairs, encoder, Folder(run.storage.path) / ".tokens")
    table = files.open()
    check_budget(run.batch, table)
    content = repr((files.parts, files.num_pairs)).encode()
    return HeldOutPairs(pairs, table, hashlib.blake2b(content, digest_size=16).hexdigest())


def check_columns(run: RunConfig, pairs: Sequence[PreferencePair]) -> None:
    """Weights and margins that the loss reads must be there.

    Raises:
        InputError: Names the first pair without.
    """
    needs = loss_function(**run.loss.model_dump()).needs
    for column, key in (("weight", "data_weights"), ("margin", "margin_weight")):
        missing = next((pair for pair in pairs if getattr(pair, column) is None), None)
        if column in needs and missing is not None:
            wanted = "`weight`" if column == "weight" else "`margin`, and no scores"
            raise InputError(f"`loss.{key}`: {missing.place} has no {wanted} that is a number of at least 0")


def data_fingerprint(train: TokenFiles, held_out: TokenFiles) -> str:
    """Hash of what is trained and evaluated on: contents, encoding, order, counts."""
    content = repr((train.parts, train.num_pairs, held_out.parts, held_out.num_pairs))
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def token_report(table: TokenTable) -> dict[str, Any]:
    """Token counts of encoded pairs."""
    lengths = [(len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)) for p in table]
    if not lengths:
        return {"tokens": 0}
    totals = sorted(sum(item) for item in lengths)
    return {
        "tokens": sum(totals),
        "prompt_tokens": sum(item[0] for item in lengths),
        "response_tokens": sum(item[1] + item[2] for item in lengths),
        "pair_tokens": {"median": totals[len(totals) // 2], "p95": totals[int(len(totals) * 0.95)], "max": totals[-1]},
        "chosen_longer": sum(c > r for _, c, r in lengths) / len(lengths),
    }


def check_budget(batch: BatchConfig, table: TokenTable) -> None:
    """Every pair must fit a device by itself.

    Raises:
        InputError: Names the largest pair.
    """

    def places(pair: TokenizedPair) -> int:
        lengths = lengths_of(pair)
        return lengths.branched if batch.layout == "branches" else 2 * lengths.padded

    largest = max(table, key=places, default=None)
    if largest is not None and places(largest) > batch.tokens_per_device:
        raise InputError(
            f"`batch.tokens_per_device`={batch.tokens_per_device} is less than the {places(largest)} tokens of pair "
            f"{largest.pair_id} in the {batch.layout} layout; raise it, or lower `data.max_tokens`"
        )


def describe_plan(run: RunConfig, prepared: Prepared, device_gib: float | None = None) -> dict[str, Any]:
    """What a run would do: pairs, steps, tokens, passes of the first step, memory.

    Args:
        device_gib: Memory of the device that a worker will have; None: as on this machine.
    """
    order = step_order(run, prepared.train.num_pairs)
    first = [prepared.train_pairs[number] for number in order.pairs_of(1)]
    plan = plan_step(
        [lengths_of(pair) for pair in first],
        num_workers=run.cluster.num_workers,
        tokens_per_device=run.batch.tokens_per_device,
        row_tokens=run.batch.row_tokens,
        layout=run.batch.layout,
    )
    return {
        "train_pairs": prepared.train.num_pairs,
        "held_out_pairs": prepared.held_out.num_pairs,
        "steps": order.num_steps,
        "epochs": order.epoch_at(order.num_steps),
        "pairs_per_step": run.batch.pairs_per_step,
        "workers": run.cluster.num_workers,
        "forward_passes_per_step": len(plan),
        **token_report(prepared.train_pairs),
        "memory": _memory(run, device_gib),
    }


def _memory(run: RunConfig, device_gib: float | None) -> dict[str, Any]:
    """The estimate, the device's, and what would make it fit where it does not."""
    shape = model_shape(run)
    found, name = device_memory(run.cluster.num_workers) if device_gib is None else (device_gib, "given")
    estimate = memory_estimate(run, shape)
    told = {**estimate, "device_gib": round(found, 3), "device": name, "fits": estimate["gib_per_worker"] <= found}
    if told["fits"]:
        return told
    settings = settings_that_fit(run, shape, found)
    return told | {
        "would_fit_with": "none of the settings here: more workers, or a smaller model"
        if settings is None
        else settings
    }


def step_order(run: RunConfig, num_pairs: int) -> StepOrder:
    """The pairs of every step of a run."""
    return StepOrder(
        num_pairs,
        run.batch.pairs_per_step,
        seed=run.train.seed,
        epochs=run.train.epochs,
        max_steps=run.train.max_steps,
    )


RESUMABLE = ("storage", "eval", "evaluate", "early_stopping", "checkpoint", "cluster", "tracking")
"""Sections that a resumed run may change; the others decide its numbers."""

RESUMABLE_KEYS = (
    "train.epochs",
    "train.max_steps",
    "train.log_every_steps",
    "train.on_non_finite",
    "train.max_skipped_steps",
    "batch.tokens_per_device",
    "batch.row_tokens",
    "engine.zero_stage",
    "engine.offload_optimizer",
    "engine.activation_checkpointing",
    "reference.store",
)


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume with a recipe that would make it another run.

    Args:
        before, now: Resolved recipes as trees.

    Raises:
        InputError: Names the first key that differs.
    """
    for section in now:
        if section in RESUMABLE:
            continue
        old, new = before.get(section), now[section]
        if not isinstance(new, Mapping) or not isinstance(old, Mapping):
            if old != new:
                raise InputError(f"cannot resume: `{section}` was {old!r} and is now {new!r}")
            continue
        for key in new:
            if f"{section}.{key}" not in RESUMABLE_KEYS and old.get(key) != new[key]:
                raise InputError(f"cannot resume: `{section}.{key}` was {old.get(key)!r} and is now {new[key]!r}")
