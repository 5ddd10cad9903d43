"""Which loss? Members of the DPO family with the settings their papers recommend."""

SPACE = {
    "loss": [
        {"kind": "dpo", "beta": 0.1},
        {"kind": "dpo", "beta": 0.1, "label_smoothing": 0.1},
        {"kind": "robust", "beta": 0.1, "label_smoothing": 0.1},
        {"kind": "ipo", "beta": 0.1},
        {"kind": "hinge", "beta": 0.1},
        {"kind": "apo_zero", "beta": 0.1},
        {"kind": "sppo_hard", "beta": 0.1},
    ],
}
METRIC = "rewards/accuracies"
MODE = "max"
