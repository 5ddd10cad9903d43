"""How much data? Nested fractions of the training pairs, several seeds: where does the curve flatten, or dip?"""

SPACE = {
    "data.fraction": [0.1, 0.2, 0.4, 0.6, 0.8, 1.0],
    "train.seed": [0, 1, 2],
}
METRIC = "rewards/accuracies"
MODE = "max"
