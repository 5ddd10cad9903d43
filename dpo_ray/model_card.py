"""The model card: what a model is, what it was made from, what was measured, and what was not.

A card may be published with the model, so it holds no text of the data, no path of a disk and no password.
"""

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import yaml

from dpo_ray.checkpoint import MODEL_FOLDER
from dpo_ray.config import RunConfig, parse_run
from dpo_ray.data.sources import may_be_hub_name
from dpo_ray.evaluation_report import evaluation_sentences
from dpo_ray.metrics import METRICS
from dpo_ray.models import ModelSource, weights_fingerprint
from dpo_ray.page import percent, percent_with_interval, text, with_interval
from dpo_ray.recipe_diff import flat
from dpo_ray.run_record import EVALUATION_FILE, read_run
from dpo_ray.storage import Folder, is_uri, redacted

CARD_FILE = "README.md"

Tree = Mapping[str, Any]

_SETTINGS = r"loss|optim|model\.(dtype|lora)|data\.(max_tokens|over_long|chat)|batch\.pairs_per_step|engine\.precision"
_TRAINED = r"train\.(epochs|max_steps|seed)"
"""What decides the weights, of a recipe; the rest is about machines."""


def model_card(
    run: RunConfig,
    summary: Tree | None,
    data_report: Tree | None,
    evaluation: Tree | None = None,
    step: int | None = None,
) -> str:
    """The README of a model folder, with the front matter of the Hugging Face hub.

    Args:
        summary: `summary.json` of the run; metrics are told only where they are of this model.
        data_report: `data_report.json`.
        evaluation: `evaluation.json`, of this model.
        step: The checkpoint that the model is from; None: the best one, else the last.
    """
    told, data = summary or {}, data_report or {}
    step = step if step is not None else told.get("best_step") or told.get("steps")
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(run, step), sort_keys=False, allow_unicode=True)}---",
        f"# {run.name}",
        _what_it_is(run, told, data, step),
        f"## How to load it\n\n```python\n{_how_to_load(run)}\n```",
        "## Training data",
        _data(run, data),
        "## Recipe",
        _recipe(run),
        "## Held-out pairs",
        _metrics(told, step),
        "## Evaluation",
        _evaluation(evaluation or {}),
        "## Intended use and limits",
        _limits(told, data, evaluation or {}, step),
        "## Versions",
        _versions(told),
    ]
    return "\n\n".join(parts) + "\n"


def card_of(folder: Folder, run: RunConfig, model: Folder, summary: Tree | None, step: int) -> str:
    """The card of a model that was written from a run folder; an evaluation is told if it is of these very weights."""
    data = folder.read_json("data_report.json") if folder.exists("data_report.json") else None
    evaluation = folder.read_json(EVALUATION_FILE) if folder.exists(EVALUATION_FILE) else None
    return model_card(run, summary, data, _if_of(model, run, evaluation), step)


def write_model_card(run_dir: str) -> str:
    """Write the card of a run's `model/` again, with what has been found out since; the path of the card.

    Raises:
        InputError: It is not the folder of a finished run.
    """
    record = read_run(run_dir)
    run, model = parse_run(record.settings), Folder(run_dir) / MODEL_FOLDER
    step = step_of(model.read(CARD_FILE).decode()) if model.exists(CARD_FILE) else None
    evaluation = _if_of(model, run, record.evaluation)
    model.write(CARD_FILE, model_card(run, record.summary, record.data, evaluation, step).encode())
    return f"{model.path}/{CARD_FILE}"


def step_of(card: str) -> int | None:
    """The checkpoint that a card is of; None where it does not say."""
    front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        found: int | None = yaml.safe_load(front[1])["dpo_ray"]["step"] if front else None
    except (yaml.YAMLError, KeyError, TypeError):  # of another maker, or changed by hand
        return None
    return found


def _if_of(model: Folder, run: RunConfig, evaluation: Tree | None) -> Tree | None:
    if evaluation is None:
        return None
    found = weights_fingerprint(ModelSource(model.path, None, run.model.trust_remote_code))
    return evaluation if evaluation.get("model_fingerprint") == found else None


def _front_matter(run: RunConfig, step: int | None) -> dict[str, Any]:
    hub_names = [source.path for source in run.data.sources if may_be_hub_name(source.path)]
    found: dict[str, Any] = {"library_name": "peft" if run.model.lora else "transformers"}
    if may_be_hub_name(run.model.path):
        found |= {"base_model": run.model.path, "base_model_relation": "adapter" if run.model.lora else "finetune"}
    if hub_names:
        found["datasets"] = list(dict.fromkeys(hub_names))
    found |= {"pipeline_tag": "text-generation", "tags": [run.loss.kind, "dpo-ray"]}
    return found | {"dpo_ray": {"run": run.name, "step": step}}


def _what_it_is(run: RunConfig, summary: Tree, data: Tree, step: int | None) -> str:
    pairs = (data.get("train") or {}).get("pairs")
    kind = "pairs" if run.loss.kind == "sft" else "preference pairs"
    on = f"{pairs} {kind}" if pairs is not None else kind
    of = f" of {summary['steps']}" if summary.get("steps") is not None else ""
    beta = flat(run.loss.model_dump(mode="json")).get("beta")
    loss = f"`{run.loss.kind}`" + (f" (beta {text(beta)})" if beta is not None else "")
    what = "A LoRA adapter of" if run.model.lora else "A fine-tuned"
    return f"{what} {_code(_public(run.model.path))}, trained with {loss} on {on}; checkpoint of step {step}{of}."


def _how_to_load(run: RunConfig) -> str:
    module, kind = ("peft", "AutoPeftModelForCausalLM") if run.model.lora else ("transformers", "AutoModelForCausalLM")
    tokenizer = "from transformers import AutoTokenizer"
    imports = (
        f"{tokenizer}\nfrom {module} import {kind}"
        if run.model.lora
        else f"{tokenizer.replace('import', f'import {kind},')}"
    )
    return (
        f'{imports}\n\nfolder = "PATH"  # of this model\nmodel = {kind}.from_pretrained(folder)\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)"
    )


def _data(run: RunConfig, data: Tree) -> str:
    """Where the pairs come from and how many there are; nothing of what they say."""
    reports = data.get("sources") or [{"path": source.path} for source in run.data.sources]
    rows = [
        [_public(str(report["path"])), *(text(report.get(key)) for key in ("rows", "pairs", "held_out"))]
        for report in reports
    ]
    told = []
    for key, name in (("train", "trained on"), ("held_out", "held out")):
        if isinstance(side := data.get(key), Mapping):
            told.append(f"{text(side.get('pairs'))} pairs ({text(side.get('tokens'))} tokens) were {name}.")
    if data.get("fingerprint"):
        told.append(f"Fingerprint of the data, as encoded: `{data['fingerprint']}`.")
    return "\n\n".join(filter(None, [_table(["source", "rows", "pairs", "of them held out"], rows), " ".join(told)]))


def _recipe(run: RunConfig) -> str:
    settings = flat(run.model_dump(mode="json"))
    wanted = re.compile(rf"({_SETTINGS}|{_TRAINED})(\.|$)")
    return _table(["key", "value"], [[f"`{key}`", text(v)] for key, v in settings.items() if wanted.match(key)])


def _metrics(summary: Tree, step: int | None) -> str:
    found = metrics_at(summary, step)
    if not found:
        return "Not evaluated at this step."
    rows = [
        [
            name,
            with_interval(found[name], found.get(f"{name}_low"), found.get(f"{name}_high")),
            metric.unit,
            metric.meaning,
        ]
        for name, metric in METRICS.items()
        if name in found
    ]
    return f"{text(found.get('num_pairs'))} pairs, 95 % intervals.\n\n" + _table(
        ["metric", "value", "unit", "meaning"], rows
    )


def metrics_at(summary: Tree, step: int | None) -> Mapping[str, float]:
    """Held-out metrics of the model of a step: those of the best or of the last evaluation, if it was there."""
    found: Mapping[str, float] = {}
    if step is not None and step == summary.get("best_step"):
        found = summary.get("best_eval") or {}
    elif step is not None and step == summary.get("steps"):
        found = summary.get("eval") or {}
    return found


def _evaluation(evaluation: Tree) -> str:
    told = [f"- {_plain(sentence)}" for sentence in evaluation_sentences(evaluation)]
    if kl := evaluation.get("kl"):
        value = with_interval(kl.get("value"), kl.get("low"), kl.get("high"))
        told.append(f"- KL to the reference: {value} nats per response, from {kl.get('num_responses')} of its own.")
    return "\n".join(told) or "No win rate and no retention has been measured: `dpo-ray evaluate` does."


def _limits(summary: Tree, data: Tree, evaluation: Tree, step: int | None) -> str:
    """Plain facts that follow from the data and the metrics."""
    train = data.get("train") if isinstance(data.get("train"), Mapping) else {}
    assert isinstance(train, Mapping)
    told = ["It is meant for what its data is about. It prefers what that data prefers, right or wrong."]
    if train.get("pairs") is not None:
        told.append(f"It was trained on {train['pairs']} pairs; what these do not cover, it has not learnt from them.")
    metrics = metrics_at(summary, step)
    if (value := metrics.get("rewards/accuracies")) is not None:
        low, high = metrics.get("rewards/accuracies_low"), metrics.get("rewards/accuracies_high")
        share_right = percent_with_interval(value, low, high)
        told.append(
            f"On held-out pairs of the same kind its implicit reward is right in {share_right}"
            + ("; that is not distinguishable from guessing." if low is not None and low <= 0.5 else ".")
        )
    if not evaluation.get("win_rate"):
        told.append("Whether its responses are better than those of the model before training has not been measured.")
    if not evaluation.get("retention"):
        told.append("What it has forgotten has not been measured.")
    if (share := train.get("chosen_longer")) is not None and share > 0.5:
        told.append(
            f"The chosen response is the longer one in {percent(share)} of the training pairs; it may be wordy."
        )
    if data.get("contradictions"):
        told.append(f"{data['contradictions']} pairs of the data say the opposite of another one.")
    anomalies: Sequence[Tree] = summary.get("anomalies") or []
    told += [f"Seen in training, at step {one['step']}: {one['name'].replace('_', ' ')}." for one in anomalies]
    told += [
        "Safety, facts and bias have not been evaluated.",
        "The languages of the data have not been determined; no other language was trained.",
        "The licences of the base model and of the data hold; they have not been looked at.",
    ]
    return "\n".join(f"- {_plain(one)}" for one in told)


def _versions(summary: Tree) -> str:
    found = summary.get("versions") or {"dpo-ray": version("dpo-ray")}
    prints = {name: summary[name] for name in ("data_fingerprint", "reference_fingerprint") if summary.get(name)}
    versions = ", ".join(f"{name} {number}" for name, number in found.items())
    return "\n\n".join(
        [versions, *(f"{name.replace('_', ' ').capitalize()}: `{value}`" for name, value in prints.items())]
    )


def _public(path: str) -> str:
    """A path that may be published: hub names as they are, URIs without a password, of a local path its last part."""
    if is_uri(path) or may_be_hub_name(path):
        return redacted(path)
    return path.rstrip("/").rpartition("/")[2]


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([_plain(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(name: str) -> str:
    return f"`{_plain(name).replace('`', '')}`"


def _plain(content: str) -> str:
    """On one line, and no markup of HTML."""
    return " ".join(content.split()).replace("<", "&lt;")
