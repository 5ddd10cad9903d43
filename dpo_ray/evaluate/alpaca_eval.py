"""The length-controlled win rate exactly as AlpacaEval 2 fits it, to stand beside the figures of its leaderboard.

`win_rates.length_controlled_win_rate` asks the same question without random folds, and has an interval; this one has
the penalty that AlpacaEval cross-validates. Pure: scikit-learn's logistic regression, which AlpacaEval uses too.
"""

import warnings

import numpy as np
from numpy.typing import ArrayLike
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import GroupKFold

from dpo_ray.errors import InputError

FOLDS = 5
RANDOM_STATE = 123
"""As AlpacaEval sets it; liblinear visits the coordinates in random order."""


def alpaca_eval_win_rate(scores: ArrayLike, length_difference: ArrayLike, difficulty: ArrayLike | None = None) -> float:
    """Length-controlled win rate of Dubois et al. 2024 (arXiv:2404.04475), section 3, in [0, 1].

    A logistic regression on tanh(d / std d), the prompt's difficulty and one constant, with an L1 penalty on all three
    chosen by five-fold cross-validation of the log-loss; then the mean prediction at d = 0. A score between 0 and 1 is
    one win and one loss with these weights, both in one fold.

    Args:
        scores: [N], in [0, 1], one comparison a prompt.
        length_difference: [N], characters of the model's response less those of the baseline's.
        difficulty: [N], of each prompt, from a fit over many models; None: without this term.

    Raises:
        InputError: Too few wins or losses for the folds, or all responses differ equally in length.
    """
    seen, lengths = np.asarray(scores, dtype=np.float64), np.asarray(length_difference, dtype=np.float64)
    if min(seen.sum(), (1 - seen).sum()) < FOLDS or lengths.std() == 0:
        raise InputError(f"AlpacaEval's fit needs at least {FOLDS} wins and {FOLDS} losses, and differences of length")
    terms = [np.tanh(lengths / lengths.std(ddof=1))]
    if difficulty is not None:
        terms.append(np.asarray(difficulty, dtype=np.float64))
    design = np.tile(np.stack([*terms, np.ones(len(seen))], axis=1), (2, 1))
    won, weights = np.repeat([1, 0], len(seen)), np.concatenate([seen, 1 - seen])
    folds = GroupKFold(FOLDS).split(design, groups=np.tile(np.arange(len(seen)), 2))
    model = LogisticRegressionCV(
        Cs=10,
        cv=list(folds),
        scoring="neg_log_loss",
        l1_ratios=(1.0,),
        solver="liblinear",
        fit_intercept=False,
        random_state=RANDOM_STATE,
        use_legacy_attributes=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(design, won, sample_weight=weights)
    design[:, 0] = 0.0
    return float(model.predict_proba(design[: len(seen)])[:, 1].mean())
