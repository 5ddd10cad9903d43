"""Each format by a row worked by hand; what is no pair is a short reason; any row at all is one or the other."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.config import SourceConfig
from dpo_ray.data.formats import PARSERS, RowError, recognise, to_pairs, transcript
from dpo_ray.data.sources import Row
from dpo_ray.data.turns import from_transcript, judge_texts
from dpo_ray.pairs import PreferencePair


def parse(value: dict[str, Any], **options: Any) -> list[PreferencePair]:
    return to_pairs(Row("file", 7, value), SourceConfig.model_validate({"path": "file", **options})).pairs


def parse_one(value: dict[str, Any], **options: Any) -> tuple[Any, Any, Any]:
    (pair,) = parse(value, **options)
    return pair.prompt, pair.chosen, pair.rejected


def ties(value: dict[str, Any], **options: Any) -> int:
    parsed = to_pairs(Row("file", 7, value), SourceConfig.model_validate({"path": "file", **options}))
    assert not parsed.pairs
    return parsed.ties


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


TREE = {
    "text": "hello",
    "role": "prompter",
    "replies": [
        {"text": "worst", "role": "assistant", "rank": 2},
        {"text": "gone", "role": "assistant", "rank": 0, "deleted": True},
        {"text": "unranked", "role": "assistant", "rank": None},
        {
            "text": "best",
            "role": "assistant",
            "rank": 0,
            "replies": [
                {
                    "text": "more",
                    "role": "prompter",
                    "replies": [
                        {"text": "B", "role": "assistant", "rank": 1},
                        {"text": "A", "role": "assistant", "rank": 0},
                    ],
                }
            ],
        },
        {"text": "middle", "role": "assistant", "rank": 1},
    ],
}

SHARED = [user("q"), assistant("a"), user("r")]

# Format, row, and its one pair.
ROWS = [
    ("explicit", {"prompt": "p", "chosen": " c", "rejected": "r\n"}, ("p", " c", "r\n")),
    ("explicit", {"question": "p", "chosen": "c", "rejected": "r"}, ("p", "c", "r")),
    ("explicit", {"instruction": "p", "input": "i", "chosen": "c", "rejected": "r"}, ("p\ni", "c", "r")),
    ("explicit", {"instruction": "p", "input": "", "chosen": "c", "rejected": "r"}, ("p", "c", "r")),
    (
        "explicit",
        {"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant("r")]},
        ((user("p"),), (assistant("c"),), (assistant("r"),)),
    ),
    (
        "explicit",
        {"prompt": [user("p")], "chosen": "c", "rejected": assistant("r")},
        ((user("p"),), (assistant("c"),), (assistant("r"),)),
    ),
    (  # Tulu, UltraFeedback: the prompt column is only the first user turn; a `messages` column repeats the chosen one
        "explicit",
        {
            "prompt": "q",
            "chosen": [*SHARED, assistant("c")],
            "rejected": [*SHARED, assistant("r")],
            "messages": [*SHARED, assistant("c")],
        },
        (tuple(SHARED), (assistant("c"),), (assistant("r"),)),
    ),
    (  # Orca: a `system` column makes turns, also where it is empty
        "explicit",
        {"system": "s", "question": "p", "chosen": "c", "rejected": "r"},
        ((system("s"), user("p")), (assistant("c"),), (assistant("r"),)),
    ),
    (
        "explicit",
        {"system": "", "question": "p", "chosen": "c", "rejected": "r"},
        ((user("p"),), (assistant("c"),), (assistant("r"),)),
    ),
    (  # a system turn of the prompt is not lost where the responses are whole conversations
        "explicit",
        {
            "prompt": [system("s"), user("q")],
            "chosen": [user("q"), assistant("c")],
            "rejected": [user("q"), assistant("r")],
        },
        ((system("s"), user("q")), (assistant("c"),), (assistant("r"),)),
    ),
    (  # tool calls and tool results in the prompt
        "explicit",
        {
            "prompt": [
                user("p"),
                {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}], "weight": 0},
                {"role": "tool", "content": [{"type": "text", "text": "4"}, "2"], "tool_call_id": "1", "name": None},
            ],
            "chosen": "c",
            "rejected": "r",
        },
        (
            (
                user("p"),
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
                {"role": "tool", "content": "42", "tool_call_id": "1"},
            ),
            (assistant("c"),),
            (assistant("r"),),
        ),
    ),
    (  # a transcript in the prompt column
        "explicit",
        {"prompt": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:", "chosen": " c", "rejected": "d"},
        (tuple(SHARED), (assistant("c"),), (assistant("d"),)),
    ),
    (
        "implicit",
        {"chosen": [*SHARED, assistant("c")], "rejected": [*SHARED, assistant("r")]},
        (tuple(SHARED), (assistant("c"),), (assistant("r"),)),
    ),
    ("implicit", {"chosen": "The sky is blue.", "rejected": "The sky is green."}, ("The sky is", " blue.", " green.")),
    (
        "hh_rlhf",
        {"chosen": "\n\nHuman: q\n\nAssistant: c", "rejected": "\n\nHuman: q\n\nAssistant: r"},
        ((user("q"),), (assistant("c"),), (assistant("r"),)),
    ),
    (  # parted before the last assistant turn: responses of several turns
        "hh_rlhf",
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a\n\nAssistant: c",
            "rejected": "\n\nHuman: q\n\nAssistant: r",
        },
        ((user("q"),), (assistant("a"), assistant("c")), (assistant("r"),)),
    ),
    (  # parted in a user turn: back to the last place where both go on as assistant
        "hh_rlhf",
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: x\n\nAssistant: c",
            "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: y\n\nAssistant: r",
        },
        (
            (user("q"),),
            (assistant("a"), user("x"), assistant("c")),
            (assistant("a"), user("y"), assistant("r")),
        ),
    ),
    (  # one transcript is the beginning of the other; an empty turn; a speaker twice
        "hh_rlhf",
        {
            "chosen": "\n\nHuman: \n\nHuman: q\n\nAssistant: a",
            "rejected": "\n\nHuman: \n\nHuman: q\n\nAssistant: a\n\nAssistant: r",
        },
        ((user(""), user("q")), (assistant("a"),), (assistant("a"), assistant("r"))),
    ),
    (
        "sharegpt",
        {
            "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "c"},
            "rejected": {"from": "gpt", "value": "r"},
        },
        ((system("s"), user("q")), (assistant("c"),), (assistant("r"),)),
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
            ],
            "chosen": {"from": "gpt", "value": "c"},
            "rejected": {"from": "gpt", "value": "r"},
        },
        (
            (
                user("q"),
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
                },
                {"role": "tool", "content": "2"},
            ),
            (assistant("c"),),
            (assistant("r"),),
        ),
    ),
    ("ranked", {"prompt": "p", "responses": ["1", "2", "3"]}, ("p", "1", "3")),
    ("ranked", {"prompt": "p", "responses": ["2", "1", "3"], "scores": [5, 9, -1]}, ("p", "1", "3")),
    (
        "ranked",
        {
            "instruction": "p",
            "completions": [
                {"response": r, "overall_score": s} for r, s in (("2", 5.5), ("3", 1), ("1", 9), ("-", None))
            ],
        },
        ("p", "1", "3"),
    ),
    ("ranked", {"prompt": "p", "answers": [{"answer": r, "rank": r} for r in ("2", "3", "1")]}, ("p", "1", "3")),
    ("labelled", {"input": "p", "output_1": "a", "output_2": "b", "label": 2}, ("p", "b", "a")),
    ("labelled", {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "model_a"}, ("p", "a", "b")),
    ("labelled", {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "B"}, ("p", "b", "a")),
    ("labelled", {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 0}, ("p", "a", "b")),
    ("labelled", {"prompt": "p", "answer1": "a", "answer2": "b", "preferred": "answer2"}, ("p", "b", "a")),
    ("labelled", {"prompt": "p", "output_1": "a", "output_2": "b", "label": 1.0}, ("p", "a", "b")),
    (
        "labelled",
        {
            "instruction": "p",
            "input": "i",
            "response1": True,
            "response2": "b",
            "annotator1": 1,
            "annotator2": 0,
            "annotator3": 1,
        },
        ("p\ni", "True", "b"),
    ),
    (
        "labelled",
        {
            "conversation_a": [user("q"), assistant("a")],
            "conversation_b": [user("q"), assistant("b")],
            "winner": "model_b",
        },
        ((user("q"),), (assistant("b"),), (assistant("a"),)),
    ),
    ("stack_exchange", {"question": "q", "response_j": "j", "response_k": "k"}, ("q", "j", "k")),
    ("question_answers", {"question": "q", "best_answer": "b", "incorrect_answers": ["x"]}, ("q", "b", "x")),
    (
        "comparisons",
        {"question": "q", "passages": [["T", "T\n\nOne.", "Two."]], "predictions": ["a", "b"], "preference": [2]},
        ("T: One. Two.\n\nQuestion: q\nAnswer:", "b", "a"),
    ),
    (
        "comparisons",
        {"question": "q", "passages": [], "predictions": ["a", "b"], "preference": [1]},
        ("Question: q\nAnswer:", "a", "b"),
    ),
    (
        "graded",
        {"question": "q", "m": {"is_correct": False, "solution": "w"}, "n": {"is_correct": True, "solution": "r"}},
        ("q", "r", "w"),
    ),
    (
        "graded",
        {
            "question": "q",
            "ground_truth": "human",
            "m": {"is_correct": False, "solution": "v"},
            "n": {"is_correct": False, "solution": "w"},
        },
        ("q", "human", "w"),
    ),
]


@pytest.mark.parametrize(("name", "value", "expected"), ROWS, ids=lambda item: item if isinstance(item, str) else "")
def test_a_row_is_recognised_and_gives_its_pair(name: str, value: dict[str, Any], expected: tuple[Any, Any, Any]):
    assert recognise(value) == name
    assert parse_one(value) == expected
    assert parse_one(value, format=name) == expected


def test_every_format_has_a_row_above_or_below():
    assert {name for name, *_ in ROWS} | {"message_tree"} == set(PARSERS)


def test_a_message_tree_ranks_replies_under_their_conversation():
    value = {"message_tree_id": "t", "prompt": TREE}
    assert recognise(value) == "message_tree"
    pairs = sorted(((pair.prompt, pair.chosen, pair.rejected) for pair in parse(value)), key=lambda pair: len(pair[0]))
    assert pairs == [
        ((user("hello"),), (assistant("best"),), (assistant("worst"),)),
        ((user("hello"), assistant("best"), user("more")), (assistant("A"),), (assistant("B"),)),
    ]
    assert {pair.group_id for pair in parse(value)} == {parse(value)[0].group_id}
    assert ties({"prompt": {**TREE, "replies": TREE["replies"][:2]}}) == 1  # one ranked reply is no preference


def test_a_pair_carries_place_scores_tools_and_group():
    tools = [{"type": "function", "function": {"name": "f"}}]
    value = {"prompt": "p", "chosen": "c", "rejected": "r", "score_chosen": "9", "score_rejected": 2, "doc": 4}
    (pair,) = parse(value | {"tools": json.dumps(tools)}, group_by="doc")
    assert (pair.place, pair.chosen_score, pair.rejected_score, pair.group) == ("file:7", 9.0, 2.0, "4")
    assert pair.tools == tuple(tools)
    assert parse(value | {"tools": tools})[0].pair_id == pair.pair_id
    assert parse(value | {"tools": ""})[0].tools is None
    assert not pair.is_transcript


def test_a_pair_carries_its_weight_and_its_margin_or_the_gap_of_its_scores():
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    (pair,) = parse(row)
    assert (pair.weight, pair.margin) == (None, None)
    (pair,) = parse(row | {"weight": 2, "margin": 0.5, "chosen_score": 9, "rejected_score": 1})
    assert (pair.weight, pair.margin) == (2.0, 0.5)
    (pair,) = parse(row | {"chosen_score": 9, "rejected_score": 1})
    assert pair.margin == 8.0
    for other in ("heavy", -1, float("nan"), True, [1]):
        (pair,) = parse(row | {"weight": other})
        assert pair.weight is None
    assert pair.pair_id == parse(row)[0].pair_id, "what a pair weighs is not what it is"


def test_which_pairs_a_ranked_list_gives():
    value = {"prompt": "p", "responses": [{"text": t, "score": s} for t, s in (("c", 1), ("a", 9), ("b", 5), ("d", 0))]}

    def picked(pairing: str) -> list[str]:
        return [f"{pair.chosen}{pair.rejected}" for pair in parse(value, pairing=pairing)]

    assert picked("best_vs_worst") == ["ad"]
    assert picked("best_vs_rest") == ["ab", "ac", "ad"]
    assert picked("all") == ["ab", "ac", "ad", "bc", "bd", "cd"]
    (pair,) = parse(value)
    assert (pair.chosen_score, pair.rejected_score) == (9.0, 0.0)


def test_small_gaps_equal_scores_and_divided_votes_are_ties():
    scored = {"prompt": "p", "chosen": "c", "rejected": "r", "chosen_score": 5, "rejected_score": 4}
    assert len(parse(scored)) == len(parse(scored, min_margin=1)) == 1
    assert ties(scored, min_margin=1.5) == 1
    assert ties(scored | {"rejected_score": 5}) == 1
    ranked = {
        "prompt": "p",
        "responses": [{"text": "a", "rating": 3}, {"text": "b", "rating": 3}, {"text": "c", "rating": 1}],
    }
    parsed = to_pairs(Row("file", 1, ranked), SourceConfig(path="file", pairing="all"))
    assert (len(parsed.pairs), parsed.ties) == (2, 1)
    assert ties(ranked, pairing="all", min_margin=9) == 3
    assert ties({"prompt": "p", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 1}]}) == 1
    labelled = {"prompt": "p", "response1": "a", "response2": "b"}
    for votes in ([0, 0, 1], [1, 2, 0], [1, 2], ["tie"], ["equal"]):
        assert ties(labelled | {f"annotator{i}": vote for i, vote in enumerate(votes)}) == 1
    assert ties(labelled | {"winner": "tie (bothbad)"}) == 1
    compared = {"question": "q", "predictions": ["a", "b", "c"], "preference": [0, 1, 0]}
    parsed = to_pairs(Row("file", 1, compared), SourceConfig(path="file"))
    assert ([(p.chosen, p.rejected) for p in parsed.pairs], parsed.ties) == ([("a", "c")], 2)
    assert ties({"question": "q", "m": {"is_correct": True, "solution": "r"}}) == 1


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"prompt": "p", "chosen": "c"}, "no `rejected`"),
        ({"prompt": "p", "chosen": "c", "rejected": None}, "no `rejected`"),
        ({"messages": [user("q"), assistant("a")], "label": True}, "unpaired data"),
        ({"prompt": "p", "completion": "a", "label": False}, "unpaired data"),
        ({"text": "t", "id": 1}, "its columns are text, id"),
        ({}, "its columns are none"),
        ({"prompt": "p", "chosen": 3, "rejected": "r"}, "`chosen` is int"),
        ({"prompt": "p", "chosen": "c", "rejected": []}, "`rejected` is an empty list"),
        ({"prompt": "p", "chosen": [{"role": "narrator", "content": "c"}], "rejected": "r"}, "unknown role `narrator`"),
        ({"prompt": "p", "chosen": [{"role": "assistant"}], "rejected": "r"}, "the content of a turn is missing"),
        ({"prompt": "p", "chosen": ["c"], "rejected": "r"}, "a turn is str"),
        (
            {"prompt": "p", "chosen": [{"role": "assistant", "content": [{"type": "image"}]}], "rejected": "r"},
            "a part that is not text",
        ),
        ({"chosen": [user("q"), assistant("c")], "rejected": [user("x"), assistant("r")]}, "share no prompt"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: c", "rejected": "\n\nHuman: x\n\nAssistant: r"}, "share no prompt"),
        ({"chosen": assistant("c"), "rejected": assistant("r")}, "share no prompt"),
        (
            {"chosen": [*SHARED, assistant("c")], "rejected": [*SHARED[:2], assistant("r"), user("x")]},
            "does not end in",
        ),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "score_chosen": 1, "score_rejected": 2}, "1 is below"),
        (
            {"prompt": "p", "chosen": "c", "rejected": "r", "score_chosen": "N/A", "score_rejected": 2},
            "'N/A' is not a score",
        ),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "tools": "{"}, "`tools` is not JSON"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "tools": '{"a": 1}'}, "`tools` is not a list"),
        ({"prompt": "p", "chosen": "c", "rejected": "\ud800"}, "cannot be written as UTF-8"),
        ({"responses": ["a", "b"]}, "no `prompt`"),
        ({"prompt": "p", "responses": ["a"]}, "fewer than two"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "2 responses, but 1 scores"),
        ({"prompt": "p", "responses": [{"score": 1}, {"score": 2}]}, "no `response`"),
        ({"prompt": "p", "output_1": "a", "output_2": "b"}, "no `label`"),
        ({"prompt": "p", "output_1": "a", "output_2": "b", "label": 3}, "the label 3 names neither"),
        ({"question": "q", "predictions": ["a", "b", "c"], "preference": [1]}, "3 comparisons, but 1 labels"),
        ({"question": "q", "best_answer": "b", "incorrect_answers": []}, "`incorrect_answers` is no list"),
    ],
)
def test_a_row_without_a_pair_says_why(value: dict[str, Any], reason: str):
    with pytest.raises(RowError, match=reason) as raised:
        parse(value)
    assert "\n" not in str(raised.value)


def test_an_unreadable_row_and_a_missing_group_are_row_errors():
    with pytest.raises(RowError, match="not JSON"):
        to_pairs(Row("file", 1, None, "not JSON"), SourceConfig(path="file"))
    with pytest.raises(RowError, match="no `doc`"):
        parse({"prompt": "p", "chosen": "c", "rejected": "r", "doc": None}, group_by="doc")


def test_a_format_that_is_given_is_not_guessed():
    value = {"prompt": "p", "chosen": "c", "rejected": "r", "responses": ["1", "2"]}
    assert parse_one(value, format="ranked") == ("p", "1", "2")
    for name in PARSERS:
        with pytest.raises(RowError):
            parse({"text": "t"}, format=name)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Q: 1 A: yes", "Q: 1 A: no", ("Q: 1 A:", " yes", " no")),
        ("Q\nyes", "Q\nno", ("Q\n", "yes", "no")),
        ("the cat", "the car", ("the", " cat", " car")),  # not within a word
        ("a yes sir", "a yesterday", ("a", " yes sir", " yesterday")),
        ("A:yes", "A:no", ("A:", "yes", "no")),
        ("say yes", "say yes, sir", ("say", " yes", " yes, sir")),  # no response is left empty
        ("left", "right", ("", "left", "right")),
        ("", "right", ("", "", "right")),
    ],
)
def test_the_prompt_of_two_texts_is_cut_between_words(chosen: str, rejected: str, expected: tuple[str, str, str]):
    assert judge_texts(chosen, rejected)[:3] == expected


@given(st.text("ab \n."), st.text("ab \n."), st.text("ab \n."))
def test_the_split_of_two_texts_loses_nothing(shared: str, left: str, right: str):
    prompt, chosen, rejected, *_ = judge_texts(shared + left, shared + right)
    assert (prompt + chosen, prompt + rejected) == (shared + left, shared + right)
    assert not (chosen == "" and left.strip())


CONTENT = st.text("ab :\n", max_size=8).map(str.strip).filter(lambda text: "\n\n" not in text)


@given(
    st.lists(
        st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "assistant"]), CONTENT),
        min_size=1,
    )
)
def test_a_transcript_comes_back_exactly(turns: list[dict[str, str]]):
    text = transcript(turns)
    assert from_transcript(text) == tuple(turns)
    assert transcript(from_transcript(text)) == text


def test_a_transcript_is_marked_and_written_back():
    chosen, rejected = ("\n\nHuman: q\n\nAssistant: a: Human: b\n\nHuman: r\n\nAssistant: " + end for end in ("c", "d"))
    (pair,) = parse({"chosen": chosen, "rejected": rejected})
    assert pair.is_transcript
    assert transcript((*pair.prompt, *pair.chosen)) == chosen  # type: ignore[misc]
    assert transcript((*pair.prompt, *pair.rejected)) == rejected  # type: ignore[misc]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.sampled_from(["", "a", "1", "\n\nHuman: a\n\nAssistant:"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "from", "content", "text", "value", "score", "rank", "replies"]), inner
        )
        | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": inner})
        | st.fixed_dictionaries({"is_correct": st.booleans(), "solution": inner})
    ),
    max_leaves=6,
)
COLUMNS = sorted({key for _, value, _ in ROWS for key in value} | {"tools", "label", "annotator1", "score_chosen"})


@given(st.dictionaries(st.sampled_from(COLUMNS), JSON, max_size=6), st.sampled_from(["auto", *PARSERS]))
def test_any_row_gives_pairs_or_ties_or_a_row_error(value: dict[str, Any], name: str):
    try:
        parsed = to_pairs(Row("file", 1, value), SourceConfig.model_validate({"path": "file", "format": name}))
    except RowError:
        return
    assert parsed.pairs or parsed.ties
    for pair in parsed.pairs:
        kinds = {type(text) for text in (pair.prompt, pair.chosen, pair.rejected)}
        assert kinds in ({str}, {tuple})
        if isinstance(pair.chosen, tuple):
            assert pair.chosen[0]["role"] == pair.chosen[-1]["role"] == pair.rejected[0]["role"] == "assistant"
