"""Does our length-controlled win rate agree with that of AlpacaEval 2? Its figures, for comparisons that we make.

Comparisons are made from the shared data: each model of arena_bench against gpt-3.5-turbo by the judge's scores, and
the model of tldr_judged against the human summaries. `tests/numerics/test_win_rates.py` makes the same ones, and holds
the figures that this script wrote. alpaca_eval reads the difficulty of prompts from the hub; here it reads ours. It
stands in no list of ours, because it brings many packages:

    pip install alpaca_eval scikit-learn==1.5.2
    python benchmarks/alpaca_eval_figures.py [--shared ../shared] [--output figures.json]

`minimal` has the terms identity and length; `difficulty` that of the prompt besides. The part of AlpacaEval's default
that a baseline told to be brief or verbose has is left out: it is not in our data. Each figure is written as it comes
out, with the inverse penalty C that cross-validation chose, and again at a fixed C so large that nothing is shrunk.
"""

import argparse
import gzip
import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

BASELINE = "gpt-3.5-turbo"
NO_PENALTY = 1e4
FORMULAS = {"minimal": "length_controlled_minimal", "difficulty": "length_controlled_noreg"}


class Comparisons(NamedTuple):
    """One model against one baseline; a row each, texts included because alpaca_eval counts their characters."""

    prompts: list[str]
    scores: list[float]
    responses: list[str]
    baselines: list[str]
    difficulty: list[float]

    @property
    def length_difference(self) -> list[int]:
        return [len(ours) - len(theirs) for ours, theirs in zip(self.responses, self.baselines, strict=True)]


def rows_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def arena(data: Path) -> dict[str, Comparisons]:
    """Each model of arena_bench against the baseline: the higher score wins; difficulty is minus the mean score."""
    found: dict[str, Comparisons] = {}
    for row in rows_of(data / "arena_bench/records.jsonl.gz"):
        by_model = {answer["model"]: answer for answer in row["responses"]}
        difficulty = -sum(answer["judge_score"] for answer in row["responses"]) / len(row["responses"])
        baseline = by_model.pop(BASELINE, None)
        for model, answer in sorted(by_model.items()) if baseline else []:
            kept = found.setdefault(model, Comparisons([], [], [], [], []))
            gap = answer["judge_score"] - baseline["judge_score"]
            kept.prompts.append(row["question_id"])
            kept.scores.append(0.5 if gap == 0 else float(gap > 0))
            kept.responses.append(answer["response"])
            kept.baselines.append(baseline["response"])
            kept.difficulty.append(difficulty)
    return dict(sorted(found.items()))


def summaries(data: Path) -> Comparisons:
    """The model of tldr_judged against the human reference; difficulty is the length of the post."""
    found = Comparisons([], [], [], [], [])
    for row in rows_of(data / "tldr_judged/pairs.jsonl.gz"):
        won = row["chosen_source"] == "model"
        found.prompts.append(row["prompt"])
        found.scores.append(float(won))
        found.responses.append(row["chosen" if won else "rejected"])
        found.baselines.append(row["rejected" if won else "chosen"])
        found.difficulty.append(len(row["prompt"]) / 1000)
    return found


class Figure(NamedTuple):
    """A length-controlled win rate of alpaca_eval's own function."""

    percent: float
    inverse_penalty: float
    percent_unpenalised: float


def alpaca_eval_figure(compared: Comparisons, formula: str) -> Figure:
    """What alpaca_eval's function gives, with its own settings and without a penalty."""
    from alpaca_eval.metrics import glm_winrate

    published = glm_winrate.GLM_INFO[FORMULAS[formula]]
    percent, chosen = fitted(compared, published)
    free, _ = fitted(compared, published | {"kwargs": {"n_splits": 0, "C": NO_PENALTY}})
    return Figure(round(percent, 3), round(chosen, 5), round(free, 3))


def fitted(compared: Comparisons, settings: dict[str, Any]) -> tuple[float, float]:
    """Length-controlled win rate in percent, and C."""
    import pandas as pd
    from alpaca_eval.metrics import glm_winrate

    size = len(compared.scores)
    annotations = pd.DataFrame(
        {
            "preference": [1 + score for score in compared.scores],
            "index": range(size),
            "output_1": compared.baselines,
            "output_2": compared.responses,
            "generator_1": "baseline",
            "generator_2": "model",
        }
    )
    models = []

    def fit(*args: Any, **kwargs: Any) -> Any:
        models.append(original(*args, **kwargs))
        return models[-1]

    original = glm_winrate.fit_LogisticRegressionCV
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "difficulty.csv"
        pd.DataFrame({"model": "", "index": range(size), "instruction_difficulty": compared.difficulty}).to_csv(path)
        with (
            mock.patch.object(glm_winrate, "hf_hub_download", return_value=str(path)),
            mock.patch.object(glm_winrate, "fit_LogisticRegressionCV", fit),
        ):
            found = glm_winrate.get_length_controlled_winrate(
                annotations, glm_info=settings, save_weights_dir=None, is_warn_extreme_changes=False
            )
    chosen = models[0].get_params()["C"] if "C" in models[0].get_params() else models[0].C_[0]
    return float(found["length_controlled_winrate"]), float(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if find_spec("alpaca_eval") is None:
        print("alpaca_eval is not installed: nothing to compare with")
        return
    data = args.shared / "data"
    if not data.is_dir():
        sys.exit(f"no data at {data}")
    figures = {
        name: {formula: alpaca_eval_figure(compared, formula) for formula in FORMULAS}
        for name, compared in (arena(data) | {"tldr_judged": summaries(data)}).items()
    }
    lines = [f'  "{name}": {json.dumps(by_formula)}' for name, by_formula in figures.items()]
    text = "{\n" + ",\n".join(lines) + "\n}"
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
