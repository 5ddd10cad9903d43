"""Which data? Each source of the recipe alone, and all together, on the same held-out pairs of all of them.

Set `data.num_pairs` to the size of the smallest source, so that every trial trains on as many pairs.
"""

SPACE = {
    "data.sources": {"mixtures": "singles_and_all"},
    "train.seed": [0, 1, 2],
}
METRIC = "rewards/accuracies"
MODE = "max"
