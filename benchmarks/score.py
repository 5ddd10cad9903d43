"""How many pairs a second does scoring a pool take, beside the plain way; and what does a second actor add?

Policy and reference are Llamas of about 33 M parameters, the pairs are real, fp32. The first table is in CPU seconds of
one thread, so that other work on the machine counts little; contenders take turns, each run in a process of its own,
without loading.

    ours            the actor of `dpo-ray score`: each prompt once for its responses, packed rows, the output layer
                    where a response is predicted, policy and reference over the same blocks
    ours, hidden    the same, keeping hidden states for diversity and ensembles
    plain           one forward per prompt and response, 8 sequences a batch in the order of the data, padded on the
                    right, log-softmax of all logits; one pass for the policy and one for the reference
    plain, sorted   the same by length, which the plain way seldom is: little padding is left

The second table is the pass itself over Ray Data with one and two actors: seconds of the clock from the first finished
block to the last, so that starting Ray and loading models are left out. It wants two quiet cores.

    python benchmarks/score.py [--pairs 64] [--repeats 3] [--data hh|tldr] [--data-path FILE]
"""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Clock, arguments, data_of, in_turns, make_model, ratios, recipe, spread, table, write

CONTENDERS = ("ours", "ours, hidden", "plain", "plain, sorted")
ACTORS = ("1 actor", "2 actors")
BATCH = 8


def run_ours(run: Any, reference: Path, *, hidden: bool) -> dict[str, Any]:
    """Everything that the actor does to its blocks."""
    from dpo_ray.models import ModelSource, policy_source
    from dpo_ray.prepare import prepare
    from dpo_ray.reference import ScoringActor, View, blocks_of, store_of

    pairs = prepare(run).train_pairs
    sources = [policy_source(run.model), ModelSource(str(reference))]
    views = [View(source, store_of(run, source), hidden=hidden and i == 0) for i, source in enumerate(sources)]
    actor = ScoringActor(views, "fp32", run.batch)
    clock = Clock()
    for block in blocks_of(pairs, views, run):
        actor(block)
    clock.lap("scoring")
    return clock.result(len(pairs))


def run_plain(run: Any, reference: Path, *, is_sorted: bool) -> dict[str, Any]:
    """Hugging Face models as they are."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM

    from dpo_ray.prepare import prepare

    pairs = prepare(run).train_pairs
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (run.model.path, reference)]
    clock = Clock()
    sequences = [
        (torch.tensor([*p.prompt_ids, *side]), len(p.prompt_ids))
        for p in pairs
        for side in (p.chosen_ids, p.rejected_ids)
    ]
    if is_sorted:
        sequences.sort(key=lambda item: len(item[0]))
    for model in models:
        for start in range(0, len(sequences), BATCH):
            part = sequences[start : start + BATCH]
            ids = pad_sequence([sequence for sequence, _ in part], batch_first=True)
            mask = pad_sequence([torch.ones_like(sequence) for sequence, _ in part], batch_first=True)
            with torch.inference_mode():
                logps = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].log_softmax(-1)
            chosen = logps.gather(-1, ids[:, 1:, None])[..., 0]
            for row, (sequence, prompt) in enumerate(part):
                float(chosen[row, prompt - 1 : len(sequence) - 1].double().sum())
    clock.lap("scoring")
    return clock.result(len(pairs))


def run_pass(run: Any, reference: Path, num_actors: int) -> dict[str, Any]:
    """The pass over Ray Data; pairs per second between its first and its last block."""
    import ray

    from dpo_ray.models import ModelSource, policy_source
    from dpo_ray.prepare import prepare
    from dpo_ray.reference import View, responses_of, score_responses, store_of

    pairs = prepare(run).train_pairs
    sources = [policy_source(run.model), ModelSource(str(reference))]
    views = [View(source, store_of(run, source)) for source in sources]
    run = run.model_copy(update={"cluster": run.cluster.model_copy(update={"num_workers": num_actors})})
    seen: list[tuple[float, int]] = []
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    score_responses(responses_of(pairs), views, run, 0.0, lambda done, total: seen.append((time.monotonic(), done)))
    ray.shutdown()
    (began, before), (ended, done) = seen[num_actors - 1], seen[-1]
    return {"pairs_per_s": (done - before) / 4 / (ended - began), "blocks": len(seen)}


def main() -> None:
    options = arguments(str(__doc__), pairs=64, repeats=3).parse_args()
    data = data_of(options)
    if options.contender:
        import torch
        import transformers

        torch.set_num_threads(1)
        transformers.utils.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as storage:
            run = recipe(options.folder / "policy", data, Path(storage), options.pairs)
            reference = options.folder / "reference"
            if options.contender in ACTORS:
                found = run_pass(run, reference, int(options.contender[0]))
            elif options.contender.startswith("ours"):
                found = run_ours(run, reference, hidden="hidden" in options.contender)
            else:
                found = run_plain(run, reference, is_sorted="sorted" in options.contender)
            print(json.dumps(found))
        return

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "policy", data)
        make_model(folder / "reference", data, seed=1)
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        passed = ["--folder", name, "--data-path", data, "--pairs"]
        results = in_turns(__file__, CONTENDERS, options.repeats, *passed, str(options.pairs))
        many = in_turns(__file__, ACTORS, options.repeats, *passed, str(8 * options.pairs))
    rates = {name: [run["pairs_per_s"] for run in runs] for name, runs in (results | many).items()}
    rows = [[name, spread(rates[name], 2), spread(ratios(rates["ours"], rates[name]), unit="x")] for name in CONTENDERS]
    more = [[name, spread(rates[name], 2), spread(ratios(rates[name], rates["1 actor"]), unit="x")] for name in ACTORS]
    told = [
        table(["", "pairs/s (CPU time, one thread)", "ours is"], rows),
        table(["", "pairs/s (clock, two cores)", "of one actor"], more),
    ]
    write(f"score-{options.data}", vars(options), results | many, "\n\n".join(told))


if __name__ == "__main__":
    main()
