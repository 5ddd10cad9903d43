"""What is served: models under names, limits, and what is kept. Values only, the arguments of `app.build_app`."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from dpo_ray.config import Config
from serve.auth import ApiKey

NAME = r"^[A-Za-z0-9][A-Za-z0-9._/@-]{0,63}$"
Chat = Literal["auto", "template", "transcript", "plain"]


class ServedModel(Config):
    """One model, with the adapters on it."""

    name: str = Field(pattern=NAME)
    """What requests call it."""

    path: str
    """Folder of whole weights."""

    trust_remote_code: bool = False

    adapter: str | None = None
    """Folder of the adapter that `name` has; null: the weights as they are."""

    adapters: dict[str, str] = Field(default_factory=dict)
    """Folders of further adapters on the same weights, by the names that requests call them."""

    reference: str | None = None
    """Folder of the model that rewards are measured against; null: the model gives no rewards."""

    beta: float | None = Field(default=None, gt=0)
    """Scale of the rewards, as in training."""

    chat: Chat = "auto"
    """Prompts of messages: through the tokenizer's chat `template`; as a `transcript` (`\\n\\nHuman: ...`), as models
    are trained on HH-RLHF without a template; `plain`: a single message of the user is continued as it is. `auto`: by
    the template if there is one, else plain."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """`auto`: vLLM where it is installed and there is a GPU, else transformers."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 on a GPU, fp32 elsewhere."""

    max_length: int | None = Field(default=None, ge=2)
    """Most tokens of a prompt with its answer; null: what the model can take."""

    concurrency: int = Field(default=32, ge=1)
    """Most answers that a replica writes at the same time."""

    cache_tokens: int | None = Field(default=None, ge=2)
    """Room for so many tokens of prompts and answers; null: 32,768 on a CPU, 131,072 on a GPU."""

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    """With more than `min_replicas` Ray Serve adds and removes replicas by the load."""

    max_queued: int = Field(default=64, ge=0)
    """Requests that may wait for a replica; further ones get 429."""

    num_cpus: float = Field(default=1.0, gt=0)
    num_gpus: float = Field(default=0.0, ge=0)
    """Of each replica."""

    @model_validator(mode="after")
    def _replicas_are_a_range(self) -> "ServedModel":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is less than min_replicas={self.min_replicas}")
        return self


class Limits(Config):
    """What one request may ask for."""

    max_body_bytes: int = Field(default=2**20, ge=1024)
    max_tokens: int = Field(default=4096, ge=1)
    """Most tokens of an answer; also what a chat request gets that does not say."""

    body_timeout_s: float = Field(default=20.0, gt=0)
    """A client that takes longer to send its request is sent away."""

    request_timeout_s: float = Field(default=600.0, gt=0)


class ServeConfig(Config):
    """The whole application."""

    models: tuple[ServedModel, ...] = Field(min_length=1)
    split: dict[str, dict[str, float]] = Field(default_factory=dict)
    """A/B: a name that requests use -> shares of the models that answer it, such as {"chat": {"a": 0.9, "b": 0.1}}."""

    compare: tuple[str, str] | None = None
    """The two models of the comparison page; null: the page is off."""

    api_keys: tuple[ApiKey, ...] = ()
    """Keys by their hashes."""

    keys: Path | None = None
    """A file with more of them, which whatever speaks HTTP reads; `DPO_RAY_API_KEY` holds one too."""

    insecure: bool = False
    """Answer anybody."""

    cors: tuple[str, ...] = ()
    """Origins whose pages may ask."""

    limits: Limits = Limits()
    preferences: str | None = None
    """Folder that collects preferences; null: none are taken."""

    queue: Path | None = None
    """The `queue` folder of an acquisition that people label; null: the page is off."""

    log_text: bool = False
    """Write prompts and answers into the log."""

    ingress_replicas: int = Field(default=1, ge=1)
    """Processes that speak HTTP. Limits of keys hold in each of them."""

    @model_validator(mode="after")
    def _names_mean_one_thing(self) -> "ServeConfig":
        names = [name for model in self.models for name in (model.name, *model.adapters)] + list(self.split)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"`{twice[0]}` names two models")
        real = set(names) - set(self.split)
        for name, shares in self.split.items():
            unknown = sorted(set(shares) - real)
            if unknown:
                raise ValueError(f"split of `{name}`: there is no model `{unknown[0]}`")
            if any(share < 0 for share in shares.values()) or sum(shares.values()) <= 0:
                raise ValueError(f"split of `{name}`: shares are positive numbers")
        for name in self.compare or ():
            if name not in real:
                raise ValueError(f"compare: there is no model `{name}`")
        return self

    @property
    def real_names(self) -> tuple[str, ...]:
        """Models and adapters; names that only split traffic are left out."""
        return tuple(name for model in self.models for name in (model.name, *model.adapters))

    def model_behind(self, name: str) -> ServedModel:
        """The model that has, or whose adapter has, a real name."""
        return next(model for model in self.models if name == model.name or name in model.adapters)
