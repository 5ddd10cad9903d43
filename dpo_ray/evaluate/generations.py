"""What models write to the prompts of an evaluation, and how far that takes a model from its reference.

Answers are kept beside the log-prob store, by model, prompt and seed, so a second evaluation writes only what is new.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dpo_ray.acquisition.pool import OpenPrompt, open_prompts
from dpo_ray.acquisition.samples import stored_responses
from dpo_ray.config import RunConfig
from dpo_ray.data.encode import PairEncoder
from dpo_ray.errors import InputError, RunFailed
from dpo_ray.evaluate.win_rates import bootstrap
from dpo_ray.generate import Sampling
from dpo_ray.models import ModelSource, end_token_ids, load_tokenizer
from dpo_ray.pairs import Ids, PreferencePair, content_hash
from dpo_ray.reference import View, response_key, score_responses, store_of

Progress = Callable[[str, int, int], None]

MAX_MODELS = 1024
"""Of a comparison; each draws with seeds of its own."""


class Written(NamedTuple):
    """An answer of a model."""

    text: str
    prompt_ids: Ids
    ids: Ids
    is_finished: bool
    """It ended by an end token, not by its length."""


def read_prompts(run: RunConfig, held_out: Sequence[PreferencePair]) -> list[OpenPrompt]:
    """The prompts of `evaluate.prompts`, or else those of the held-out pairs: each once, and the first so many by
    content, so that fewer prompts are among the more.

    Raises:
        InputError: A source cannot be read, or has a row without a prompt.
    """
    settings = run.evaluate
    found = (
        (prompt for source in settings.prompts for prompt in open_prompts(source, run.data.on_bad_row))
        if settings.prompts
        else map(OpenPrompt.of, held_out)
    )
    distinct = {prompt.prompt_id: prompt for prompt in found}
    order = sorted(distinct, key=lambda name: content_hash(settings.seed, name))
    return [distinct[name] for name in order[: settings.num_prompts]]


class Writer:
    """Asks models for answers on the cluster."""

    def __init__(self, run: RunConfig, gpus_per_actor: float, on_progress: Progress) -> None:
        """
        Args:
            run: A resolved recipe.
        """
        self._run, self._gpus, self._on_progress = run, gpus_per_actor, on_progress

    def write(
        self, model: ModelSource, prompts: Sequence[OpenPrompt], sampling: Sampling, num_responses: int, place: int = 0
    ) -> list[list[Written]]:
        """Answers to each prompt; none to one that the model cannot take.

        Args:
            place: The model's in the comparison. Those of different places draw independently, as a win rate is
                defined; with the same random numbers two models' answers are alike, and the better one wins more.

        Raises:
            InputError: There is no such model.
            RunFailed: No prompt could be answered.
        """
        encoder = PairEncoder(load_tokenizer(model), self._run.data, end_token_ids(model))
        ids = [encoder.prompt_ids(prompt.candidate("a", "b").labelled(is_first=True)) for prompt in prompts]
        found = stored_responses(
            ids,
            model,
            self._run,
            (sampling, num_responses, self._run.evaluate.seed * MAX_MODELS + place),
            self._run.evaluate.write.engine,
            self._gpus,
            lambda done, total: self._on_progress(f"answers of {model.path}", done, total),
        )
        if found and all(item.error is not None for item in found):
            raise RunFailed(f"{model.path} answers no prompt; the first: {found[0].error}")
        return [
            [
                Written(
                    encoder.response_text(prompt_ids, response.ids, is_plain=isinstance(prompt.prompt, str)),
                    prompt_ids,
                    response.ids,
                    response.is_finished,
                )
                for response in item.responses
            ]
            for prompt, prompt_ids, item in zip(prompts, ids, found, strict=True)
        ]

    def converse(
        self, model: ModelSource, conversations: Sequence[Sequence[str]], sampling: Sampling
    ) -> list[list[str]]:
        """Answers to all user turns of conversations, each behind those before; an unanswered turn ends in ''."""
        said: list[list[str]] = [[] for _ in conversations]
        for number in range(max(map(len, conversations), default=0)):
            rows = [i for i, turns in enumerate(conversations) if len(turns) > number]
            prompts = [_dialogue(conversations[i][: number + 1], said[i]) for i in rows]
            for i, answers in zip(rows, self.write(model, prompts, sampling, 1), strict=True):
                said[i].append(answers[0].text if answers else "")
        return said

    def kl(self, model: ModelSource, reference: ModelSource, prompts: Sequence[OpenPrompt]) -> dict[str, float]:
        """KL(model || reference) of whole responses, from the model's own samples at temperature 1: the mean of
        log p_model - log p_reference, which has no bias (Schulman 2020, "Approximating KL divergence", k1).

        Returns:
            `value` with `low` and `high`, nats per response; `per_token`, nats; `num_responses`.
        """
        written = self.write(model, prompts, Sampling(self._run.evaluate.write.max_tokens), 1)
        drawn = [(answer.prompt_ids, answer.ids) for answers in written for answer in answers if len(answer.ids)]
        views = [View(source, store_of(self._run, source)) for source in (model, reference)]
        _, errors = score_responses(
            drawn, views, self._run, self._gpus, lambda done, total: self._on_progress("log-probs", done, total)
        )
        if errors:
            raise RunFailed(f"{len(errors)} answers have no log-prob; the first: {next(iter(errors.values()))}")
        keys = [response_key(*item) for item in drawn]
        logps = [np.array([known[key].logps for key in keys]) for known in (view.store.read(keys) for view in views)]
        ratios = logps[0] - logps[1]
        if len(ratios) < 2:
            raise InputError("`evaluate.num_prompts`: a KL needs at least 2 prompts")
        value, low, high = bootstrap(ratios, lambda rows: float(rows.mean()), seed=self._run.evaluate.seed)
        per_token = float(ratios.sum()) / sum(len(ids) for _, ids in drawn)
        return {"value": value, "low": low, "high": high, "per_token": per_token, "num_responses": len(ratios)}


def _dialogue(asked: Sequence[str], said: Sequence[str]) -> OpenPrompt:
    """A conversation that waits for its next answer; plain text for a model without a chat template."""
    turns = []
    for number, text in enumerate(asked):
        turns.append({"role": "user", "content": text})
        if number < len(said):
            turns.append({"role": "assistant", "content": said[number]})
    return OpenPrompt(tuple(turns), None, True, "conversation", 0)
