"""Judges: both orders, what a verdict is worth, win rates of it, and judges against people."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from dpo_ray.config import FunctionOracleConfig, LlmOracleConfig
from dpo_ray.errors import InputError
from dpo_ray.evaluate.judging import Verdict, agreement_with_people, ask, judge_habits, swapped, win_rate_tree
from dpo_ray.pairs import Candidate


def candidate(number: int, first: str, second: str, gold_gap: float | None = None) -> Candidate:
    return Candidate(f"Question {number}?", first, second, gold_gap=gold_gap)


@pytest.fixture
def taste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FunctionOracleConfig:
    (tmp_path / "taste_of_judging.py").write_text("def worth(prompt, response):\n    return response.count('good')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return FunctionOracleConfig(function="taste_of_judging:worth")


class Judge(BaseHTTPRequestHandler):
    """Answers by a rule of the two texts that the question shows."""

    rule = staticmethod(lambda a, b: "A")
    asked = 0

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        a, b = (question.partition(f"<{name}>\n")[2].partition(f"\n</{name}>")[0] for name in ("answer_a", "answer_b"))
        type(self).asked += 1
        content = json.dumps(
            {
                "choices": [{"message": {"content": f"Thought.\n{type(self).rule(a, b)}"}}],
                "usage": {"prompt_tokens": 10, "completion_tokens": 2},
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[LlmOracleConfig]:
    Judge.asked = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield LlmOracleConfig(url=f"http://127.0.0.1:{http.server_port}/v1", model="j", api_key_env=None)
        http.shutdown()


def test_a_function_is_asked_once_and_equal_answers_never(taste: FunctionOracleConfig, tmp_path: Path):
    candidates = [candidate(1, "good good", "good"), candidate(2, "bad", "good"), candidate(3, "same", " same ")]
    found = ask(taste, [*candidates, candidate(4, "x", "y")], seed=0, storage=str(tmp_path))
    assert [verdict.score for verdict in found] == [1.0, 0.0, 0.5, 0.5]
    assert [verdict.orders for verdict in found] == [("first",), ("second",), (), ("tie",)]
    assert found[2].note == "equal answers"


def test_a_language_model_is_asked_in_both_orders(server: LlmOracleConfig, tmp_path: Path):
    Judge.rule = staticmethod(lambda a, b: "A" if len(a) > len(b) else "B" if len(b) > len(a) else "C")
    candidates = [candidate(1, "longer", "short"), candidate(2, "s", "longer"), candidate(3, "abc", "xyz")]
    found = ask(server, candidates, seed=0, storage=str(tmp_path))
    assert [v.score for v in found] == [1.0, 0.0, 0.5]
    assert [v.orders for v in found] == [("first", "first"), ("second", "second"), ("tie", "tie")]
    assert Judge.asked == 6
    assert found[0].cost == {"requests": 2, "prompt_tokens": 20, "answer_tokens": 4}
    ask(server, candidates, seed=0, storage=str(tmp_path))
    assert Judge.asked == 6  # from the cache


def test_a_judge_that_likes_the_first_place_decides_nothing_and_is_told(server: LlmOracleConfig, tmp_path: Path):
    Judge.rule = staticmethod(lambda a, b: "A")
    candidates = [candidate(i, f"one {i}", f"two {i}") for i in range(20)]
    verdicts = ask(server, candidates, seed=0, storage=str(tmp_path))
    assert {v.score for v in verdicts} == {0.5}
    habits = judge_habits(verdicts)
    assert habits["first_position"]["value"] == 1.0
    assert habits["first_position"]["low"] > 0.8
    assert habits["self_consistency"]["value"] == 0.0


def test_a_judge_by_content_has_no_habit(server: LlmOracleConfig, tmp_path: Path):
    Judge.rule = staticmethod(lambda a, b: "A" if a < b else "B")
    verdicts = ask(server, [candidate(i, f"a{i}", f"b{i}") for i in range(10)], seed=0, storage=str(tmp_path))
    assert judge_habits(verdicts)["first_position"]["value"] == 0.5
    assert judge_habits(verdicts)["self_consistency"]["value"] == 1.0


def test_an_answer_in_one_order_only_is_missing(server: LlmOracleConfig, tmp_path: Path):
    Judge.rule = staticmethod(lambda a, b: "A" if a == "x" else "no idea")
    judge = server.model_copy(update={"max_retries": 0})
    (verdict,) = ask(judge, [candidate(1, "x", "y")], seed=0, storage=str(tmp_path))
    assert verdict.score is None
    with pytest.raises(InputError, match="no usable answer"):
        win_rate_tree([verdict], [candidate(1, "x", "y")])


def test_errors_name_the_key_of_the_evaluation(tmp_path: Path):
    judge = FunctionOracleConfig(function="no_such_module_here:f")
    with pytest.raises(InputError, match=r"evaluate\.judge\.function.*no_such_module_here"):
        ask(judge, [candidate(1, "a", "b")], seed=0, storage=str(tmp_path))


def test_the_win_rate_of_verdicts():
    verdicts = [Verdict(score, (), "j", None, {}) for score in (1.0, 1.0, 0.0, 0.5, None)]
    found = win_rate_tree(verdicts, [candidate(i, "one", "two") for i in range(5)])
    assert (found["wins"], found["ties"], found["losses"], found["missing"]) == (2, 1, 1, 1)
    assert found["value"] == pytest.approx(2.5 / 4)
    assert found["low"] < found["value"] < found["high"]
    assert found["length_controlled"] is None  # too few prompts
    assert found["first_position"] is None


def test_length_control_takes_away_what_length_gave():
    """A judge that only sees lengths: the long model wins nearly always, length-controlled about half."""
    rows = []
    for i in range(200):
        longer = 5 + i % 40 if i % 20 else -(1 + i % 7)  # longer in 95 % of prompts
        rows.append((candidate(i, "x" * (50 + longer), "x" * 50), float(longer > 0)))
    found = win_rate_tree([Verdict(score, (), "j", None, {}) for _, score in rows], [c for c, _ in rows])
    assert found["value"] > 0.9
    assert found["length_controlled"]["value"] < found["value"] - 0.2


def test_agreement_with_people_by_hand():
    """Four pairs: right, right, wrong, undecided. Decided: 2 of 3; people 'first' 2 of 3, judge 1 of 3."""
    people = [1.0, -1.0, 1.0, 1.0]
    said = [1.0, 0.0, 0.0, 0.5]
    candidates = [candidate(i, "long text", "short", gap) for i, gap in enumerate(people)]
    found = agreement_with_people([Verdict(score, (), "j", None, {}) for score in said], candidates)
    assert found["agreement"]["value"] == pytest.approx(2 / 3)
    assert found["undecided"] == 1
    assert found["with_ties"]["value"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    chance = (2 / 3) * (1 / 3) + (1 / 3) * (2 / 3)
    assert found["kappa"] == pytest.approx((2 / 3 - chance) / (1 - chance))
    assert found["longer_is_better"]["people"]["value"] == pytest.approx(3 / 4)
    assert found["longer_is_better"]["judge"]["value"] == pytest.approx(1 / 3)


def test_swapping_turns_the_responses_round():
    one = candidate(1, "a", "b")
    assert (swapped(one).first, swapped(one).second) == ("b", "a")
    assert swapped(one).candidate_id != one.candidate_id
