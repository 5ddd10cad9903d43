"""`dpo-ray data`: every count against a small file whose faults are known, the page, and a user's mistakes."""

import html
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from dpo_ray.cli import app
from dpo_ray.config import DataConfig, SourceConfig
from dpo_ray.data.language import language_of
from dpo_ray.data.quality import TEXT_SHOWN, Quality, cut, inspect
from dpo_ray.metrics import wilson_interval
from tests.unit.planted import WORDS

Row = dict[str, Any]
Run = Callable[..., Result]


def plain(number: int) -> Row:
    """A pair like no other; the longer response is chosen in three of four."""
    words = WORDS[number * 12 : number * 12 + 12]
    long, short = " ".join(words[4:10]), " ".join(words[10:])
    chosen, rejected = (short, long) if number % 4 == 0 else (long, short)
    return {"prompt": f"{' '.join(words[:4])}?", "chosen": chosen, "rejected": rejected}


PLAIN = [plain(number) for number in range(20)]


def write(file: Path, rows: list[Row]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def swapped(row: Row) -> Row:
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


def upper(row: Row) -> Row:
    return {name: value.upper() for name, value in row.items()}


def looked_into(tmp_path: Path, rows: list[Row], held_out: int = 0, **data: Any) -> Quality:
    path = write(tmp_path / "pairs.jsonl", rows)
    return inspect(DataConfig.model_validate({"sources": [{"path": path}], "eval": {"num_pairs": held_out}} | data))


def test_duplicates_and_contradictions_are_counted_and_named(tmp_path: Path):
    near = PLAIN[3] | {"chosen": f"{PLAIN[3]['chosen']}!"}
    found = looked_into(tmp_path, [*PLAIN, PLAIN[0], upper(PLAIN[1]), swapped(PLAIN[2]), swapped(near)])
    file = tmp_path / "pairs.jsonl"
    told = [(row["first"], row["second"], row["kind"], row["contradicts"]) for row in found.duplicates]
    assert told == [
        (f"{file}:1", f"{file}:21", "same", False),
        (f"{file}:2", f"{file}:22", "same", False),
        (f"{file}:3", f"{file}:23", "same", True),
        (f"{file}:4", f"{file}:24", "near", True),
    ]
    twice, opposite = found.tree["duplicates"], found.tree["contradictions"]
    assert (twice["same"], twice["near"], twice["cross_split"]) == (2, 0, 0)
    assert (opposite["same"], opposite["near"]) == (1, 1)
    assert opposite["examples"][0]["second_chosen"] in (PLAIN[2]["rejected"], PLAIN[3]["rejected"])
    assert found.tree["pairs"]["dropped"] == {"duplicate": 1}, "training drops the equal one alone"


def test_responses_that_differ_in_white_space_only_are_counted(tmp_path: Path):
    found = looked_into(tmp_path, [*PLAIN, {"prompt": "Well?", "chosen": "Yes, so.", "rejected": "yes,  so."}])
    assert found.tree["equal_responses"] == 1


def test_a_duplicate_across_the_held_out_split_is_told(tmp_path: Path):
    twins = [row | {"prompt": row["prompt"].upper()} for row in PLAIN]
    found = looked_into(tmp_path, [*PLAIN, *twins], held_out=6)
    crossing = [row for row in found.duplicates if row["crosses_split"]]
    assert len(crossing) == found.tree["duplicates"]["cross_split"] > 0
    (leak,) = found.tree["contamination"]
    assert (leak["prompts"], leak["found"], leak["same"]) == (6, len(crossing), len(crossing))
    assert all(row["num_trained"] == 1 for row in found.contamination)


def test_prompts_to_be_evaluated_are_read_from_pairs_or_from_prompts_alone(tmp_path: Path):
    data = DataConfig.model_validate(
        {"sources": [{"path": write(tmp_path / "p.jsonl", PLAIN)}], "eval": {"num_pairs": 0}}
    )
    prompts = [row["prompt"] for row in PLAIN]
    turn = [{"role": "user", "content": prompts[1]}]
    alone = write(
        tmp_path / "alone.jsonl", [{"question": prompts[0].upper()}, {"prompt": turn}, {"instruction": "Something new"}]
    )
    pairs = write(tmp_path / "more.jsonl", [PLAIN[2], {"prompt": "Another?", "chosen": "Yes.", "rejected": "No."}])
    found = inspect(data, against=[SourceConfig(path=path) for path in (alone, pairs)])
    told = [(leak["evaluated"], leak["prompts"], leak["same"]) for leak in found.tree["contamination"]]
    assert told == [("held out", 0, 0), (alone, 3, 2), (pairs, 2, 1)]
    places = [(row["place"], row["trained"]) for row in found.contamination]
    source = tmp_path / "p.jsonl"
    assert places == [
        (f"{alone}:1", [f"{source}:1"]),
        (f"{alone}:2", [f"{source}:2"]),
        (f"{pairs}:1", [f"{source}:3"]),
    ]


def test_the_longer_response_is_counted_by_source_with_its_interval(tmp_path: Path):
    equal = {"prompt": "Equal?", "chosen": "Yes.", "rejected": "No. "}
    one = write(tmp_path / "one.jsonl", PLAIN[:12])
    other = write(tmp_path / "other.jsonl", [*PLAIN[12:], equal, PLAIN[0]])  # one that the first source has already
    sources = [{"path": one}, {"path": other}]
    bias = inspect(DataConfig.model_validate({"sources": sources, "eval": {"num_pairs": 0}})).tree["length_bias"]
    assert bias["longer_is_better"] == pytest.approx(15.5 / 21)
    assert (bias["low"], bias["high"]) == wilson_interval(15.5 / 21, 21)
    shares = {part["source"]: (part["pairs"], part["longer_is_better"]) for part in bias["by_source"]}
    assert shares == {one: (12, 0.75), other: (9, pytest.approx(6.5 / 9))}


def test_lengths_histograms_and_languages_add_up(tmp_path: Path):
    french = {
        "prompt": "Quelle est la capitale de la France, et pour qui?",
        "chosen": "Paris.",
        "rejected": "The city of Lyon.",
    }
    found = looked_into(tmp_path, [*PLAIN, french])
    by_part = {(row["of"], row["unit"]): row for row in found.tree["lengths"]}
    assert by_part["prompt", "words"]["median"] == 4
    assert by_part["prompt", "words"]["max"] == 10
    counts = found.tree["histograms"]
    assert [sum(counts[name]) for name in ("chosen", "rejected", "difference")] == [21, 21, 21]
    languages = {row["language"]: row["pairs"] for row in found.tree["languages"]}
    assert languages["latin/fr"] == 1
    assert sum(languages.values()) == 21


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The cat is on the mat", "latin/en"),
        ("Was ist das und warum ist der Hund nicht da?", "latin/de"),
        ("Quelle est la capitale de la France et pour qui?", "latin/fr"),
        ("Per che cosa sono famosi gli artisti della Toscana?", "latin/it"),
        ("Hello", "latin"),
        ("42 + 1", "none"),
        ("", "none"),
        ("\u041f\u0440\u0438\u0432\u0435\u0442, world!!", "cyrillic"),
        ("\u6211\u4eec\u662f\u5b66\u751f", "han"),
        ("\u79c1\u306f\u5b66\u751f\u3067\u3059", "kana"),
        ("\uc548\ub155\ud558\uc138\uc694", "hangul"),
        ("\u0645\u0631\u062d\u0628\u0627", "arabic"),
    ],
)
def test_a_language_is_told_by_letters_and_stop_words(text: str, language: str):
    assert language_of(text) == language


def test_flipped_labels_are_suspicious_source_by_source(tmp_path: Path):
    def pair(number: int, *, tells: bool) -> Row:
        one, other = (" ".join(random.Random(2 * number + k).sample(WORDS, 3)) for k in (0, 1))
        ends = ("good", "bad") if tells or number % 2 else ("bad", "good")
        return {"prompt": f"{tells} {number}?", "chosen": f"{one} {ends[0]}", "rejected": f"{other} {ends[1]}"}

    telling = [pair(number, tells=True) for number in range(200)]
    told = write(tmp_path / "told.jsonl", [swapped(row) if n % 20 == 0 else row for n, row in enumerate(telling)])
    untold = write(tmp_path / "untold.jsonl", [pair(number, tells=False) for number in range(100)])
    sources = [{"path": path} for path in (told, untold)]
    found = inspect(DataConfig.model_validate({"sources": sources, "eval": {"num_pairs": 0}}))
    places = {row["place"] for row in found.suspicious}
    assert places <= {f"{told}:{n + 1}" for n in range(0, 200, 20)}
    assert len(places) >= 8
    probabilities = [row["probability"] for row in found.suspicious]
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(row["probability"] > 0.5 > 0 > row["margin"] for row in found.suspicious)
    by_source = {part["source"]: part for part in found.tree["mislabelled"]["by_source"]}
    assert by_source[told]["accuracy"] == pytest.approx(0.95)
    assert by_source[untold]["suspicious"] == 0


def test_one_prompt_alone_cannot_be_cross_fitted(tmp_path: Path):
    found = looked_into(tmp_path, [row | {"prompt": "The same?"} for row in PLAIN])
    assert found.tree["mislabelled"] is None
    assert found.suspicious == []


def test_a_long_text_is_cut():
    assert cut("x" * TEXT_SHOWN) == "x" * TEXT_SHOWN
    assert cut("x" * (TEXT_SHOWN + 1)) == "x" * TEXT_SHOWN + "..."


# The command


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Run:
    """`run("data.fraction=0.5")`: the command on a small recipe with overrides and options."""
    tree = {
        "name": "small",
        "storage": {"path": str(tmp_path / "runs")},
        "model": {"path": str(tiny_model)},
        "data": {
            "sources": [{"path": write(tmp_path / "p.jsonl", [*PLAIN, swapped(PLAIN[0])])}],
            "eval": {"num_pairs": 4},
        },
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    return lambda *arguments: CliRunner().invoke(app, ["data", str(recipe), *arguments])


def one_line(result: Result) -> str:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    return lines[-1]


def test_the_command_writes_what_it_found_and_says_what_to_do(run: Run, tmp_path: Path):
    result = run()
    assert result.exit_code == 0, result.output
    told = " ".join(result.stdout.split())
    assert "17 training and 4 held-out pairs of 21 rows" in told
    assert all(what in told for what in ("duplicates", "contradictions", "length bias", "mislabelled", "what to do"))
    folder = tmp_path / "runs/small-data"
    assert sorted(file.name for file in folder.iterdir()) == [
        *("contamination.jsonl", "duplicates.jsonl", "quality.html", "quality.json", "suspicious.jsonl")
    ]
    tree = json.loads((folder / "quality.json").read_text())
    assert tree["contradictions"]["same"] == 1
    assert len((folder / "duplicates.jsonl").read_text().splitlines()) == 1
    assert [finding["what"] for finding in tree["findings"]][:2] == ["duplicates", "contradictions"]


def test_tokens_are_those_of_the_recipes_tokenizer(run: Run, capfd: pytest.CaptureFixture[str]):
    assert run("--json", "data.max_tokens=100").exit_code == 0
    tree = json.loads(capfd.readouterr().out)
    # A tokenizer of bytes: a blank for each is no token of its own, and a response has one end token.
    texts = {row["of"]: row["max"] for row in tree["lengths"] if row["unit"] == "characters"}
    tokens = {row["of"]: row["max"] for row in tree["tokens"]["lengths"]}
    assert tokens["chosen"] == texts["chosen"] + 1
    assert tokens["prompt"] - texts["prompt"] in (0, 1)  # perhaps with a beginning token
    assert tree["tokens"]["dropped"] == {}
    assert run("--json", "data.max_tokens=60").exit_code == 0
    assert json.loads(capfd.readouterr().out)["tokens"]["dropped"]["over_long"] > 0


def test_without_tokens_no_model_is_needed(run: Run, tmp_path: Path):
    assert "no model at" in one_line(run("model.path=./nowhere"))
    assert run("model.path=./nowhere", "--no-tokens").exit_code == 0
    assert json.loads((tmp_path / "runs/small-data/quality.json").read_text())["tokens"] is None


def test_the_page_shows_the_worst_escaped_and_loads_nothing(run: Run, tmp_path: Path):
    script = {"prompt": "<script>alert('x')</script>?", "chosen": "<b>Yes</b>", "rejected": "No & no"}
    write(tmp_path / "p.jsonl", [*PLAIN, script, swapped(script)])
    assert run("--output", str(tmp_path / "out"), "--no-tokens").exit_code == 0
    page = (tmp_path / "out/quality.html").read_text()
    assert html.escape(script["prompt"]) in page
    assert "<script" not in page
    assert "<b>Yes" not in page
    assert "http" not in page.replace("http-equiv", "")
    for title in ("Contradictions", "Contamination", "Length bias", "Likely mislabelled", "Languages"):
        assert f"<h2>{title}</h2>" in page


def test_rerunning_overwrites(run: Run, tmp_path: Path):
    assert run("--no-tokens").exit_code == 0
    write(tmp_path / "p.jsonl", PLAIN)
    assert run("--no-tokens").exit_code == 0
    assert json.loads((tmp_path / "runs/small-data/quality.json").read_text())["contradictions"]["same"] == 0
    assert (tmp_path / "runs/small-data/duplicates.jsonl").read_text() == ""


def test_mistakes_are_one_line(run: Run, tmp_path: Path):
    assert "nowhere.jsonl" in one_line(run("--no-tokens", "--against", str(tmp_path / "nowhere.jsonl")))
    file = write(tmp_path / "texts.jsonl", [{"text": "No prompt here."}])
    told = one_line(run("--no-tokens", "--against", file))
    assert f"{file}:1: no prompt in it; its columns are text" in told
    assert "unknown key `data.sauce`" in one_line(run("data.sauce=1"))
    assert "cannot write" in one_line(run("--no-tokens", "--output", f"{file}/below"))
