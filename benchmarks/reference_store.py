"""What does the reference of a sweep over five betas cost, with the store and without it?

The same model and pairs as in train_vs_trl.py; CPU seconds of one thread. `with` asks one store at every trial, as a
sweep does; `without` computes all reference log-probs at every trial, as trainers do whose cache belongs to a run.

    python benchmarks/reference_store.py [--pairs 16] [--repeats 2] [--data hh|tldr]
"""

import sys
import tempfile
import time
from pathlib import Path

from common import arguments, data_of, make_model, ratios, recipe, spread, table, write

BETAS = (0.01, 0.05, 0.1, 0.3, 0.5)


def measure(model: Path, data: str, storage: Path, num_pairs: int) -> dict[str, float]:
    """CPU seconds of the five trials' references, both ways."""
    from dpo_ray.models import policy_source, weights_fingerprint
    from dpo_ray.prepare import prepare
    from dpo_ray.reference import ReferenceStore, ReferenceTable, ResponseScorer, by_prompt, missing_responses

    run = recipe(model, data, storage, num_pairs)
    prepared = prepare(run)
    source = policy_source(run.model)
    fingerprint = weights_fingerprint(source)

    def trial(root: str) -> float:
        """What a trial does before it trains: ask the store, compute what is missing, read the table."""
        began = time.process_time()
        store = ReferenceStore(root, fingerprint, "fp32")
        missing = missing_responses(prepared.train_pairs, store)
        if missing:
            store.write(ResponseScorer(source, "fp32", run.batch).score(by_prompt(missing)))
        ReferenceTable(store, prepared.train_pairs)
        return time.process_time() - began

    shared = sum(trial(f"{storage}/shared") for _ in BETAS)
    alone = sum(trial(f"{storage}/alone-{beta}") for beta in BETAS)
    return {"with": shared, "without": alone}


def main() -> None:
    options = arguments(str(__doc__), pairs=16, repeats=2).parse_args()
    data = data_of(options)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), data)
        for repeat in range(options.repeats):
            runs.append(measure(Path(folder), data, Path(folder) / f"storage-{repeat}", options.pairs))
            print(f"{repeat + 1}/{options.repeats}: {runs[-1]}", file=sys.stderr)
    with_store, without = ([run[name] for run in runs] for name in ("with", "without"))
    rows = [
        ["one store for all trials", spread(with_store), ""],
        ["each trial its own", spread(without), spread(ratios(without, with_store), unit="x")],
    ]
    head = [f"reference of {len(BETAS)} trials", "CPU s", "times the store's"]
    write(f"reference_store-{options.data}", vars(options), runs, table(head, rows))


if __name__ == "__main__":
    main()
