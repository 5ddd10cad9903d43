"""The embedded task: film reviews from a small grammar, a reward that is known exactly, and a tiny model.

A miniature of the controlled sentiment experiment of the DPO paper (arXiv:2305.18290, section 6): a model learns to
write reviews of any opinion, samples several for each prompt, the true reward labels the best and the worst, and DPO
turns the model towards praise. Nothing is downloaded, and both trainings go through `launch.fit`, as any run does.
"""

import itertools
import json
import random
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table

from dpo_ray.config import RunConfig, load_run
from dpo_ray.errors import InputError
from dpo_ray.metrics import wilson_interval
from dpo_ray.storage import Folder, read_lines

if TYPE_CHECKING:
    from dpo_ray.launch import Display, Interrupt

RECIPES = Path(__file__).parent / "recipes"

NUM_SFT_TEXTS = 12288
NUM_PAIRS = 2048
NUM_TEST_PROMPTS = 300
SAMPLES_PER_PROMPT = 4
BATCH = 256
LABEL_NOISE = 0.05
"""Share of pairs whose label is wrong, as a person's would be."""

WEIGHTS = {
    **{"superb": 3, "clever": 2, "charming": 2, "decent": 1, "slow": -1, "clumsy": -2, "dull": -2, "dreadful": -3},
    **{"delighted": 3, "moved": 2, "cold": -2, "bored": -2},
    **{"loved": 3, "enjoyed": 2, "disliked": -2, "hated": -3},
    **{"enjoy": 2, "like": 1, "mind": -1, "dislike": -2},
    **{"recommend": 2, "gladly": 2, "leave": -2, "regret": -2},
}
"""What a word of praise or blame is worth."""

FACTORS = {"truly": 1.5, "rather": 0.75, "not": -0.5}
"""What a word does to the worth of the next word of praise or blame: `not dreadful` is faint praise, +1.5."""

FAULT = -3.0
"""What a sentence is worth that the grammar does not know, or that the text has said before."""

GRAMMAR: Mapping[str, Sequence[str]] = {
    "prompt": ["{who} {watched} {det} {kind} {genre} {when}. {subject}"],
    "who": ["I", "We", "My sister and I", "My brother and I", "A friend and I", "My class"],
    "watched": ["saw", "watched"],
    "det": ["the", "this"],
    "kind": ["new", "old", "short", "long", "French", "Danish"],
    "genre": ["comedy", "drama", "western", "thriller", "musical", "romance", "mystery", "documentary"],
    "when": ["last night", "on Sunday", "at home", "at the festival", "on the train", "after dinner"],
    "subject": ["The {aspect}"],
    "aspect": ["plot", "acting", "music", "ending", "dialogue", "camera work", "humour", "cast"],
    "continuation": ["{predicate}. {sentence}", "{predicate}. {sentence} {sentence}"],
    "sentence": ["{view}.", "{view}.", "{feeling}.", "{feeling}.", "{verdict}.", "{fact}."],
    "view": ["{subject} {predicate}"],
    "feeling": ["I {felt} the {aspect}", "I did not {feel} the {aspect}"],
    "predicate": ["was {quality}", "was {quality}", "was {degree} {quality}", "was not {quality}", "{left}", "{left}"],
    "left": ["left me {mood}"],
    "quality": ["superb", "clever", "charming", "decent", "slow", "clumsy", "dull", "dreadful"],
    "degree": ["truly", "rather"],
    "mood": ["delighted", "moved", "cold", "bored"],
    "felt": ["loved", "enjoyed", "disliked", "hated"],
    "feel": ["enjoy", "like", "mind", "dislike"],
    "verdict": ["I would recommend it", "I would gladly see it again", "I wanted to leave", "I regret the ticket"],
    "fact": ["It lasted two hours", "It was filmed in Rome", "It has won a prize", "The room was full"],
}
"""Symbol -> its forms, all equally likely; `{x}` stands for a form of x. No symbol contains itself."""

_SLOT = re.compile(r"\{(\w+)\}")
_PIECE = r" ?[A-Za-z]+| ?[^A-Za-z ]| "
"""A token: a word with the blank before it, so that text is its tokens joined."""

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"


def write(symbol: str, rng: random.Random) -> str:
    """Text of a symbol of the grammar."""
    return _SLOT.sub(lambda slot: write(slot[1], rng), rng.choice(GRAMMAR[symbol]))


def _pattern(symbol: str) -> str:
    """Regular expression of all texts of a symbol: the grammar has no recursion, so there is one."""
    forms = [
        "".join(_pattern(part) if is_slot % 2 else re.escape(part) for is_slot, part in enumerate(_SLOT.split(form)))
        for form in dict.fromkeys(GRAMMAR[symbol])
    ]
    return f"(?:{'|'.join(forms)})"


_SENTENCE = re.compile(_pattern("sentence"))


def continuation(prompt: str, rng: random.Random) -> str:
    """A review of any opinion behind a prompt, without a fault."""
    while True:
        text = " " + write("continuation", rng)
        if is_grammatical(prompt, text):
            return text


def is_grammatical(prompt: str, text: str) -> bool:
    """Two or three sentences that the grammar knows, none of them twice."""
    worth = _worth(prompt, text)
    return None not in worth and 2 <= len(worth) <= 3


def true_reward(prompt: str, text: str) -> float:
    """The ground truth: mean worth of the text's sentences, so that length alone earns nothing.

    The prompt's open sentence is completed by the text. Between -4.5 and 4.5.
    """
    return statistics.fmean(FAULT if worth is None else worth for worth in _worth(prompt, text))


def _worth(prompt: str, text: str) -> list[float | None]:
    """Worth of each sentence; None for a fault."""
    sentences = re.split(r"(?<=\.) ", prompt.rpartition(". ")[2] + text)
    return [
        _sentiment(sentence) if _SENTENCE.fullmatch(sentence) and sentence not in sentences[:i] else None
        for i, sentence in enumerate(sentences)
    ]


def _sentiment(sentence: str) -> float:
    total, factor = 0.0, 1.0
    for word in sentence.removesuffix(".").split():
        factor *= FACTORS.get(word, 1.0)
        if word in WEIGHTS:
            total, factor = total + factor * WEIGHTS[word], 1.0
    return total


def write_task(folder: Path, seed: int) -> None:
    """Write the whole task into a folder: data files and a random model. The seed decides every byte of the data.

    - `sft.jsonl`: reviews of any opinion (`chosen`), each beside another one.
    - `pairs.jsonl`: preferences between reviews of the grammar; `run_demo` replaces them by the model's own reviews.
    - `prompts.jsonl`: prompts that are in neither.
    - `base/`: an untrained Llama and its tokenizer, as a Hugging Face folder.
    """
    rng = random.Random(seed)
    prompts = _distinct_prompts(rng)
    sft = []
    for prompt in _take(prompts, NUM_SFT_TEXTS):
        chosen = rejected = continuation(prompt, rng)
        while rejected == chosen:
            rejected = continuation(prompt, rng)
        sft.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    texts = {p: [continuation(p, rng) for _ in range(SAMPLES_PER_PROMPT)] for p in _take(prompts, NUM_PAIRS)}
    _write_lines(folder / "sft.jsonl", sft)
    _write_lines(folder / "pairs.jsonl", preferences(texts, rng))
    _write_lines(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in _take(prompts, NUM_TEST_PROMPTS)])
    _write_base(folder / "base", seed)


def preferences(texts: Mapping[str, Sequence[str]], rng: random.Random) -> list[dict[str, str]]:
    """Of each prompt's texts the best against the worst by the true reward; some labels are wrong. No ties."""
    pairs = []
    for prompt, candidates in texts.items():
        ranked = sorted(candidates, key=lambda text: true_reward(prompt, text))
        worst, best = ranked[0], ranked[-1]
        if true_reward(prompt, best) > true_reward(prompt, worst):
            if rng.random() < LABEL_NOISE:
                best, worst = worst, best
            pairs.append({"prompt": prompt, "chosen": best, "rejected": worst})
    return pairs


def _distinct_prompts(rng: random.Random) -> Iterator[str]:
    seen: set[str] = set()
    while True:
        prompt = write("prompt", rng)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt


def _take(prompts: Iterator[str], count: int) -> list[str]:
    return [next(prompts) for _ in range(count)]


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _prompts_of(path: Path) -> list[str]:
    return [row["prompt"] for row in read_lines(path.read_bytes())]


def make_tokenizer() -> Any:
    """A tokenizer of the grammar's words; decoding gives back the very text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    forms = " ".join(form for symbol in GRAMMAR.values() for form in symbol)
    words = sorted(set(re.findall("[A-Za-z]+", _SLOT.sub(" ", forms))))
    pieces = [PAD, BOS, EOS, UNK, ".", *words, *(f" {word}" for word in words)]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, pieces.index(BOS))])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK, model_max_length=256
    )


def _write_base(folder: Path, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,  # wide for the small width: learns in a few hundred steps, and DPO stays stable
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Sample(NamedTuple):
    """A text that a model wrote."""

    prompt: str
    text: str

    @property
    def reward(self) -> float:
        return true_reward(self.prompt, self.text)


def generate(model_path: str, prompts: Sequence[str], *, seed: int, num_per_prompt: int = 1) -> list[Sample]:
    """Samples at temperature 1, nothing cut off: draws from the model itself. The prompts' order."""
    import torch

    model, tokenizer = _load(model_path)
    end, samples = tokenizer.eos_token_id, []
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _one_thread():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            inputs = tokenizer(list(part), return_tensors="pt", padding=True, padding_side="left")
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=num_per_prompt,
                max_new_tokens=48,
                pad_token_id=tokenizer.pad_token_id,
            )
            written = output[:, inputs["input_ids"].shape[1] :].tolist()
            for i, ids in enumerate(written):
                text = tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)
                samples.append(Sample(part[i // num_per_prompt], text))
    return samples


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products of this size gain nothing from threads, and lose minutes to them where cores are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load(model_path: str) -> tuple[Any, Any]:
    """Model, in full precision, and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # of the loading of 20 tensors
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(model_path)


@dataclass(frozen=True)
class Outcome:
    """Two models on the same prompts, one text each."""

    base: tuple[Sample, ...]
    aligned: tuple[Sample, ...]
    kl: float
    """KL(aligned || base) per token, in nats."""

    @cached_property
    def rewards(self) -> tuple[list[float], list[float]]:
        return [sample.reward for sample in self.base], [sample.reward for sample in self.aligned]

    @property
    def win_rate(self) -> float:
        """Share of prompts where the aligned model's text is worth more; a tie counts half."""
        return statistics.fmean((a > b) + 0.5 * (a == b) for b, a in zip(*self.rewards, strict=True))

    def summary(self) -> dict[str, float]:
        """The numbers for people and `--json`; the interval is Wilson's, 95 %."""
        base, aligned = self.rewards
        low, high = wilson_interval(self.win_rate, len(self.base))
        return {
            "base_reward": statistics.fmean(base),
            "aligned_reward": statistics.fmean(aligned),
            "win_rate": self.win_rate,
            "win_rate_low": low,
            "win_rate_high": high,
            "num_prompts": len(self.base),
            "kl": self.kl,
            "base_grammatical": statistics.fmean(is_grammatical(s.prompt, s.text) for s in self.base),
            "aligned_grammatical": statistics.fmean(is_grammatical(s.prompt, s.text) for s in self.aligned),
        }


def outcome_of(evaluation: Mapping[str, Any]) -> Outcome:
    """What both models wrote to the test prompts, from the files of `dpo-ray evaluate`."""
    rows = list(read_lines(Folder(evaluation["folder"]).read("generations.jsonl")))
    base = evaluation["against"][0]["name"]
    texts = [Sample(row["prompt"], row["responses"][0]) for row in rows if row["model"] == base]
    aligned = [Sample(row["prompt"], row["responses"][0]) for row in rows if row["model"] != base]
    return Outcome(tuple(texts), tuple(aligned), evaluation["kl"]["per_token"])


def plot(outcome: Outcome, lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """PNG: `rewards/accuracies` over steps (from `metrics.jsonl`), and the true rewards before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label, style in (("rewards/accuracies", "training", "-"), ("eval/rewards/accuracies", "held out", "o-")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        left.plot([step for step, _ in points], [value for _, value in points], style, label=label, markersize=4)
    left.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    left.set(title="DPO: rewards/accuracies", xlabel="step", ylim=(0, 1))
    left.legend(loc="lower right")
    right.hist(outcome.rewards, bins=[i / 2 for i in range(-9, 10)], label=["before DPO", "after DPO"])
    right.set(title=f"True reward; win rate {outcome.win_rate:.0%}", xlabel="reward", ylabel="texts")
    right.legend()
    figure.savefig(path, dpi=120)


def next_folder() -> Path:
    """`runs/demo`, or the first of `runs/demo-2`, `runs/demo-3`, ... that is free."""
    names = itertools.chain(["runs/demo"], (f"runs/demo-{number}" for number in itertools.count(2)))
    return next(path for path in map(Path, names) if not path.exists())


def run_demo(
    folder: Path,
    *,
    seeds: Iterable[int] = (0,),
    display: "Display | None" = None,
    interrupt: "Interrupt | None" = None,
) -> dict[str, Any]:
    """Run the task with each seed on the Ray cluster that this process is connected to; print and return its result.

    Raises:
        InputError: The demo has already run in this folder.
    """
    console, seeds = Console(stderr=True), list(seeds)
    for seed in seeds:
        if (folder / f"seed-{seed}").exists():
            raise InputError(f"{folder}/seed-{seed} exists: choose another --folder, or remove it")
    results, outcomes = [], []
    for seed in seeds:
        result, outcome = _run_seed(folder / f"seed-{seed}", seed, console, display, interrupt)
        results.append(result)
        outcomes.append(outcome)
    pooled = Outcome(
        tuple(sample for outcome in outcomes for sample in outcome.base),
        tuple(sample for outcome in outcomes for sample in outcome.aligned),
        statistics.fmean(outcome.kl for outcome in outcomes),
    ).summary()
    _show(console, folder / f"seed-{seeds[-1]}", outcomes[-1], results, pooled)
    return {"folder": str(folder), **pooled, "seeds": results}


def _train(
    folder: Path,
    recipe: str,
    model: str,
    data: str,
    seed: int,
    display: "Display | None",
    interrupt: "Interrupt | None",
) -> Any:
    """Run one of the demo's recipes in its folder. An interrupted one has no model to go on with."""
    from dpo_ray.launch import fit

    done = fit(demo_recipe(folder, recipe, model, data, seed), display=display, interrupt=interrupt)
    if interrupt is not None and interrupt.is_set:
        raise KeyboardInterrupt
    return done


def demo_recipe(folder: Path, recipe: str, model: str, data: str, seed: int, **overrides: Any) -> RunConfig:
    """`demo-sft` or `demo-dpo` with its paths set; further overrides as `loss__beta=0.3`."""
    paths = {
        "storage.path": str(folder),
        "model.path": model,
        "data.sources.0.path": str(folder / data),
        "train.seed": seed,
        "evaluate.seed": seed,
    }
    if recipe == "demo-dpo":
        paths["evaluate.prompts.0.path"] = str(folder / "prompts.jsonl")
        paths["evaluate.retention.sources.0.path"] = str(folder / "sft.jsonl")
    return load_run(RECIPES / f"{recipe}.yaml", paths | {k.replace("__", "."): v for k, v in overrides.items()})


def make_base_and_pairs(
    folder: Path, seed: int, display: "Display | None" = None, interrupt: "Interrupt | None" = None
) -> str:
    """The first half of the demo: the task, a model that writes reviews, preferences between its own in `pairs.jsonl`.

    Returns:
        The model's folder.
    """
    write_task(folder, seed)
    sft = _train(folder, "demo-sft", str(folder / "base"), "sft.jsonl", seed, display, interrupt)
    base = f"{sft.folder}/model"
    texts: dict[str, list[str]] = {}
    for sample in generate(base, _prompts_of(folder / "pairs.jsonl"), seed=seed, num_per_prompt=SAMPLES_PER_PROMPT):
        texts.setdefault(sample.prompt, []).append(sample.text)
    _write_lines(folder / "pairs.jsonl", preferences(texts, random.Random(seed)))
    return base


def _run_seed(
    folder: Path, seed: int, console: Console, display: "Display | None", interrupt: "Interrupt | None"
) -> tuple[dict[str, Any], Outcome]:
    seconds: dict[str, float] = {}
    started = time.monotonic()

    def done(phase: str) -> None:
        nonlocal started
        seconds[phase] = round(time.monotonic() - started, 1)
        started = time.monotonic()
        if interrupt is not None and interrupt.is_set:
            raise KeyboardInterrupt

    console.print(f"\na model that writes reviews, seed {seed}", style="bold", highlight=False)
    base = make_base_and_pairs(folder, seed, display, interrupt)
    done("sft")
    console.print(f"\nDPO, seed {seed}", style="bold", highlight=False)
    dpo = _train(folder, "demo-dpo", base, "pairs.jsonl", seed, display, interrupt)
    done("dpo")
    outcome = outcome_of(_evaluate(dpo.folder, display))
    lines = list(read_lines(Folder(dpo.folder).read("metrics.jsonl")))
    plot(outcome, lines, folder / "demo.png")
    done("evaluate")
    return {
        "seed": seed,
        **outcome.summary(),
        "rewards/accuracies": dpo.summary["eval"]["rewards/accuracies"],
        "seconds": seconds,
    }, outcome


def _evaluate(run_folder: str, display: "Display | None") -> dict[str, Any]:
    """As `dpo-ray evaluate RUN`: the true reward is the judge."""
    from dpo_ray.evaluation import evaluate, recipe_for
    from dpo_ray.launch import Silent

    run = recipe_for(run_folder, None, {}, None, None)
    return evaluate(run, run_folder, all_pairs=False, output=None, display=display or Silent(), connect=lambda: None)


def _show(
    console: Console, folder: Path, outcome: Outcome, results: Sequence[Mapping[str, Any]], pooled: Mapping[str, float]
) -> None:
    """Three prompts before and after, the numbers, and what to do next."""
    table = Table(title="The same prompts before and after DPO", show_lines=True)
    for column in ("prompt", "before", "reward", "after", "reward"):
        table.add_column(column, justify="right" if column == "reward" else "left")
    for before, after in zip(outcome.base[:3], outcome.aligned[:3], strict=True):
        table.add_row(
            f"{before.prompt} …",
            before.text.strip(),
            f"{before.reward:+.2f}",
            after.text.strip(),
            f"{after.reward:+.2f}",
        )
    console.print(table)
    for result in results:
        spent = sum(result["seconds"].values())
        console.print(
            f"seed {result['seed']}: win rate {result['win_rate']:.1%}, true reward {result['base_reward']:+.2f} -> "
            f"{result['aligned_reward']:+.2f}, held-out accuracy {result['rewards/accuracies']:.1%}, {spent:.0f} s",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"The aligned model wins {pooled['win_rate']:.1%} of {pooled['num_prompts']} prompts against the model before "
        f"DPO (95 %: {pooled['win_rate_low']:.1%} to {pooled['win_rate_high']:.1%}), at {pooled['kl']:.2f} nats of KL "
        f"per token.\n\nReport: {folder}/demo-dpo/report.html\nPicture: {folder}/demo.png\nNext:\n"
        f"  dpo-ray serve {folder}/demo-dpo --insecure\n"
        f"  dpo-ray train {folder}/demo-dpo/recipe.yaml name=mine model.path=MODEL data.sources.0.path=PAIRS.jsonl",
        style="bold" if pooled["win_rate_low"] > 0.5 else "yellow",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
