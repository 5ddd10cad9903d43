"""The embedded task: its grammar, its true reward, the files it writes and the arithmetic of its outcome."""

import json
import math
import random

import pytest

from dpo_ray import demo
from dpo_ray.config import load_run
from dpo_ray.demo import Outcome, Sample, true_reward

PROMPT = "I saw this old drama at home. The plot"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A small task, written twice from one seed and once from another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "NUM_SFT_TEXTS", 300)
        patch.setattr(demo, "NUM_PAIRS", 400)
        patch.setattr(demo, "NUM_TEST_PROMPTS", 20)
        folders = [tmp_path_factory.mktemp("task") for _ in range(3)]
        for folder, seed in zip(folders, (5, 5, 6), strict=True):
            demo.write_task(folder, seed)
    return folders


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_grammar_knows_all_that_it_writes():
    rng = random.Random(0)
    for _ in range(500):
        prompt = demo.write("prompt", rng)
        text = demo.continuation(prompt, rng)
        assert text.startswith(" ")
        assert demo.is_grammatical(prompt, text), prompt + text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " was.",
        " was superb",
        " was superb. I loved.",
        " was superb.I loved the cast.",
        " was superb. i loved the cast.",
        " was superb. superb superb superb.",
        " was superb.",
        " was superb. I loved the cast. I loved the cast.",
        " was superb. The plot was superb.",
        " was superb. I loved the cast. I loved the music. I loved the ending.",
    ],
)
def test_what_the_grammar_does_not_know(text):
    assert not demo.is_grammatical(PROMPT, text)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (" was superb. It lasted two hours.", (3 + 0) / 2),
        (" was dreadful. It lasted two hours.", (-3 + 0) / 2),
        (" was not dreadful. It lasted two hours.", (1.5 + 0) / 2),
        (" was not superb. It lasted two hours.", (-1.5 + 0) / 2),
        (" was truly clever. The cast was rather dull.", (3 - 1.5) / 2),
        (" left me cold. I did not mind the music. I would recommend it.", (-2 + 0.5 + 2) / 3),
        (" was decent. I hated the camera work. I did not enjoy the cast.", (1 - 3 - 1) / 3),
    ],
)
def test_rewards_worked_by_hand(text, reward):
    assert demo.is_grammatical(PROMPT, text)
    assert true_reward(PROMPT, text) == pytest.approx(reward)


def test_degenerate_text_does_not_pay():
    praise = " was superb. I loved the cast."
    assert true_reward(PROMPT, praise) == 3
    assert true_reward(PROMPT, praise + " I loved the cast.") == 1  # 3, 3 and a fault
    assert true_reward(PROMPT, " superb" * 20) == demo.FAULT
    assert true_reward(PROMPT, " was superb superb superb. superb loved.") == demo.FAULT
    assert true_reward(PROMPT, "") == demo.FAULT
    assert true_reward(PROMPT, " was superb. I loved the") == 0  # 3 and a fault: cut off


def test_every_word_of_the_reward_is_in_the_grammar():
    words = {word for forms in demo.GRAMMAR.values() for form in forms for word in form.split()}
    assert set(demo.WEIGHTS) | set(demo.FACTORS) <= words


def test_the_seed_decides_the_files(task):
    first, again, other = task
    for name in ("sft.jsonl", "pairs.jsonl", "prompts.jsonl", "base/model.safetensors", "base/tokenizer.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    assert (first / "pairs.jsonl").read_bytes() != (other / "pairs.jsonl").read_bytes()
    assert (first / "base/model.safetensors").read_bytes() != (other / "base/model.safetensors").read_bytes()


def test_task_files(task):
    sft, pairs, tests = (rows(task[0] / f"{name}.jsonl") for name in ("sft", "pairs", "prompts"))
    assert len(sft) == 300
    assert len(tests) == 20
    assert all(row["chosen"] != row["rejected"] for row in sft + pairs)
    prompts = [row["prompt"] for row in sft + pairs + tests]
    assert len(set(prompts)) == len(prompts)
    # 5 % of 400 labels are wrong, give or take four standard deviations, and no pair is a tie.
    margins = [true_reward(r["prompt"], r["chosen"]) - true_reward(r["prompt"], r["rejected"]) for r in pairs]
    assert 0 not in margins
    assert 3 <= sum(margin < 0 for margin in margins) <= 38
    # The SFT texts hold no preference: of 300, half are better, give or take four standard deviations.
    better = sum(true_reward(r["prompt"], r["chosen"]) > true_reward(r["prompt"], r["rejected"]) for r in sft)
    assert 105 <= better <= 185


def test_preferences_take_best_and_worst_and_no_ties(monkeypatch):
    monkeypatch.setattr(demo, "LABEL_NOISE", 0.0)
    good, bad, middle = (f" was {word}. It lasted two hours." for word in ("superb", "dull", "decent"))
    texts = {PROMPT: [middle, bad, good, bad], "We saw it. The cast": [good, good]}
    expected = [{"prompt": PROMPT, "chosen": good, "rejected": bad}]
    assert demo.preferences(texts, random.Random(0)) == expected
    monkeypatch.setattr(demo, "LABEL_NOISE", 1.0)
    assert demo.preferences(texts, random.Random(0)) == [{"prompt": PROMPT, "chosen": bad, "rejected": good}]


def test_tokenizer_gives_the_text_back(task):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task[0] / "base")
    tokens = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert tokens == ("<s>", "</s>", "<pad>", "<unk>")
    assert tokenizer.chat_template is None
    for row in rows(task[0] / "sft.jsonl")[:100]:
        prompt, response = tokenizer(row["prompt"])["input_ids"], tokenizer(row["chosen"], add_special_tokens=False)
        assert prompt[0] == tokenizer.bos_token_id
        ids = prompt + response["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids[1:]) == row["prompt"] + row["chosen"]
        assert ids == tokenizer(row["prompt"] + row["chosen"])["input_ids"]
    assert tokenizer.unk_token_id in tokenizer("The plot was unheard of.")["input_ids"]


def test_samples_come_of_their_seed(task, monkeypatch):
    base = str(task[0] / "base")
    prompts = [row["prompt"] for row in rows(task[0] / "prompts.jsonl")]
    monkeypatch.setattr(demo, "BATCH", 7)
    samples = demo.generate(base, prompts, seed=1, num_per_prompt=2)
    assert [s.prompt for s in samples] == [prompt for prompt in prompts for _ in range(2)]
    assert samples == demo.generate(base, prompts, seed=1, num_per_prompt=2)
    assert samples != demo.generate(base, prompts, seed=2, num_per_prompt=2)


def text_worth(worth):
    texts = {3: " was superb. I loved the cast.", -3: " was dreadful. I hated the cast.", 0: " was dull. I loved x."}
    return Sample(PROMPT, texts[worth])


def test_outcome_worked_by_hand():
    base = tuple(text_worth(w) for w in (-3, 3, 3, -3))
    aligned = tuple(text_worth(w) for w in (3, 3, -3, 3))
    outcome = Outcome(base, aligned, 0.5)
    # Two wins, one tie, one loss: 2.5 / 4. Wilson: centre (p + z²/2n) / (1 + z²/n).
    assert outcome.win_rate == 0.625
    assert outcome.summary()["kl"] == 0.5
    summary = outcome.summary()
    assert (summary["base_reward"], summary["aligned_reward"]) == (0, 1.5)
    z, n = 1.959964, 4
    centre, scale = (0.625 + z * z / (2 * n)) / (1 + z * z / n), 1 + z * z / n
    half = z * math.sqrt(0.625 * 0.375 / n + z * z / (4 * n * n)) / scale
    assert summary["win_rate_low"] == pytest.approx(centre - half, abs=1e-6)
    assert summary["win_rate_high"] == pytest.approx(centre + half, abs=1e-6)
    assert summary["num_prompts"] == 4
    assert summary["aligned_grammatical"] == 1


def test_picture(tmp_path):
    outcome = Outcome((text_worth(-3),), (text_worth(3),), 0.1)
    lines = [{"step": 1, "rewards/accuracies": 0.5}, {"step": 2, "eval/rewards/accuracies": 0.75}]
    demo.plot(outcome, lines, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_demo_is_never_written_over(tmp_path):
    (tmp_path / "seed-1").mkdir()
    with pytest.raises(demo.InputError, match="seed-1 exists"):
        demo.run_demo(tmp_path, seeds=[0, 1])
    assert not (tmp_path / "seed-0").exists()


@pytest.mark.parametrize(("name", "loss"), [("demo-sft", "sft"), ("demo-dpo", "dpo")])
def test_shipped_recipes_load(name, loss):
    run = load_run(demo.RECIPES / f"{name}.yaml")
    assert run.name == name
    assert run.loss.kind == loss
    assert run.model.path == "demo/base"


def test_ctrl_c_in_the_first_training_ends_the_demo(tmp_path, monkeypatch):
    from dpo_ray import launch

    interrupt = launch.Interrupt()

    def fit(run, **others):
        interrupt.is_set = True
        return launch.RunResult(run.folder, {"status": "interrupted"})

    monkeypatch.setattr(launch, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        demo.make_base_and_pairs(tmp_path / "demo", 0, None, interrupt)
