"""Contamination: each of the three tests by hand, and planted in real data.

Half of a data set's prompts are evaluated, the pairs of the other half trained on. Fifty evaluated prompts that nothing
gives away are then planted in the training pairs, each edited in seven ways. Of these are found:

                 white space  case  changed word  sentence  punctuation  quoted  in a response
    HH-RLHF               50    50            44        50           50      50             50
    TL;DR                 50    50            50        50           50      50             50
    GSM8K                 50    50            50        50           50      50             50
    QA-feedback           50    50            50        50           50      50             50
    PandaLM               50    50            48        50           50      50             50
    TruthfulQA            50    50            23        48           50      48             48

At most one other prompt is found besides: precision 0.98 or more. A short question with another word is another
question: that is where TruthfulQA and the one-line openings of HH-RLHF lose. Without any plant, 60 of 929 prompts of
HH-RLHF and 6 of 319 of TruthfulQA are found (conversations from one template; Americans for Brits), and none of the
others.
"""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_ray.data.contamination import BOILERPLATE, Match, matches
from dpo_ray.data.duplicates import TextPair
from tests.unit.planted import EDITS, WORDS, real

PADDING = WORDS[:40]
QUESTION = "Why do the matadors of old Spain always wave their red capes at the bulls?"


def found(evaluated: str, *trained: TextPair) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(match.kind, match.where, match.trained) for match in matches([evaluated], list(trained))]


def test_the_same_words_are_the_same_prompt():
    told = TextPair("why do the matadors of old Spain always wave, their red capes\nat the bulls", "Yes.", "No.")
    assert found(QUESTION, told, TextPair("Other?", "Yes.", "No."), told) == [("same", "prompt", (0, 2))]
    assert found("Hi!", TextPair("hi", "Yes.", "No.")) == [("same", "prompt", (0,))]


def test_a_small_edit_is_near_with_its_jaccard_index():
    # 69 distinct pieces of 5 characters; `blue` for `red` takes 7 of them away and brings 8: 62 / 77.
    (match,) = matches([QUESTION], [TextPair(QUESTION.replace("red", "blue"), "Yes.", "No.")])
    assert match == Match(0, (0,), "prompt", "near", pytest.approx(62 / 77))


def test_a_prompt_inside_a_longer_text_is_contained_with_its_share():
    words = [f"w{i}" for i in range(20)]  # 13 n-grams of 8 words
    inside = TextPair(" ".join(PADDING + words + PADDING), "Yes.", "No.")
    half = TextPair(" ".join(PADDING + words[:14] + PADDING), "Yes.", "No.")  # 7 of them
    less = TextPair(" ".join(PADDING + words[:13] + PADDING), "Yes.", "No.")  # 6 of them
    told = matches([" ".join(words)], [inside, half, less])
    assert told == [Match(0, (0,), "prompt", "contained", 1.0), Match(0, (1,), "prompt", "contained", 7 / 13)]


def test_a_response_that_quotes_a_prompt_gives_it_away():
    pair = TextPair(
        "What was asked?", "Nothing.", f"They asked: {QUESTION.upper()} I forgot the rest of what they said."
    )
    assert found(QUESTION, pair) == [("contained", "response", (0,))]


def test_a_short_prompt_is_looked_for_as_a_whole_and_a_very_short_one_not_inside_texts():
    longer = TextPair("My friend would like to know: what is the capital of France? I forgot.", "Yes.", "No.")
    assert found("What is the capital of France?", longer) == [("contained", "prompt", (0,))]
    assert found("What is the capital of Peru?", longer) == []
    assert found("Capital of France?", longer) == []


def test_prompts_without_words_match_nothing():
    assert found("", TextPair("", "Yes.", "No.")) == []
    assert found(" ?! ", TextPair("...", "Yes.", "No.")) == []


def test_a_script_without_blanks_is_found_when_the_same_or_near():
    prompt = (
        "\u65e5\u672c\u306e\u9996\u90fd\u306f\u3069\u3053\u3067\u3059\u304b\u6559\u3048\u3066\u304f\u3060\u3055\u3044"
    )
    assert found(prompt, TextPair(f"{prompt}\u3002", "Yes.", "No.")) == [("same", "prompt", (0,))]
    assert found(prompt, TextPair(f"{prompt}\u306d\u306d", "Yes.", "No.")) == [("near", "prompt", (0,))]


def test_a_template_of_many_training_prompts_gives_nothing_away():
    rng = random.Random(0)
    template = " ".join(rng.choices(WORDS, k=60))
    prompts = [f"{template} {' '.join(rng.choices(WORDS, k=30))}" for _ in range(BOILERPLATE + 2)]
    trained = [TextPair(prompt, "Yes.", "No.") for prompt in prompts[1:]]
    assert matches(prompts[:1], trained) == []
    few = matches(prompts[:1], trained[:BOILERPLATE])
    assert {match.kind for match in few} == {"contained"}, "of fewer prompts it is not known to be a template"


def test_the_stricter_kind_is_told_once():
    assert [match.kind for match in matches([QUESTION], [TextPair(QUESTION, "Yes.", "No.")])] == ["same"]


# Planted in real data

Plant = Callable[[random.Random, str], TextPair]


def as_prompt(change: Callable[[random.Random, str], str]) -> Plant:
    return lambda rng, prompt: TextPair(change(rng, prompt), "Yes.", "No.")


PLANTS: dict[str, Plant] = {
    **{name: as_prompt(change) for name, change in EDITS.items()},
    "punctuation": as_prompt(lambda rng, prompt: "".join(c for c in prompt if c not in ".,?!:;")),
    "quoted": as_prompt(lambda rng, prompt: f"A friend asked me this and I had no idea. {prompt} Thank you very much!"),
    "response": lambda rng, prompt: TextPair("What did he say?", f"He said: {prompt} And left.", "No."),
}

# Data set -> prompts found without a plant; of 50 planted ones, how many with a changed word, and with any other edit.
FOUND = {
    "hh_rlhf/helpful-base.test": (60, 42, 50),
    "tldr_judged/pairs": (0, 49, 50),
    "gsm8k/pairs": (0, 49, 50),
    "qa_feedback/pairs": (0, 49, 50),
    "pandalm/annotations": (0, 46, 50),
    "truthfulqa/pairs": (6, 20, 48),
}


@pytest.mark.parametrize("name", FOUND)
def test_planted_prompts_are_found_and_others_are_not(shared: Path, name: str):
    natural, of_changed, of_others = FOUND[name]
    pairs, rng = real(shared, name), random.Random(0)
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    rng.shuffle(prompts)
    evaluated = prompts[: len(prompts) // 2]
    trained = [pair for pair in pairs if pair.prompt not in set(evaluated)]
    before = {match.evaluated for match in matches(evaluated, trained)}
    assert len(before) == natural
    chosen = rng.sample([i for i in range(len(evaluated)) if i not in before], 50)
    planted = [(edit, i, plant(rng, evaluated[i])) for edit, plant in PLANTS.items() for i in chosen]
    found = matches(evaluated, [*trained, *(pair for _, _, pair in planted)])
    links = {(match.evaluated, place - len(trained)) for match in found for place in match.trained}
    right = Counter(edit for n, (edit, i, _) in enumerate(planted) if (i, n) in links)
    assert right["word"] >= of_changed
    assert min(right[edit] for edit in PLANTS if edit != "word") >= of_others
    told = {match.evaluated for match in found} - before
    assert told >= set(chosen)
    assert len(told - set(chosen)) <= 1
