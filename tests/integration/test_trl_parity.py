"""Fifty steps beside TRL's DPOTrainer: same model, token ids, order, optimizer and schedule, same trajectory."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config import parse_run
from dpo_ray.launch import fit
from dpo_ray.prepare import prepare, resolve, step_order

pytestmark = pytest.mark.ray

STEPS, PAIRS_PER_STEP = 50, 8
PEAK_RATE, WARMUP_STEPS = 3e-4, 5


def trl_history(model_folder: Path, examples: list[dict[str, list[int]]], output: Path) -> list[dict[str, float]]:
    """Logged lines of TRL's trainer, one a step. It gets our token ids, in our order, in two micro-batches a step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class OnTokenIds(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = OnTokenIds(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        ref_model=AutoModelForCausalLM.from_pretrained(model_folder),
        args=DPOConfig(
            output_dir=str(output),
            beta=0.1,
            max_length=None,
            per_device_train_batch_size=PAIRS_PER_STEP // 2,
            gradient_accumulation_steps=2,
            max_steps=STEPS,
            learning_rate=PEAK_RATE,
            lr_scheduler_type="linear",
            warmup_steps=WARMUP_STEPS,
            weight_decay=0.0,
            adam_beta1=0.9,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            logging_steps=1,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def test_fifty_steps_agree_with_trl(cluster: None, shared: Path, tmp_path: Path):
    model_folder = shared / "models/stories260K"
    run = resolve(
        parse_run(
            {
                "name": "parity",
                "storage": {"path": str(tmp_path / "runs")},
                "model": {"path": str(model_folder)},
                "data": {
                    "sources": [{"path": str(shared / "data/truthfulqa/pairs.jsonl.gz")}],
                    "max_tokens": 128,
                    "num_pairs": 240,  # so that the second epoch begins within the 50 steps
                    "eval": {"num_pairs": 0},
                },
                "batch": {"pairs_per_step": PAIRS_PER_STEP},
                "optim": {"learning_rate": PEAK_RATE, "warmup_ratio": WARMUP_STEPS / STEPS},
                "train": {"max_steps": STEPS, "log_every_steps": 1},
                "engine": {"precision": "fp32", "zero_stage": 2},
                "cluster": {"num_workers": 2},
                "tracking": {"kind": "none"},
            }
        )
    )
    ours = [json.loads(line) for line in (Path(fit(run).folder) / "metrics.jsonl").read_text().splitlines()]

    pairs = prepare(run).train_pairs
    order = step_order(run, len(pairs))
    examples = [
        {
            "prompt_ids": pairs[number].prompt_ids.tolist(),
            "chosen_ids": pairs[number].chosen_ids.tolist(),
            "rejected_ids": pairs[number].rejected_ids.tolist(),
        }
        for step in range(1, STEPS + 1)
        for number in order.pairs_of(step)
    ]
    theirs = trl_history(model_folder, examples, tmp_path / "trl")

    assert len(ours) == len(theirs) == STEPS
    for name in ("loss", "rewards/margins", "rewards/chosen", "logps/chosen", "logps/rejected", "grad_norm"):
        expected = [line[name] for line in theirs]
        # TRL rounds what it logs to some digits; a margin of zero has no relative error.
        assert [line[name] for line in ours] == pytest.approx(expected, rel=1e-3, abs=1e-4), name
    assert ours[-1]["rewards/margins"] > 0.1  # it did move
