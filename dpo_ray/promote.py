"""Promotion of a registered model: the challenger becomes champion by a recorded comparison, or by force with a reason.

The decision is a pure function of a version's tags and of `evaluation.json`; MLflow's calls are in `tracking`, what a
version was made from is told by `lineage`.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_ray.errors import InputError
from dpo_ray.run_record import EVALUATION_FILE
from dpo_ray.storage import Folder
from dpo_ray.tracking import CHALLENGER, CHAMPION, ModelRegistry, ModelVersion

EVIDENCE = ("win_rate", "low", "high", "judge", "num_prompts")


class Verdict(NamedTuple):
    """Whether a comparison makes a version champion."""

    evidence: dict[str, Any]
    """Of the comparison, by `EVIDENCE`; empty where there is none."""
    refusal: str | None
    """Why not."""


def decide(evaluation: Mapping[str, Any] | None, version: ModelVersion, champion: ModelVersion | None) -> Verdict:
    """Whether a recorded comparison shows that a version wins against the champion.

    It does when the 95 % interval of the win rate lies above a half. Where the champion was met by several judges the
    least favourable counts, so that nobody can pick one. A first champion has to win against its reference, or against
    what it was compared with where that is not there.

    Args:
        evaluation: What `dpo-ray evaluate` wrote; None: there is nothing.
        champion: The present one; None for the first of a name.
    """
    if evaluation is None:
        return Verdict({}, "no comparison is recorded: run `dpo-ray evaluate` first")
    own = version.tags.get("model_fingerprint")
    if own is None or evaluation.get("model_fingerprint") != own:
        return Verdict({}, "the recorded comparison is of other weights")
    met = _comparisons(evaluation, version, champion)
    if not met:
        whom = "anything" if champion is None else f"the champion, version {champion.number}"
        return Verdict({}, f"no win rate against {whom} is recorded (`dpo-ray evaluate ... --against MODEL`)")
    entry = min(met, key=lambda entry: entry["low"])
    evidence = {name: entry.get("value" if name == "win_rate" else name) for name in EVIDENCE}
    low, high = entry["low"], entry["high"]
    if low > 0.5:
        return Verdict(evidence, None)
    told = "includes 50 %" if high >= 0.5 else "lies below 50 %"
    return Verdict(
        evidence,
        f"the win rate against {entry['against']} is {entry['value']:.1%} ({low:.1%} to {high:.1%}): it {told}",
    )


def _comparisons(
    evaluation: Mapping[str, Any], version: ModelVersion, champion: ModelVersion | None
) -> list[Mapping[str, Any]]:
    """The win rates that count; those without an interval do not. Models are told by their weights, not by name."""
    known = [entry for entry in evaluation.get("win_rate") or [] if entry.get("low") is not None]
    wanted = version.tags.get("reference_fingerprint")
    if champion is not None:
        wanted = champion.tags.get("model_fingerprint")
    others = evaluation.get("against") or []
    names = {other["name"] for other in others if wanted and other["fingerprint"] == wanted}
    met = [entry for entry in known if entry["against"] in names]
    return met if met or champion is not None else known


def promote(
    registry: ModelRegistry,
    *,
    number: str | None = None,
    evaluation: Path | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    """Make a version the champion, if its recorded comparison shows that it wins; write the evidence into its tags.

    Args:
        number: The version; None: the challenger.
        evaluation: The comparison; None: the one in the version's run folder.
        reason: Forces the promotion, whatever the comparison says, and is written down.

    Returns:
        What was promoted, and what it followed.

    Raises:
        InputError: There is no such version, it is champion already, or the comparison does not show that it wins.
    """
    versions = registry.versions()
    version, champion = _version(registry.name, versions, number), _with_alias(versions, CHAMPION)
    if version == champion:
        raise InputError(f"version {version.number} of {registry.name} is the champion already")
    verdict = decide(_read(version, evaluation), version, champion)
    if verdict.refusal is not None and reason is None:
        raise InputError(f"version {version.number} of {registry.name} stays as it is: {verdict.refusal}")
    why = {**dict.fromkeys(EVIDENCE), **verdict.evidence, "forced": str(reason is not None).lower(), "reason": reason}
    why["promoted_at"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    former = None if champion is None else champion.number
    # Those without a value are emptied: a version may have been promoted before, by other evidence.
    registry.promote(version.number, former, {name: "" if value is None else str(value) for name, value in why.items()})
    return {"name": registry.name, "version": version.number, "former": former, **why}


def listing(registry: ModelRegistry) -> list[dict[str, Any]]:
    """Every version, the newest first: aliases, the win rate it was promoted by, and its data."""
    kept = ("win_rate", "low", "high", "forced", "data_fingerprint", "labels")
    return [
        {
            "version": version.number,
            "aliases": sorted(version.aliases),
            **{name: version.tags.get(name) or None for name in kept},
        }
        for version in registry.versions()
    ]


def _version(name: str, versions: Sequence[ModelVersion], number: str | None) -> ModelVersion:
    if number is None:
        found = _with_alias(versions, CHALLENGER)
        if found is None:
            raise InputError(f"{name} has no version with the alias `{CHALLENGER}`: name one with --version")
        return found
    for version in versions:
        if version.number == number:
            return version
    there = ", ".join(version.number for version in versions) or "none"
    raise InputError(f"{name} has no version {number}; it has {there}")


def _with_alias(versions: Sequence[ModelVersion], alias: str) -> ModelVersion | None:
    return next((version for version in versions if alias in version.aliases), None)


def _read(version: ModelVersion, evaluation: Path | None) -> Mapping[str, Any] | None:
    """The recorded comparison; None where the run folder has none.

    Raises:
        InputError: The named file is not there, or it holds no JSON object.
    """
    if evaluation is not None:
        if not evaluation.exists():
            raise InputError(f"no such file: {evaluation}")
        path, content = str(evaluation), evaluation.read_bytes()
    else:
        folder = Folder(version.tags["run_folder"]) if "run_folder" in version.tags else None
        if folder is None or not folder.exists(EVALUATION_FILE):
            return None
        path, content = f"{folder.path}/{EVALUATION_FILE}", folder.read(EVALUATION_FILE)
    try:
        found = json.loads(content)
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no object")
    return found
