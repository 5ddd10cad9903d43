"""Oracles: each says what its source says, whatever the order, the batch and the padding."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from dpo_ray.acquisition import oracles
from dpo_ray.acquisition.answers import Answer, by_gap
from dpo_ray.acquisition.judge import Judge
from dpo_ray.acquisition.label_queue import LabelQueue
from dpo_ray.acquisition.oracles import flipped, length_batches, make_oracle, plain_text
from dpo_ray.config import (
    AnyOracle,
    FunctionOracleConfig,
    LabelsOracleConfig,
    LlmOracleConfig,
    PeopleOracleConfig,
    RewardModelOracleConfig,
)
from dpo_ray.errors import InputError
from dpo_ray.pairs import Candidate, Message, Text
from dpo_ray.storage import Folder


def pair(number: int, gold_gap: float | None = None) -> Candidate:
    return Candidate(f"prompt {number}", "yes" * (number + 1), "no", gold_gap=gold_gap, source="data.jsonl", row=number)


def ask(config: AnyOracle, candidates: list[Candidate], seed: int = 0) -> list[Answer]:
    """The answers, in the order of the candidates."""
    answers: list[Answer] = []
    make_oracle(config, seed=seed, storage="runs").ask(candidates, answers.append)
    assert sorted(a.candidate_id for a in answers) == sorted(c.candidate_id for c in candidates)
    by_id = {answer.candidate_id: answer for answer in answers}
    return [by_id[candidate.candidate_id] for candidate in candidates]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


CALLS = [{"function": {"name": "look", "arguments": {"q": "\u00e9"}}}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" as it is\n\n", " as it is\n\n"),
        ((user("Hi"),), "user: Hi"),
        ((assistant("Hello"),), "Hello"),
        ((user("Hi"), assistant("Hello"), user("Why?")), "user: Hi\n\nassistant: Hello\n\nuser: Why?"),
        ((assistant("a"), user("b")), "assistant: a\n\nuser: b"),
        ((assistant("I look.", tool_calls=CALLS),), f"I look.\ncalls: {json.dumps(CALLS, ensure_ascii=False)}"),
        ((assistant("", tool_calls=CALLS),), f"calls: {json.dumps(CALLS, ensure_ascii=False)}"),
        ((), ""),
    ],
)
def test_a_conversation_reads_as_text(text: Text, expected: str):
    assert plain_text(text) == expected


# Labels


def test_hidden_labels_tell_the_side_and_by_how_much():
    answers = ask(LabelsOracleConfig(), [pair(0, 1.5), pair(1, -0.25), pair(2, 0.0)])
    assert [(a.preferred, a.margin, a.note) for a in answers] == [
        ("first", 1.5, None),
        ("second", 0.25, None),
        ("tie", 0.0, "equal scores"),
    ]
    assert {a.by for a in answers} == {"labels"}
    assert json.loads(json.dumps(answers[0]._asdict())) == answers[0]._asdict()


@pytest.mark.parametrize("gap", [None, math.nan, math.inf])
def test_a_pair_without_a_label_is_named_before_anything_is_answered(gap: float | None):
    answers: list[Answer] = []
    with pytest.raises(InputError, match=r"^data\.jsonl:7: the data has no label here"):
        make_oracle(LabelsOracleConfig(), seed=0, storage="runs").ask([pair(0, 1.0), pair(7, gap)], answers.append)
    assert answers == []


# Noise


def test_as_many_answers_are_turned_round_as_the_recipe_asks_for():
    candidates = [pair(number, 1.0) for number in range(4000)]
    answers = ask(LabelsOracleConfig(flip=0.1), candidates)
    turned = [answer.preferred == "second" for answer in answers]
    assert sum(turned) == pytest.approx(400, abs=4 * math.sqrt(4000 * 0.1 * 0.9))
    assert [answer.note == "flipped" for answer in answers] == turned
    assert {answer.margin for answer in answers} == {1.0}
    wider = ask(LabelsOracleConfig(flip=0.3), candidates)
    assert all(b.preferred == "second" for a, b in zip(turned, wider, strict=True) if a), "more noise adds to less"


def test_which_answers_are_turned_depends_on_seed_and_content_alone():
    candidates, config = [pair(number, 1.0) for number in range(200)], LabelsOracleConfig(flip=0.4)
    answers = ask(config, candidates)
    assert ask(config, candidates[::-1]) == answers[::-1]
    assert ask(config, candidates[50:60]) == answers[50:60]
    same = sum(a == b for a, b in zip(answers, ask(config, candidates, seed=1), strict=True))
    assert same == pytest.approx(200 * (0.4**2 + 0.6**2), abs=4 * math.sqrt(200 / 4))
    opposite = ask(config, [pair(number, -1.0) for number in range(200)])
    assert [a.note for a in opposite] == [a.note for a in answers], "not on the label"


def test_what_names_no_side_is_not_turned():
    for preferred in ("tie", "none"):
        answers = [Answer(str(i), preferred, "x", note="why") for i in range(50)]  # type: ignore[arg-type]
        assert [flipped(answer, 0.499, 0) for answer in answers] == answers
    assert {flipped(Answer(str(i), "first", "x", note="why"), 0.499, 0).note for i in range(50)} == {
        "why",
        "why; flipped",
    }


# A function


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Write a module into the current directory; its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    written: list[str] = []

    def write(code: str) -> str:
        written.append(f"oracle_of_a_test_{tmp_path.name}_{len(written)}")
        (tmp_path / f"{written[-1]}.py").write_text(code)
        return written[-1]

    yield write
    for name in written:
        sys.modules.pop(name, None)


def test_a_function_prefers_the_higher_value(module: Callable[[str], str]):
    name = module("def reward(prompt, response): return len(response) - 6 * prompt.endswith('1')")
    config = FunctionOracleConfig(function=f"{name}:reward")
    answers = ask(config, [pair(0), pair(1), Candidate("p", "a", "bcd"), Candidate("p", "ab", "ba")])
    assert [(a.preferred, a.margin) for a in answers] == [("first", 1), ("first", 4), ("second", 2), ("tie", 0)]
    assert answers[0].by == f"function:{name}:reward"


def test_a_function_is_given_text(module: Callable[[str], str]):
    name = module("seen = []\ndef reward(prompt, response):\n    seen.append((prompt, response))\n    return 0")
    turns = (user("Hi"), assistant("Yes?"), user("Why?"))
    ask(FunctionOracleConfig(function=f"{name}:reward"), [Candidate(turns, (assistant("So."),), (assistant("No."),))])
    text = "user: Hi\n\nassistant: Yes?\n\nuser: Why?"
    assert sys.modules[name].seen == [(text, "So."), (text, "No.")]


@pytest.mark.parametrize("value", ["float('nan')", "float('-inf')"])
def test_a_value_that_is_not_finite_is_no_answer(module: Callable[[str], str], value: str):
    name = module(f"def reward(prompt, response): return {value} if response == 'no' else 1")
    one, other = ask(FunctionOracleConfig(function=f"{name}:reward"), [pair(0), Candidate("p", "a", "b")])
    assert (one.preferred, one.margin, one.note) == ("none", None, f"the values are 1.0 and {eval(value)}")
    assert other.preferred == "tie"


def test_what_is_no_number_names_the_function_and_the_pair(module: Callable[[str], str]):
    name = module("def reward(prompt, response): return None")
    with pytest.raises(InputError, match=rf"`{name}:reward` gave a NoneType, not a number, for data\.jsonl:3"):
        ask(FunctionOracleConfig(function=f"{name}:reward"), [pair(3)])


def test_a_function_that_cannot_be_found_is_named(module: Callable[[str], str]):
    name, broken = module("reward = 3"), module("import nothing_of_that_name")
    for function, message in {
        "nothing_of_that_name:reward": "cannot import `nothing_of_that_name`: No module named",
        f"{broken}:reward": f"cannot import `{broken}`: No module named 'nothing_of_that_name'",
        f"{name}:missing": f"`{name}` \\(.*{name}.py\\) has no `missing`",
        f"{name}:reward": f"`{name}` \\(.*{name}.py\\) has no `reward`",
    }.items():
        with pytest.raises(InputError, match=rf"^`acquire\.oracle\.function`: {message}"):
            make_oracle(FunctionOracleConfig(function=function), seed=0, storage="runs")


# A reward model

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def tokenizer_of(tiny_model: Path, template: str | None) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template
    return tokenizer


def small_llama(**config: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    given = {"vocab_size": 258, "num_labels": 1, "initializer_range": 0.3, "max_position_embeddings": 512} | sizes
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**(given | config)))


def small_bert(**config: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    given = {"vocab_size": 258, "num_labels": 1, "initializer_range": 0.3, "max_position_embeddings": 64} | sizes
    return transformers.BertForSequenceClassification(transformers.BertConfig(**(given | config)))


@pytest.fixture
def save(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A reward model's folder with random weights."""

    def saved(build: Callable[..., Any] = small_llama, template: str | None = None, **config: Any) -> Path:
        torch.manual_seed(0)
        folder = tmp_path / "reward"
        shutil.rmtree(folder, ignore_errors=True)
        build(**config).save_pretrained(folder)
        tokenizer_of(tiny_model, template).save_pretrained(folder)
        return folder

    return saved


def reward(folder: Path, text: str) -> float:
    """Of one text alone, by transformers as it is documented."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, 0])


MIXED = [
    Candidate("Why is the sky blue?\n", "It scatters.", "No idea, really; ask somebody who knows about such things."),
    Candidate("a", "b", "c"),
    Candidate("A rather long prompt that goes on and on. " * 3, "Short.", "Shorter still, or perhaps not. " * 2),
    Candidate("", "x", "xy"),
    Candidate("ends", " with the end token</s>", " with two</s></s>"),
]


@pytest.mark.parametrize("batch_tokens", [1, 150, 10**6])
@pytest.mark.parametrize(
    ("build", "config"),
    [
        pytest.param(small_llama, {}, id="no-padding-token"),
        pytest.param(small_llama, {"pad_token_id": 1}, id="padded-with-the-end-token"),
        pytest.param(small_bert, {"pad_token_id": 0, "max_position_embeddings": 512}, id="encoder"),
    ],
)
def test_rewards_are_those_of_each_text_alone_whatever_the_batch(
    save: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    batch_tokens: int,
    build: Callable[..., Any],
    config: dict[str, Any],
):
    folder = save(build, **config)
    monkeypatch.setattr(oracles, "BATCH_TOKENS", batch_tokens)
    answers = ask(RewardModelOracleConfig(path=str(folder)), MIXED)
    for candidate, answer in zip(MIXED, answers, strict=True):
        first, second = (reward(folder, f"{candidate.prompt}{text}") for text in (candidate.first, candidate.second))
        assert answer.preferred == ("first" if first > second else "second")
        assert answer.margin == pytest.approx(abs(first - second), rel=1e-4, abs=1e-5)
        assert answer.by == f"reward_model:{folder}"
    assert min(answer.margin or 0 for answer in answers) > 1e-3


def test_texts_that_use_all_tokens_leave_none_for_padding_and_go_one_by_one(save: Callable[..., Path]):
    folder = save(vocab_size=3)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    candidates = [Candidate("a b ", "c", "a a a"), Candidate("", "b", "c b"), Candidate("c ", "c c c", "a")]
    answers = ask(RewardModelOracleConfig(path=str(folder)), candidates)
    for candidate, answer in zip(candidates, answers, strict=True):
        first, second = (reward(folder, f"{candidate.prompt}{text}") for text in (candidate.first, candidate.second))
        assert answer.margin == pytest.approx(abs(first - second), rel=1e-4, abs=1e-5)


def test_equal_rewards_are_a_tie(save: Callable[..., Path]):
    answers = ask(RewardModelOracleConfig(path=str(save())), [Candidate("p", "same", "same"), *MIXED])
    assert (answers[0].preferred, answers[0].margin, answers[0].note) == ("tie", 0.0, "equal scores")


def test_turns_go_through_the_chat_template_and_else_read_as_text(save: Callable[..., Path]):
    candidate = Candidate((user("Hi"),), (assistant("Hello!"),), (assistant("Go away, please."),))
    folder = save(template=TEMPLATE)
    [answer] = ask(RewardModelOracleConfig(path=str(folder)), [candidate])
    gap = reward(folder, "<user>Hi<assistant>Hello!") - reward(folder, "<user>Hi<assistant>Go away, please.")
    assert answer.margin == pytest.approx(abs(gap), rel=1e-4)
    [plain] = ask(RewardModelOracleConfig(path=str(folder)), [Candidate("Hi ", "Hello!", "Go away, please.")])
    gap = reward(folder, "Hi Hello!") - reward(folder, "Hi Go away, please.")
    assert plain.margin == pytest.approx(abs(gap), rel=1e-4), "text is no turn"
    folder = save(template=None)
    [answer] = ask(RewardModelOracleConfig(path=str(folder)), [candidate])
    gap = reward(folder, "user: Hi\n\nassistant: Hello!") - reward(folder, "user: Hi\n\nassistant: Go away, please.")
    assert answer.margin == pytest.approx(abs(gap), rel=1e-4)


def test_the_beginning_token_stands_once_whoever_writes_it(save: Callable[..., Path]):
    folder = save(template="<s>" + TEMPLATE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    tokenizer.save_pretrained(folder)
    candidates = [Candidate((user("Hi"),), (assistant("Hello!"),), (assistant("No."),)), Candidate("Hi ", "you", "me")]
    turns, text = ask(RewardModelOracleConfig(path=str(folder)), candidates)
    gap = reward(folder, "<user>Hi<assistant>Hello!") - reward(folder, "<user>Hi<assistant>No.")
    assert turns.margin == pytest.approx(abs(gap), rel=1e-4)
    assert text.margin == pytest.approx(abs(reward(folder, "Hi you") - reward(folder, "Hi me")), rel=1e-4)


def test_tools_reach_the_template_and_its_refusal_names_the_pair(save: Callable[..., Path]):
    template = "{% if tools %}{{ raise_exception('no tools: ' + tools[0]['name']) }}{% endif %}" + TEMPLATE
    folder = save(template=template)
    turns = (user("Hi"),)
    given = Candidate(turns, (assistant("a"),), (assistant("b"),), tools=({"name": "look"},), source="f", row=9)
    with pytest.raises(InputError, match=r"^f:9: the chat template of .* refuses this conversation: no tools: look"):
        ask(RewardModelOracleConfig(path=str(folder)), [given])


@pytest.mark.parametrize(
    ("build", "limit"), [(small_llama, {"max_tokens": 20}), (small_bert, {"max_tokens": 2048})], ids=["recipe", "model"]
)
def test_too_long_texts_lose_their_beginning(
    save: Callable[..., Path], build: Callable[..., Any], limit: dict[str, int]
):
    folder = save(build)
    kept = min(limit["max_tokens"], 64)
    one, other = "end one", "the other end"
    [answer] = ask(RewardModelOracleConfig(path=str(folder), **limit), [Candidate("beginning " * 30, one, other)])
    whole = ["beginning " * 30 + text for text in (one, other)]
    gap = reward(folder, whole[0][-kept:]) - reward(folder, whole[1][-kept:])  # a token is a byte
    assert answer.margin == pytest.approx(abs(gap), rel=1e-4)


def without_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def two_outputs(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["id2label"], config["label2id"] = {"0": "a", "1": "b"}, {"a": 0, "b": 1}
    (folder / "config.json").write_text(json.dumps(config))


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_head, r"`acquire\.oracle\.path`: .* is no reward model: it has no weights `score\.weight`"),
        (pickled, "has no safetensors weights"),
        (two_outputs, r"`acquire\.oracle\.path`: .*reward has 2 outputs, not one"),
        (no_tokenizer, "has no tokenizer"),
        (shutil.rmtree, "no model at"),
    ],
)
def test_what_is_no_reward_model_is_refused(save: Callable[..., Path], damage: Callable[[Path], None], message: str):
    folder = save()
    damage(folder)
    with pytest.raises(InputError, match=message):
        ask(RewardModelOracleConfig(path=str(folder)), MIXED)


@given(st.lists(st.integers(0, 90), max_size=40), st.integers(1, 400))
def test_batches_hold_every_row_once_the_longest_first_and_no_more_tokens_than_allowed(lengths: list[int], most: int):
    batches = list(length_batches(lengths, most))
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) == 1 or 2 * len(batch) * lengths[batch[0]] <= most
    for batch in batches[:-1]:
        assert 2 * (len(batch) + 1) * lengths[batch[0]] > most, "no batch could hold more"


# The others are tested where they live; here is only how a recipe makes them.


def test_a_judge_keeps_its_answers_in_the_storage_or_where_the_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    for cache, expected in ((None, tmp_path / "runs" / ".judge"), (str(tmp_path / "own"), tmp_path / "own")):
        judge = make_oracle(LlmOracleConfig(model="m", cache=cache), seed=0, storage=str(tmp_path / "runs"))
        assert isinstance(judge, Judge)
        assert judge._cache == Folder(str(expected))


def test_people_answer_through_their_queue(tmp_path: Path):
    """Labels of long ago are settled, so nothing is waited for."""
    queue = LabelQueue(Folder(str(tmp_path)), 2, 5.0, clock=lambda: 1000.0)
    candidates = [pair(0), pair(1)]
    queue.add(candidates)
    for person, candidate in (("ann", 0), ("bob", 0), ("ann", 1), ("bob", 1)):
        assert queue.take(person) is not None
        queue.label(person, candidates[candidate].candidate_id, "second" if candidate else "first")
    config = PeopleOracleConfig(labellers=2, lease_minutes=5.0)
    answers: list[Answer] = []
    make_oracle(config, seed=0, storage="runs", queue=str(tmp_path)).ask(candidates, answers.append)
    assert [(a.preferred, a.by) for a in answers] == [("first", "ann, bob"), ("second", "ann, bob")]


def test_people_are_waited_for_until_it_should_stop(tmp_path: Path):
    answers: list[Answer] = []
    oracle = make_oracle(
        PeopleOracleConfig(lease_minutes=5.0), seed=0, storage="runs", queue=str(tmp_path), should_stop=lambda: True
    )
    oracle.ask([pair(0)], answers.append)
    assert answers == []
    task = LabelQueue(Folder(str(tmp_path)), 1, 5.0).take("ann")
    assert task is not None
    assert task.candidate.candidate_id == pair(0).candidate_id


def test_the_answer_of_scores_has_no_negative_margin():
    assert by_gap("x", -2.5, "me") == Answer("x", "second", "me", 2.5)
