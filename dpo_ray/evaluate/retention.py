"""What a model must not forget: its perplexity on general text, before and after, paired over texts.

Tasks of lm-evaluation-harness are in `harness`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_ray.config import RunConfig, SourceConfig
from dpo_ray.data.sources import read_rows
from dpo_ray.errors import InputError, RunFailed
from dpo_ray.evaluate.win_rates import bootstrap
from dpo_ray.models import ModelSource, load_tokenizer, read_config
from dpo_ray.pairs import Ids, content_hash
from dpo_ray.reference import View, response_key, score_responses, store_of


def perplexities(
    run: RunConfig,
    before: ModelSource,
    after: ModelSource,
    gpus_per_actor: float,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Perplexity of each source of `evaluate.retention` under two models with one tokenizer, and the change.

    The change is that of the mean negative log-likelihood of a token, in nats; its interval is bootstrapped over texts,
    each read by both models. Values are kept in the log-prob store, as those of pairs.

    Raises:
        InputError: A source has no usable text.
    """
    texts = {source.path: _texts(source, run, after) for source in run.evaluate.retention.sources}
    views = [View(model, store_of(run, model)) for model in (before, after)]
    everything = [text for of_source in texts.values() for text in of_source]
    _, errors = score_responses(everything, views, run, gpus_per_actor, on_progress)
    if errors:
        raise RunFailed(f"{len(errors)} texts have no log-prob; the first: {next(iter(errors.values()))}")
    keys = [response_key(*text) for text in everything]
    known = [view.store.read(keys) for view in views]
    return [
        {"source": path, **_change([_Text(_loss(known[0], t), _loss(known[1], t), len(t[1])) for t in own], run)}
        for path, own in texts.items()
    ]


class _Text(NamedTuple):
    """Negative log-likelihoods of a text, nats, and its tokens."""

    before: float
    after: float
    num_tokens: int


def _loss(known: dict[bytes, Any], text: tuple[Ids, Ids]) -> float:
    return -float(known[response_key(*text)].logps)


def _change(texts: Sequence[_Text], run: RunConfig) -> dict[str, Any]:
    rows = np.array(texts)  # [K, 3]

    def per_token(drawn: Any) -> float:
        return float((drawn[:, 1].sum() - drawn[:, 0].sum()) / drawn[:, 2].sum())

    change, low, high = bootstrap(rows, per_token, seed=run.evaluate.seed)
    before, after, num_tokens = rows.sum(0)
    return {
        "num_texts": len(texts),
        "num_tokens": int(num_tokens),
        "before": math.exp(before / num_tokens),
        "after": math.exp(after / num_tokens),
        "change": change,
        "low": low,
        "high": high,
    }


def _texts(source: SourceConfig, run: RunConfig, model: ModelSource) -> list[tuple[Ids, Ids]]:
    """The texts of a source as a first token and what follows: the tokenizer's BOS is the first where it has one."""
    settings, tokenizer = run.evaluate.retention, load_tokenizer(model)
    positions = getattr(read_config(model), "max_position_embeddings", None) or settings.max_tokens
    longest = min(settings.max_tokens, positions, run.batch.tokens_per_device)
    found: dict[str, str] = {}
    for row in read_rows(source):
        text = (row.value or {}).get("text")
        if not isinstance(text, str):
            raise InputError(f"{row.source}:{row.number}: {row.error or 'no `text`; `columns: {text: NAME}` renames'}")
        if text.strip():
            found[content_hash(text)] = text
    order = sorted(found)[: source.num_pairs or settings.num_texts]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded = (bos + tokenizer(found[name], add_special_tokens=False, verbose=False)["input_ids"] for name in order)
    texts = [(np.array(ids[:1], np.int32), np.array(ids[1:longest], np.int32)) for ids in encoded if len(ids) > 1]
    if len(texts) < 2:
        raise InputError(f"{source.path} has {len(texts)} usable texts for `evaluate.retention`; at least 2 are needed")
    return texts
