"""The pico task: a first-order grammar, a model of it that trains in seconds, and a true reward that is known exactly.

A miniature of the controlled experiment of the DPO paper (arXiv:2305.18290, section 6), small enough for many seeds.
The model is the same for all seeds; a seed draws the reward, the prompts, the pairs and the flipped labels. `train`
puts pairs through the package's own pieces (data, reference store, planner, loss, ZeRO engine): one worker, no Ray.

N is the number of texts. Tokens of the grammar are numbered 0 to 63: eight topics, then eight classes of seven words.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.common import recipe, score_missing, start_ours
from dpo_ray.metrics import means
from dpo_ray.stopping import Evaluation

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

NUM_TOPICS = NUM_CLASSES = 8
WORDS_PER_CLASS = 7
NUM_TOKENS = NUM_TOPICS + NUM_CLASSES * WORDS_PER_CLASS
PROMPT_LENGTH = 4
"""The topic and three words."""
RESPONSE_LENGTH = 12
CONCENTRATIONS = np.geomspace(0.15, 5.0, NUM_TOPICS)
"""Of the Dirichlet that a topic's transitions are drawn from: prompts differ in how much they leave open."""

TOKENS = [f"topic{t}" for t in range(NUM_TOPICS)] + [
    f"{name}{i}" for name in "abcdefgh"[:NUM_CLASSES] for i in range(WORDS_PER_CLASS)
]
END, UNKNOWN = "<end>", "<unk>"

BASE_STEPS, BASE_BATCH, BASE_RATE = 800, 128, 3e-3
NUM_REFERENCE = 2048
"""Samples of the reference by which a reward is standardised."""

Sampler = Callable[[IntArray], IntArray]
"""Prompts [N, 4] -> responses [N, 12]."""


class Grammar:
    """Topic, then classes by a chain that the topic chooses, then a word of each class by Zipf's law."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.transitions = np.stack(
            [rng.dirichlet(np.full(NUM_CLASSES, c), size=NUM_CLASSES) for c in CONCENTRATIONS]
        )  # [topic, class, next class]
        zipf = 1 / np.arange(1, WORDS_PER_CLASS + 1)
        self.words = zipf / zipf.sum()

    def texts(self, topics: IntArray, rng: np.random.Generator) -> IntArray:
        """A prompt and a response for each topic, [N, 16]."""
        count, length = len(topics), PROMPT_LENGTH + RESPONSE_LENGTH
        tokens = np.empty((count, length), np.int64)
        tokens[:, 0] = topics
        classes = rng.integers(NUM_CLASSES, size=count)
        for place in range(1, length):
            if place > 1:
                rising = self.transitions[topics, classes].cumsum(axis=1)
                classes = (rng.random((count, 1)) < rising).argmax(axis=1)
            words = rng.choice(WORDS_PER_CLASS, size=count, p=self.words)
            tokens[:, place] = NUM_TOPICS + classes * WORDS_PER_CLASS + words
        return tokens

    def prompts(self, topics: Sequence[int], count: int, rng: np.random.Generator) -> IntArray:
        """Of these topics, equally often in the mean, [N, 4]."""
        return self.texts(rng.choice(np.array(topics), size=count), rng)[:, :PROMPT_LENGTH]


class Reward(NamedTuple):
    """The truth: a sum over the tokens of a response, in standard deviations over the reference's responses."""

    weights: FloatArray  # [topic, token]
    mean: float
    deviation: float

    def __call__(self, prompts: IntArray, responses: IntArray) -> FloatArray:
        """[N]"""
        values: FloatArray = (self._raw(prompts, responses) - self.mean) / self.deviation
        return values

    def _raw(self, prompts: IntArray, responses: IntArray) -> FloatArray:
        raw: FloatArray = self.weights[prompts[:, :1], responses].sum(axis=1)
        return raw

    def standardised(self, prompts: IntArray, responses: IntArray) -> "Reward":
        """The same reward with mean 0 and standard deviation 1 over these responses."""
        raw = self._raw(prompts, responses)
        return self._replace(mean=float(raw.mean()), deviation=float(raw.std()))


def draw_reward(rng: np.random.Generator, *, contextual: bool) -> Reward:
    """A reward that is not standardised yet: one worth of each token, and for each topic another one if contextual."""
    weights = np.tile(rng.standard_normal(NUM_TOKENS), (NUM_TOPICS, 1))
    if contextual:
        weights = weights + rng.standard_normal((NUM_TOPICS, NUM_TOKENS))
    return Reward(weights, 0.0, 1.0)


class Labelled(NamedTuple):
    """Pairs of responses to prompts, as arrays."""

    prompts: IntArray  # [N, 4]
    chosen: IntArray  # [N, 12]
    rejected: IntArray  # [N, 12]

    def rows(self) -> Iterator[dict[str, str]]:
        """As the pipeline reads them."""
        for prompt, chosen, rejected in zip(*self, strict=True):
            yield {"prompt": text(prompt), "chosen": " " + text(chosen), "rejected": " " + text(rejected)}

    def write(self, path: Path) -> Path:
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows()))
        return path


def label(
    reward: Reward,
    prompts: IntArray,
    first: IntArray,
    second: IntArray,
    rng: np.random.Generator,
    *,
    noise: float,
) -> Labelled:
    """Prefer the response of the higher true reward, and the other one with probability `noise`."""
    is_first = (reward(prompts, first) > reward(prompts, second)) ^ (rng.random(len(prompts)) < noise)
    return Labelled(prompts, np.where(is_first[:, None], first, second), np.where(is_first[:, None], second, first))


def quiet() -> None:
    """One thread, so that CPU seconds are comparable, and no progress bars."""
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def text(tokens: IntArray) -> str:
    return " ".join(TOKENS[token] for token in tokens)


class Task:
    """What a seed draws: a reward, test prompts and base text to measure on, and pairs by demand.

    Args:
        base: Folder of the model, from `make_base`.
    """

    def __init__(self, base: Path, seed: int, *, contextual: bool, num_test: int = 512) -> None:
        self.base, self.seed, self.grammar = base, seed, Grammar()
        self._rng = np.random.default_rng([1, seed])
        self.reference = load_base(base)
        topics = range(NUM_TOPICS)
        prompts = self.grammar.prompts(topics, NUM_REFERENCE, self._rng)
        reward = draw_reward(self._rng, contextual=contextual)
        self.reward = reward.standardised(prompts, self.sample(prompts))
        self.test_prompts = self.grammar.prompts(topics, num_test, self._rng)
        self._rivals = self.reward(self.test_prompts, self.sample(self.test_prompts))
        self._base_text = self.grammar.texts(self._rng.integers(NUM_TOPICS, size=num_test), self._rng)
        self._base_nll = text_nll(self.reference, self._base_text)

    def sample(self, prompts: IntArray) -> IntArray:
        """Responses of the reference."""
        return sample(self.reference, prompts, seed=int(self._rng.integers(2**31))).responses

    def pairs(self, count: int, *, noise: float, topics: Sequence[int] = range(NUM_TOPICS)) -> Labelled:
        """Two samples of the reference behind each prompt, labelled."""
        prompts = self.grammar.prompts(topics, count, self._rng)
        return label(self.reward, prompts, self.sample(prompts), self.sample(prompts), self._rng, noise=noise)

    def measure(self, policy: Any) -> dict[str, float]:
        """What only a known task tells of a policy, over its own samples at temperature 1; the same prompts and
        random numbers at every call.

        `true_reward` is in standard deviations of the reference's samples, `win_rate` is against such a sample for the
        same prompt, `sequence_kl` is KL(policy || reference) of a response, and `forgetting` is by how much the
        log-loss on held-out text of the grammar has risen, both in nats.
        """
        sampled = sample(policy, self.test_prompts, seed=self.seed)
        rewards = self.reward(self.test_prompts, sampled.responses)
        texts = np.concatenate([self.test_prompts, sampled.responses], axis=1)
        with torch.no_grad():
            kept = token_distribution(self.reference, texts)
        kl = (sampled.log_probs.exp() * (sampled.log_probs - kept)).sum(-1)  # [N, 12], exact at each token
        return {
            "true_reward": float(rewards.mean()),
            "win_rate": float((np.sign(rewards - self._rivals) + 1).mean() / 2),
            "sequence_kl": float(kl.sum(1).mean()),
            "forgetting": text_nll(policy, self._base_text) - self._base_nll,
        }


class Sampled(NamedTuple):
    """Responses, and the distribution that each of their tokens was drawn from."""

    responses: IntArray  # [N, 12]
    log_probs: torch.Tensor  # [N, 12, 64]


@torch.no_grad()
def sample(model: Any, prompts: IntArray, *, seed: int, temperature: float = 1.0) -> Sampled:
    """Responses; the end token is not drawn, since all responses are equally long."""
    generator = torch.Generator().manual_seed(seed)
    ids, cache = torch.from_numpy(prompts), None
    drawn, log_probs = [], []
    for _ in range(RESPONSE_LENGTH):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        log_probs.append((out.logits[:, -1, :NUM_TOKENS] / temperature).log_softmax(-1))
        ids = torch.multinomial(log_probs[-1].exp(), 1, generator=generator)
        drawn.append(ids)
    return Sampled(torch.cat(drawn, dim=1).numpy(), torch.stack(log_probs, dim=1))


def token_distribution(model: Any, texts: IntArray) -> torch.Tensor:
    """Log-probs over the tokens of the grammar at each place of the responses, [N, 12, 64]."""
    logits = model(input_ids=torch.from_numpy(texts[:, :-1]), use_cache=False).logits
    result: torch.Tensor = logits[:, PROMPT_LENGTH - 1 :, :NUM_TOKENS].log_softmax(-1)
    return result


@torch.no_grad()
def text_nll(model: Any, texts: IntArray) -> float:
    """Mean log-loss per token of the responses in `texts`, nats."""
    targets = torch.from_numpy(texts[:, PROMPT_LENGTH:, None])
    return -float(token_distribution(model, texts).gather(2, targets).mean())


def make_base(folder: Path, *, steps: int = BASE_STEPS) -> Path:
    """Train the base model on text of the grammar, once: a Llama of 62,000 weights and a tokenizer of whole words.

    Returns:
        `folder`, a Hugging Face model.
    """
    if (folder / "config.json").exists():
        return folder
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*TOKENS, END, UNKNOWN])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token=UNKNOWN, pad_token=END)
    fast.save_pretrained(folder)

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=48,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            bos_token_id=None,
            eos_token_id=vocabulary[END],
        )
    )
    grammar, rng = Grammar(), np.random.default_rng([0, 0])
    end = np.full((BASE_BATCH, 1), vocabulary[END])
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        texts = grammar.texts(rng.integers(NUM_TOPICS, size=BASE_BATCH), rng)
        ids = torch.from_numpy(np.concatenate([texts, end], axis=1))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    return folder


def load_base(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder).eval()


def pico_run(
    task: Task, storage: Path, sources: Sequence[Path], held_out: Path | None, num_pairs: int, **overrides: Any
) -> Any:
    """The recipe of a training on the task: 32 pairs a step, AdamW at 3e-4.

    Args:
        sources: Mixed in equal shares, when several.
        held_out: None: no pairs to evaluate on.
        overrides: As in `recipe`.
    """
    settings: dict[str, Any] = {
        "data__sources": [{"path": str(path), "weight": 1.0} for path in sources],
        "data__eval": {"sources": [{"path": str(held_out)}], "num_pairs": 512} if held_out else {"num_pairs": 0},
        "data__subset_seed": task.seed,
        "data__max_tokens": 32,
        "batch__pairs_per_step": 32,
        "batch__tokens_per_device": 4096,
        "batch__layout": "padded",  # texts this short are computed a third as fast in packed rows
        "optim__learning_rate": 3e-4,
        "train__seed": task.seed,
        "eval__every_steps": 10**6,
    }
    return recipe(task.base, str(sources[0]), storage, num_pairs, **settings | overrides)


class Trained(NamedTuple):
    """Held-out evaluations, and the model as the last step left it."""

    evaluations: list[Evaluation]
    model: Any


def train(run: Any, measure: Callable[[Any], dict[str, float]] | None = None) -> Trained:
    """All steps of a run on this process; may be called any number of times.

    Args:
        run: From `pico_run`; evaluates every `eval.every_steps`, and at the end.
        measure: What else to ask of the policy at an evaluation; its numbers join the held-out metrics.
    """
    from dpo_ray.attention import Attention
    from dpo_ray.train import PairSet

    prepared, store, order, worker = start_ours(run)
    if prepared.train.num_pairs < (run.data.num_pairs or 0):
        raise ValueError(f"{run.data.num_pairs} pairs were asked for and there are {prepared.train.num_pairs}")
    score_missing(run, store, [*prepared.train_pairs, *prepared.held_out_pairs])
    pairs, held_out = (PairSet(files, store, worker.batch) for files in (prepared.train, prepared.held_out))
    evaluations = []
    for step in range(1, order.num_steps + 1):
        worker.step(pairs, order.pairs_of(step), step)
        if step % run.eval.every_steps == 0 or step == order.num_steps:
            metrics = means(worker.evaluate(held_out)[0]) if len(held_out.pairs) else {}
            if measure is not None:
                with plain_attention(worker.engine.model) as model:
                    metrics |= measure(model)
            evaluations.append(Evaluation(step, metrics))
    worker.engine.model.attend_with(Attention("mask", "sampling"))
    return Trained(evaluations, worker.engine.model.causal.eval())


@contextmanager
def plain_attention(model: Any) -> Iterator[Any]:
    """The language model of a `PairModel` to sample from, for a while: packed rows have an attention of their own."""
    from dpo_ray.attention import Attention

    packed = model.attention
    model.attend_with(Attention("mask", "sampling"))
    yield model.causal.eval()
    model.attend_with(packed)
