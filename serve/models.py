"""Which model a path means: found once, on the machine that starts the application. Replicas get folders."""

from collections.abc import Sequence
from pathlib import Path

from dpo_ray.config import RunConfig, validated
from dpo_ray.errors import InputError
from dpo_ray.models import ModelSource, adapter_base, load_tokenizer, local_folder, weights_fingerprint
from dpo_ray.prepare import is_run, model_of, recipe_of, reference_source, registered, resolve
from dpo_ray.storage import absolute
from serve.config import Chat, ServedModel


def find_model(
    path: str,
    *,
    name: str | None = None,
    reference: str | None = None,
    adapters: Sequence[tuple[str, str]] = (),
    trust_remote_code: bool = False,
) -> ServedModel:
    """What a path names: a run folder, a model's or an adapter's folder, a hub id, `models:/name@alias` of MLflow.

    A run folder knows its reference, its beta and how it wrote conversations.

    Args:
        name: What requests call it; default: the name of the run, or the end of the path.
        reference: What rewards are measured against, instead of the run's.
        adapters: Names and folders of further adapters.

    Raises:
        InputError: There is no such model, or an adapter is on other weights.
    """
    found = registered(path)
    # A registered model lies in the folder of the run that made it, if that is still there.
    run_dir = next((folder for folder in (found, str(Path(found).parent)) if is_run(folder)), None)
    trusts = trust_remote_code
    run = (
        None if run_dir is None else resolve(recipe_of(run_dir, {"model.trust_remote_code": True} if trusts else None))
    )
    source = model_of(found, trusts)
    folder = local_folder(source)
    is_adapter = (folder / "adapter_config.json").exists()
    base = adapter_base(folder, source) if is_adapter else source
    measured = model_of(reference, trusts) if reference else None if run is None else reference_source(run)
    further = {}
    for other, place in adapters:
        other_folder = local_folder(model_of(place, trusts))
        if not (other_folder / "adapter_config.json").exists():
            raise InputError(f"{place} is not an adapter: it has no adapter_config.json")
        if weights_fingerprint(adapter_base(other_folder, source)) != weights_fingerprint(base):
            raise InputError(f"the adapter {place} is on other weights than {base.path}")
        further[other] = absolute(str(other_folder))
    return validated(
        ServedModel,
        {
            "name": name or _name_of(path, run.name if run is not None else None),
            "path": absolute(str(local_folder(base))),
            "trust_remote_code": trusts,
            "adapter": absolute(str(folder)) if is_adapter else None,
            "adapters": further,
            "reference": None if measured is None else absolute(str(local_folder(measured))),
            "beta": getattr(run.loss, "beta", None) if run is not None else None,
            "chat": _chat(source, run),
        },
    )


def as_reference(model: ServedModel, name: str) -> ServedModel:
    """The reference of a model, to be served beside it.

    Raises:
        InputError: It has none.
    """
    if model.reference is None:
        raise InputError(f"`{model.name}` has no reference to compare with: give --reference")
    return model.model_copy(
        update={
            "name": name,
            "path": model.reference,
            "adapter": None,
            "adapters": {},
            "reference": None,
            "beta": None,
        }
    )


def _chat(source: ModelSource, run: RunConfig | None) -> Chat:
    """How a model has messages, as far as its tokenizer and its run tell."""
    if run is not None and run.data.chat == "never":
        return "transcript"
    return "plain" if load_tokenizer(source).chat_template is None else "template"


def _name_of(path: str, run_name: str | None) -> str:
    if path.startswith("models:/"):
        return path.removeprefix("models:/")
    return run_name or path.rstrip("/").rpartition("/")[2]
