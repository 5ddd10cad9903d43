"""Which beta? The strength of the tie to the reference: small ones move far, large ones hardly at all."""

SPACE = {"loss.beta": [0.01, 0.05, 0.1, 0.3, 0.5, 1.0]}
METRIC = "rewards/accuracies"
MODE = "max"
