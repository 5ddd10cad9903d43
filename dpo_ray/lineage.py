"""What a registered model was made from, as tags of its version: from the model to its data, and to their labels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_ray.config import RunConfig
from dpo_ray.models import ModelSource, weights_fingerprint

LABELS_TAG = "dpo_ray.labels"
"""Of a tracked run that trains on an acquisition's labels: where they lie."""


def lineage(
    run: RunConfig, folder: str, model_path: str, summary: Mapping[str, Any], tags: Mapping[str, str]
) -> dict[str, str]:
    """Fingerprints of weights, data and reference, the run folder, and where the labels are: the data's paths, unless
    the tracked run's tags know better.

    Weights that do not lie on this machine have no fingerprint.

    Args:
        folder: Of the run.
        summary: Its `summary.json`.
        tags: Of the tracked run.
    """
    made_from = {
        "data_fingerprint": summary.get("data_fingerprint"),
        "reference_fingerprint": summary.get("reference_fingerprint"),
        "model_fingerprint": weights_fingerprint(ModelSource(model_path)) if Path(model_path).is_dir() else None,
        "run_folder": folder,
        "labels": tags.get(LABELS_TAG) or ", ".join(source.path for source in run.data.sources),
    }
    return {name: str(value) for name, value in made_from.items() if value is not None}
