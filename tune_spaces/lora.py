"""Which adapter? Rank against learning rate; adapters want about ten times the rate of whole models."""

SPACE = {
    "model.lora.rank": [4, 16, 64],
    "optim.learning_rate": {"loguniform": [5e-6, 5e-4]},
}
METRIC = "rewards/accuracies"
MODE = "max"
