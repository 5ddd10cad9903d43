"""Which beta together with which learning rate? The two trade off, so that either alone may mislead."""

SPACE = {
    "loss.beta": {"loguniform": [0.01, 1.0]},
    "optim.learning_rate": {"loguniform": [1e-7, 1e-4]},
}
METRIC = "rewards/accuracies"
MODE = "max"
