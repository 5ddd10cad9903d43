"""What a run is: frozen, validated values. No torch, no Ray, no I/O but the recipe file.

A recipe is YAML plus dotted overrides. The command line and every Tune trial pass through the same `load_run`, so
a sweep cannot reach a run that a person could not. The docstring under a field is its line in the recipe reference.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from dpo_ray.errors import InputError

Format = Literal[
    "auto",
    "explicit",
    "implicit",
    "hh_rlhf",
    "sharegpt",
    "ranked",
    "labelled",
    "comparisons",
    "stack_exchange",
    "message_tree",
    "question_answers",
    "graded",
]


RECIPE_FILE = "recipe.yaml"
"""Of a run folder: the recipe as resolved."""


class Config(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


Section = TypeVar("Section", bound=Config)


class Place(Enum):
    """What the text of a key leads to, so that a job can be refused whose files its cluster does not see."""

    FOLDER = "a folder that every node reads and writes: a local path or a filesystem's URI"
    DATA = "a local path, a filesystem's URI, or a name on the hub"
    MODEL = "a local folder, or a name on the hub"
    URL = "a server, or a local database"


class StorageConfig(Config):
    path: Annotated[str, Place.FOLDER] = "runs"
    """Folder of all runs: a local path or any pyarrow filesystem URI (`s3://...`, `gs://...`). Must be visible to
    every node. The run folder is `path/name`."""


class LoraConfig(Config):
    rank: int = Field(default=16, ge=1)
    """Rank of the adapter matrices."""

    alpha: float = Field(default=32.0, gt=0)
    """Scale: the update is multiplied by alpha / rank."""

    targets: str | tuple[str, ...] = "all-linear"
    """Names of the linear layers to adapt, or `all-linear` (every one but the output layer)."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input. With dropout the loss of the first step is not exactly ln 2."""


class ModelConfig(Config):
    path: Annotated[str, Place.MODEL]
    """Hub id or folder of a Hugging Face causal language model (safetensors)."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the exported weights. The type of the computation is `engine.precision`."""

    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights; `{}` takes the defaults."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models you have read."""


class ReferenceConfig(Config):
    path: Annotated[str | None, Place.MODEL] = None
    """Hub id or folder of the reference model; null: the model before training."""

    revision: str | None = None
    """Branch, tag or commit of `path` on the hub."""

    store: Annotated[str | None, Place.FOLDER] = None
    """Folder of the reference log-prob store, shared by all runs; null: `storage.path/.reference`."""


class PromptFrom(Config):
    """Take the prompt of each row from another file, joined by a key."""

    path: Annotated[str, Place.DATA]
    """File of the prompts."""

    on: str
    """Column that both files have."""

    column: str
    """Column of the prompt text in that file."""


class SourceConfig(Config):
    path: Annotated[str, Place.DATA]
    """Hub data set name, file, glob, folder, or pyarrow filesystem URI; JSONL, JSON, Parquet, CSV, Arrow, also .gz."""

    format: Format = "auto"
    """How a row holds its pair; `auto` recognises it from the row."""

    split: str | None = None
    """Split of a hub data set; null: `train`."""

    name: str | None = None
    """Configuration name of a hub data set."""

    revision: str | None = None
    """Branch, tag or commit of a hub data set."""

    columns: dict[str, str] = {}
    """Other names for the fields: ours -> the file's, such as `{prompt: question}`."""

    prompt_from: PromptFrom | None = None
    """Prompts that stand in another file: `{path, on, column}`."""

    group_by: str | None = None
    """Column whose equal values stay on one side of the held-out split (a document, a debate); null: first turn."""

    weight: float | None = Field(default=None, ge=0)
    """Share of this source in the mixture, relative to the others' weights; 0: pairs are held out from it, none is
    trained on. Null (for all): every pair is taken."""

    num_pairs: int | None = Field(default=None, ge=1)
    """At most this many pairs of this source, by content."""

    min_margin: float = Field(default=0.0, ge=0)
    """Scored pairs: the chosen response's score must be at least this much higher; smaller gaps count as ties."""

    pairing: Literal["best_vs_worst", "best_vs_rest", "all"] = "best_vs_worst"
    """Which pairs a ranked list gives."""


class HeldOutConfig(Config):
    num_pairs: int = Field(default=512, ge=0)
    """Pairs held out by content, whole prompts at a time, and at most a fifth of all pairs. 0: no evaluation."""

    sources: tuple[SourceConfig, ...] = ()
    """Held-out pairs from their own sources instead; training pairs with one of their prompts are dropped."""


class DataConfig(Config):
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Where the pairs come from; several are mixed."""

    fraction: float = Field(default=1.0, gt=0, le=1)
    """Part of the training pairs, nested by content: the 25 % subset is contained in the 50 % subset."""

    num_pairs: int | None = Field(default=None, ge=1)
    """At most this many training pairs, nested by content."""

    subset_seed: int = 0
    """Which nested family of subsets; repeat a data-size curve with several."""

    eval: HeldOutConfig = HeldOutConfig()
    """The held-out pairs."""

    max_tokens: int = Field(default=1024, ge=2)
    """Most tokens of a prompt plus its longer response."""

    over_long: Literal["drop", "truncate_prompt_left", "truncate_response"] = "drop"
    """What happens to a longer pair."""

    on_bad_row: Literal["stop", "drop"] = "stop"
    """A row that holds no pair: stop and name it, or count and drop it."""

    chat: Literal["auto", "always", "never"] = "auto"
    """`auto`: conversations go through the tokenizer's chat template, strings are plain text. `always`: a string
    prompt becomes a user turn. `never`: plain text, also for HH-RLHF transcripts."""

    @field_validator("sources")
    @classmethod
    def _weights_for_all_or_none(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        given = [source.weight is not None for source in sources]
        if any(given) and not all(given):
            raise ValueError("give `weight` to every source or to none")
        if sources and not any(source.weight is None or source.weight > 0 for source in sources):
            raise ValueError("every `weight` is 0")
        return sources


class AnyLossConfig(Config):
    data_weights: bool = False
    """Multiply the loss of each pair by its `weight` in the data. The mean is still over the number of pairs."""


class PairLossConfig(AnyLossConfig):
    sft_weight: float = Field(default=0.0, ge=0)
    """Adds this much of the chosen response's negative log-likelihood per token (the `sft` loss)."""


class OnPolicyConfig(PairLossConfig):
    wpo: bool = False
    """Weigh each pair by how likely the policy itself is to say it (WPO, arXiv:2406.11827)."""


class ReferenceLossConfig(OnPolicyConfig):
    ld_alpha: float = Field(default=1.0, ge=0, le=1)
    """Weight of the tokens beyond the shorter response's length, in policy and reference (LD-DPO, arXiv:2409.06411);
    1 is the plain sum."""


class DivergenceConfig(ReferenceLossConfig):
    beta: float = Field(default=0.1, gt=0)
    """Weight of the implicit KL penalty to the reference; larger stays closer to it."""

    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """What measures the distance to the reference (arXiv:2309.16240); `reverse_kl` is DPO's."""

    f_alpha: float | None = Field(default=None, gt=0)
    """Order of the alpha divergence, such as 0.5; near 1 it is the reverse KL. Given with `alpha_divergence` only."""

    @model_validator(mode="after")
    def _alpha_is_of_the_alpha_divergence(self) -> "DivergenceConfig":
        if (self.f_alpha is not None) != (self.f_divergence == "alpha_divergence"):
            raise ValueError("f_alpha goes with f_divergence: alpha_divergence, and only with it")
        return self


class MarginConfig(DivergenceConfig):
    margin_weight: float = Field(default=0.0, ge=0)
    """The reward margin must exceed this times the pair's `margin` in the data, or its gap of scores (DPO with an
    offset, arXiv:2402.10571)."""


class RatioConfig(ReferenceLossConfig):
    beta: float = Field(default=0.1, gt=0)
    """Scale of the rewards, beta * (log pi - log pi_ref)."""


class DpoConfig(MarginConfig):
    kind: Literal["dpo"] = "dpo"
    """Direct Preference Optimization, eq. 7 of arXiv:2305.18290."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels (conservative DPO); 0 is plain DPO."""


class RobustConfig(MarginConfig):
    kind: Literal["robust"] = "robust"
    """DPO that is unbiased under flipped labels, arXiv:2403.00409."""

    label_smoothing: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of flipped labels."""


class IpoConfig(DivergenceConfig):
    kind: Literal["ipo"] = "ipo"
    """Identity preference optimization, eq. 17 of arXiv:2310.12036; beta is the paper's tau."""

    reduction: Literal["mean", "sum"] = "mean"
    """Log-ratios per token, as behind the paper's results, or summed."""


class HingeConfig(MarginConfig):
    kind: Literal["hinge"] = "hinge"
    """max(0, 1 - beta h), arXiv:2305.10425."""


class SigmoidNormConfig(MarginConfig):
    kind: Literal["sigmoid_norm"] = "sigmoid_norm"
    """Length-normalised DPO, eq. 6 of arXiv:2411.15124."""

    beta: float = Field(default=5.0, gt=0)
    """Weight of the penalty, per token: 5 here does about what 0.1 does in `dpo`."""


class ExoPairConfig(DivergenceConfig):
    kind: Literal["exo_pair"] = "exo_pair"
    """EXO for pairs, eq. 16 of arXiv:2402.00856."""

    label_smoothing: float = Field(default=1e-3, gt=0, lt=0.5)
    """Probability of the label being wrong; must not be 0."""


class DiscopopConfig(DivergenceConfig):
    kind: Literal["discopop"] = "discopop"
    """Log-ratio modulated loss, eq. 5 of arXiv:2406.08414."""

    tau: float = Field(default=0.05, gt=0)
    """Temperature of the blend."""


class DpopConfig(RatioConfig):
    kind: Literal["dpop"] = "dpop"
    """DPO-Positive, eq. 3 of arXiv:2402.13228."""

    penalty: float = Field(default=50.0, ge=0)
    """Weight of a chosen log-prob below the reference's (lambda in the paper)."""


class NcaPairConfig(RatioConfig):
    kind: Literal["nca_pair"] = "nca_pair"
    """Noise contrastive alignment, arXiv:2402.05369."""


class BcoPairConfig(RatioConfig):
    kind: Literal["bco_pair"] = "bco_pair"
    """Binary classifier of both responses, arXiv:2404.04656."""


class SppoHardConfig(RatioConfig):
    kind: Literal["sppo_hard"] = "sppo_hard"
    """Self-play preference optimization with hard labels, eq. 4.7 of arXiv:2405.00675."""


class ApoZeroConfig(RatioConfig):
    kind: Literal["apo_zero"] = "apo_zero"
    """Anchored: for chosen responses better than the model's own, eq. 7 of arXiv:2408.06266."""


class ApoDownConfig(RatioConfig):
    kind: Literal["apo_down"] = "apo_down"
    """Anchored: for chosen responses worse than the model's own, eq. 8 of arXiv:2408.06266."""


class AotConfig(PairLossConfig):
    kind: Literal["aot"] = "aot"
    """Optimal transport over the step: sorted log-ratios of policy and reference, arXiv:2406.05882. One more forward
    pass a step."""

    beta: float = Field(default=0.1, gt=0)
    """As in `dpo`."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """As in `dpo`."""


class SimpoConfig(OnPolicyConfig):
    kind: Literal["simpo"] = "simpo"
    """Mean log-probs with a margin, eq. 6 of arXiv:2405.14734; no reference."""

    beta: float = Field(default=2.0, gt=0)
    """Scale of the mean log-probs; 2 to 10."""

    gamma: float = Field(default=1.0, ge=0)
    """Target margin; 0.3 to 0.8 times beta."""


class CpoConfig(OnPolicyConfig):
    kind: Literal["cpo"] = "cpo"
    """DPO without a reference, eq. 5 of arXiv:2401.08417; the paper adds `sft_weight: 1`."""

    beta: float = Field(default=0.1, gt=0)
    """Scale of the log-probs."""


class OrpoConfig(AnyLossConfig):
    kind: Literal["orpo"] = "orpo"
    """Likelihood plus odds ratio, eq. 6 of arXiv:2403.07691; no reference."""

    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio (lambda in the paper)."""


class SftConfig(AnyLossConfig):
    kind: Literal["sft"] = "sft"
    """Negative log-likelihood of the chosen response, per token; needs no reference."""


SingleLoss = (
    DpoConfig
    | RobustConfig
    | IpoConfig
    | HingeConfig
    | SigmoidNormConfig
    | ExoPairConfig
    | DiscopopConfig
    | DpopConfig
    | NcaPairConfig
    | BcoPairConfig
    | SppoHardConfig
    | ApoZeroConfig
    | ApoDownConfig
    | AotConfig
    | SimpoConfig
    | CpoConfig
    | OrpoConfig
    | SftConfig
)


class SumConfig(Config):
    kind: Literal["sum"] = "sum"
    """Several losses at once, each with a weight, such as mixed preference optimization (arXiv:2411.10442)."""

    losses: tuple[Annotated[SingleLoss, Field(discriminator="kind")], ...] = Field(min_length=2)
    """Sections like `loss`, each with its `kind`. The rewards that are logged are the first one's."""

    weights: tuple[Annotated[float, Field(gt=0)], ...]
    """A weight for each."""

    @model_validator(mode="after")
    def _weights_and_rewards(self) -> "SumConfig":
        if len(self.weights) != len(self.losses):
            raise ValueError(f"{len(self.losses)} losses have {len(self.weights)} weights")
        if self.losses[0].kind == "sft":
            raise ValueError("the first of the losses gives the rewards, and `sft` has none: put it behind another")
        return self


LossConfig = Annotated[SingleLoss | SumConfig, Field(discriminator="kind")]


class BatchConfig(Config):
    pairs_per_step: int = Field(default=64, ge=1)
    """Preference pairs behind one optimizer step, over all workers. A pair is two responses."""

    tokens_per_device: int = Field(default=8192, ge=2)
    """Most tokens in one forward-backward on one device, padding included. Changes speed and memory, not results."""

    row_tokens: int = Field(default=1024, ge=2)
    """Pairs are packed into rows of about this many tokens (a longer pair has its own). Changes speed, not results.
    Not read where attention does no work between pairs (`attention` in `summary.json`): all are then in one row."""

    layout: Literal["branches", "padded"] = "branches"
    """`branches`: prompt once, both responses behind it, pairs packed. `padded`: every response in its own row."""


class OptimConfig(Config):
    learning_rate: float = Field(default=5.0e-7, gt=0)
    """Peak learning rate of AdamW. Full fine-tuning of 7-8B models: 5e-7; LoRA: 5e-6 to 5e-5."""

    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after the warm-up, to zero at the last step, as in Hugging Face's schedulers."""

    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Part of all steps in which the rate rises linearly from zero."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay, on matrices only (not on norms and biases)."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and the second moment."""

    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""

    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients of a larger norm are scaled down to it; 0: never."""


class TrainConfig(Config):
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training pairs; the last may be a part of one."""

    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, instead of `epochs`."""

    seed: int = 0
    """Order of the pairs, adapter initialisation and dropout."""

    log_every_steps: int = Field(default=10, ge=1)
    """A line of training metrics every so many steps (and at step 1)."""

    on_non_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop, or leave the step out. Its pairs are in `bad_steps.jsonl` either
    way. What the fp16 loss scaler handles is no such case."""

    max_skipped_steps: int = Field(default=10, ge=0)
    """Most steps that `skip` leaves out (counted anew at every start of the workers); then the run stops."""


class EngineConfig(Config):
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 0 replicates, 1 shards optimizer state, 2 also gradients, 3 also weights."""

    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Type of the computation. fp32 on a CPU: bf16 is several times slower there."""

    offload_optimizer: bool = False
    """Keep the optimizer's state in CPU memory (ZeRO 1 to 3)."""

    activation_checkpointing: bool = False
    """Keep only layer inputs and compute the rest again in the backward pass: less memory, a third more time."""

    @model_validator(mode="after")
    def _what_zero_0_lacks(self) -> "EngineConfig":
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("bf16 needs zero_stage 1, 2 or 3: at 0 DeepSpeed keeps no fp32 weights to add updates to")
        if self.precision == "fp16" and self.zero_stage == 0:
            raise ValueError("fp16 needs zero_stage 1, 2 or 3: at 0 DeepSpeed takes an optimizer step before the first")
        return self


class EvalConfig(Config):
    every_steps: int = Field(default=50, ge=1)
    """Evaluate on the held-out pairs every so many steps, and at the end."""


class EarlyStoppingConfig(Config):
    metric: str = "rewards/accuracies"
    """Held-out metric that decides, also which checkpoint becomes `model/`."""

    patience: int = Field(default=3, ge=1)
    """Evaluations without improvement before the run stops. Frequent evaluations need more: with one every 2 of 64
    steps, 3 stopped 5 of 12 runs that still learned, and 5 stopped 2."""

    min_improvement: float = Field(default=0.0, ge=0)
    """Smallest change that counts, in the metric's unit."""

    min_improvement_se: float = Field(default=0.0, ge=0)
    """Smallest change that counts, in standard errors of the metric; the larger of the two holds. 0.5 is sensible."""

    smoothing: int = Field(default=1, ge=1)
    """The rule sees the median of this many last evaluations; 3 calms a noisy accuracy."""

    min_steps: int = Field(default=0, ge=0)
    """No stop before this step; evaluations count from the start."""

    max_kl: float | None = Field(default=None, gt=0)
    """Stop when the held-out `kl` (nats per token) goes above this budget, whatever the metric says."""


class CheckpointConfig(Config):
    every_steps: int = Field(default=50, ge=1)
    """Save every so many steps, at every new best evaluation, and at the end."""

    every_minutes: float | None = Field(default=None, gt=0)
    """Save also when this much time has passed since the last checkpoint."""

    stop_seconds: float = Field(default=120.0, gt=0)
    """Time for a checkpoint after SIGINT or SIGTERM; then the command ends anyway, and `--resume` goes on from the one
    before. Kubernetes allows 30 s unless `terminationGracePeriodSeconds` says more."""

    keep: int = Field(default=2, ge=1)
    """Checkpoints kept: the best by the early-stopping metric; the last is always kept besides."""


class ClusterConfig(Config):
    num_workers: int = Field(default=1, ge=1)
    """Ray Train workers: one per GPU, or per group of CPU cores."""

    min_workers: int | None = Field(default=None, ge=1)
    """Go on with as few as this many when nodes are lost, and with up to `num_workers` again when nodes come; null:
    always `num_workers`, so a lost node is waited for."""

    gpus_per_worker: Literal["auto"] | float = "auto"
    """`auto`: 1 where the cluster has GPUs, else 0."""

    cpus_per_worker: float = Field(default=1, gt=0)
    """CPU cores, and torch threads, of a worker."""

    max_restarts: int = Field(default=3, ge=0)
    """Times that Ray may start the workers again after one died; the run then fails, and `--resume` continues it."""

    max_preemptions: int = Field(default=100, ge=0)
    """The same for nodes that were taken away with a notice."""

    wait_minutes: float = Field(default=30.0, gt=0)
    """Longest wait for nodes that can hold the workers, at the start and after each loss; then the run fails."""

    hang_minutes: float = Field(default=30.0, gt=0)
    """When no worker has come on for this long, those that hold up the others are named, and all start again. Must be
    longer than loading the model, one pass over a micro-batch, or writing a checkpoint."""

    resize_seconds: float = Field(default=60.0, ge=0)
    """How often a run with `min_workers` looks whether it can grow or must shrink."""

    @model_validator(mode="after")
    def _the_fewest_are_not_the_most(self) -> "ClusterConfig":
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers is more than num_workers ({self.num_workers})")
        return self


class TrackingConfig(Config):
    kind: Literal["mlflow", "none"] = "mlflow"
    """`none` keeps only the run folder."""

    uri: Annotated[str | None, Place.URL] = None
    """MLflow tracking URI; null: MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db` in `storage.path`."""

    experiment: str = "dpo-ray"
    """MLflow experiment."""

    register_as: str | None = None
    """Register the exported model under this name."""


class PoolConfig(Config):
    kind: Literal["auto", "labelled", "candidates", "prompts"] = "auto"
    """What the rows of `data.sources` are: pairs whose labels are hidden until they are asked for, prompts with two or
    more responses, or prompts alone, to which the model writes responses. `auto`: by the first row."""

    pairing: Literal["random", "all", "best_vs_worst"] = "random"
    """Which pairs the responses to one prompt form: one at random, all, or best against worst by the scores in the
    data."""

    per_label: float | None = Field(default=None, ge=1)
    """Candidate pairs that a round looks at, per label that it asks for, drawn at random; null: the whole pool, and 8
    where responses are written first and then scored."""


class SampledConfig(Config):
    max_tokens: int = Field(default=256, ge=1)
    """Most tokens of a response."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Tokens are drawn from the smallest set of this probability."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """`auto`: vLLM where it is installed and there is a GPU, else transformers' continuous batching."""


class GenerateConfig(SampledConfig):
    num_responses: int = Field(default=2, ge=2)
    """Responses that the model writes to each prompt of a pool of prompts."""

    temperature: float = Field(default=0.7, gt=0)
    """Of the candidates. Samples for `entropy` are always drawn at 1."""

    entropy_samples: int = Field(default=16, ge=2)
    """Responses sampled to each prompt for strategies that need its entropy."""


class BatchRuleConfig(Config):
    kind: Literal["top", "softmax", "power", "softrank", "k_center", "log_det"] = "top"
    """The best scores; the best after Gumbel noise (three kinds); or, of the best ones, those that differ most in their
    hidden states."""

    sharpness: float = Field(default=1.0, gt=0)
    """Of noise: how much scores weigh against it."""

    over: float = Field(default=4.0, ge=1)
    """Of `k_center` and `log_det`: candidates to choose among, per label."""

    per_prompt: int | None = Field(default=1, ge=1)
    """Most pairs of one prompt."""

    per_source: dict[str, int] | None = None
    """Most pairs of a source, by its path."""

    per_cluster: int | None = Field(default=None, ge=1)
    """Most pairs of a cluster of hidden states."""

    num_clusters: int = Field(default=64, ge=1)
    """Clusters for `per_cluster`."""

    max_cosine: float | None = Field(default=None, gt=0, le=1)
    """Pairs whose hidden states are this close to a labelled or chosen one are near-duplicates, and left out."""

    max_jaccard: float | None = Field(default=None, gt=0, le=1)
    """Pairs that share this much of their word triples with a labelled or chosen one are left out."""


class EnsembleConfig(Config):
    members: int = Field(default=5, ge=2)
    """Small heads on the policy's hidden states, trained on all labels so far, each on its own resample of them."""

    width: int = Field(default=64, ge=0)
    """Hidden units of a head; 0: linear."""

    steps: int = Field(default=200, ge=1)
    """Full-batch steps of AdamW."""

    learning_rate: float = Field(default=1e-2, gt=0)
    """Of the heads."""

    pull: float = Field(default=0.5, ge=0)
    """Weight of the distance to a head's own random start, which keeps members apart where there are no labels."""


class OracleConfig(Config):
    flip: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of answers that are turned round on purpose, for studies; by seed and content."""


class LabelsOracleConfig(OracleConfig):
    kind: Literal["labels"] = "labels"
    """The labels, or scores, that the data hides."""


class FunctionOracleConfig(OracleConfig):
    kind: Literal["function"] = "function"
    """A function of prompt and response: the higher value is preferred."""

    function: str = Field(pattern=r"^[\w.]+:\w+$")
    """`module:NAME` of a function `(prompt, response) -> float`; both are text."""


class RewardModelOracleConfig(OracleConfig):
    kind: Literal["reward_model"] = "reward_model"
    """A Hugging Face model for sequence classification with one output."""

    path: Annotated[str, Place.MODEL]
    """Hub id or folder."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""

    max_tokens: int = Field(default=2048, ge=2)
    """Longer texts lose their beginning."""


class LlmOracleConfig(OracleConfig):
    kind: Literal["llm"] = "llm"
    """A judge behind an OpenAI-compatible chat endpoint."""

    url: Annotated[str, Place.URL] = "https://api.openai.com/v1"
    """Base URL, without `/chat/completions`."""

    model: str
    """Name of the judge there."""

    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the key; null: none is sent."""

    template: str | None = None
    """The question, with `{prompt}`, `{a}` and `{b}`; the answer must end in A, B or C (a tie). Null: the built-in."""

    both_orders: bool = True
    """Ask with both orders of the responses; a judge that contradicts itself makes a tie."""

    temperature: float | None = Field(default=0.0, ge=0)
    """Of the judge; null: none is sent, for models that take none."""

    max_tokens: int = Field(default=256, ge=1)
    """Most tokens of an answer."""

    concurrency: int = Field(default=8, ge=1)
    """Requests at a time."""

    requests_per_minute: float | None = Field(default=None, gt=0)
    """Most requests per minute; null: no limit but the server's."""

    timeout_seconds: float = Field(default=60.0, gt=0)
    """Of the server's silence, after which a request is given up."""

    max_retries: int = Field(default=6, ge=0)
    """After timeouts, refused connections, status 408, 409, 429 and 5xx, and answers that name no side. Waits grow
    from 1 to 60 s; `Retry-After` is kept."""

    prices: tuple[float, float] | None = None
    """Price of a million prompt tokens and of a million answer tokens, for the cost in the report."""

    cache: Annotated[str | None, Place.FOLDER] = None
    """Folder of the answers, by content; null: `storage.path/.judge`."""


class PeopleOracleConfig(OracleConfig):
    kind: Literal["people"] = "people"
    """A queue that people work off, with `dpo-ray label` or the labelling page."""

    labellers: int = Field(default=1, ge=1, le=9)
    """People that label each pair; the majority holds, and an even vote is a tie."""

    lease_minutes: float = Field(default=15.0, gt=0)
    """A pair that somebody took and did not label comes back after this time."""


AnyOracle = Annotated[
    LabelsOracleConfig | FunctionOracleConfig | RewardModelOracleConfig | LlmOracleConfig | PeopleOracleConfig,
    Field(discriminator="kind"),
]


class AcquireConfig(Config):
    strategy: str = "certainty"
    """What is asked about: `random`, `offline_random`, `entropy`, `certainty`, `entropy_then_certainty`, `uncertainty`,
    `bald`, `bal_pm`, `d_optimal`, `adpo`, `margin_band`, `oracle_gap`."""

    options: dict[str, Any] = {}
    """Options of the strategy, such as `{per_token: true}`."""

    labels_per_round: int = Field(default=64, ge=1)
    """Labels asked for before each training."""

    budget: int = Field(default=512, ge=1)
    """Labels asked for in all."""

    start_from: Literal["base", "last"] = "base"
    """Each round trains the model of the recipe anew on all labels, or goes on from the round before with the same
    reference."""

    seed: int = 0
    """Of random order, noise and sampling; a comparison counts on from it."""

    target: float | None = None
    """Stop when the held-out metric (`early_stopping.metric`) reaches this."""

    patience: int | None = Field(default=None, ge=1)
    """Stop after so many rounds without a better held-out metric."""

    pool: PoolConfig = PoolConfig()
    """What may be asked about."""

    generate: GenerateConfig = GenerateConfig()
    """How the model writes responses."""

    batch: BatchRuleConfig = BatchRuleConfig()
    """How a round's pairs are chosen by their scores, and what a round may hold at most."""

    ensemble: EnsembleConfig = EnsembleConfig()
    """The heads of `bald` and `bal_pm`."""

    oracle: AnyOracle = LabelsOracleConfig()
    """Who labels."""


AnyJudge = Annotated[
    FunctionOracleConfig | RewardModelOracleConfig | LlmOracleConfig,
    Field(discriminator="kind"),
]


class WriteConfig(SampledConfig):
    num_responses: int = Field(default=1, ge=1)
    """Responses of each model to each prompt; the k-th are compared with each other."""

    temperature: float = Field(default=0.7, gt=0)
    """Of the responses that are judged. Those that the KL is estimated from are always drawn at 1."""


class RetentionConfig(Config):
    sources: tuple[SourceConfig, ...] = ()
    """General text whose perplexity is measured before and after: rows with a `text`, or `columns: {text: other}`."""

    num_texts: int = Field(default=200, ge=1)
    """Texts of each source, by content."""

    max_tokens: int = Field(default=512, ge=2)
    """Of each text, from its beginning; no more than the model has positions."""

    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, such as `[hellaswag, arc_easy]`; needs `pip install dpo-ray[eval]`."""

    task_folder: Annotated[str | None, Place.FOLDER] = None
    """Folder of task files of your own."""

    task_limit: int | None = Field(default=None, ge=1)
    """Most examples of a task."""


class EvaluateConfig(Config):
    prompts: tuple[SourceConfig, ...] = ()
    """What both models answer; empty: the prompts of the held-out pairs."""

    num_prompts: int = Field(default=200, ge=0)
    """At most this many prompts, by content. 0: nothing is written, so no win rate, no KL and no drift."""

    write: WriteConfig = WriteConfig()
    """How the models answer."""

    judge: AnyJudge | None = None
    """Who says which answer is better, as `acquire.oracle`: `function`, `reward_model` or `llm`. Null: no win rate."""

    mt_bench: Annotated[str | None, Place.DATA] = None
    """Questions in the form of MT-Bench (`question_id`, `turns`), whose answers are written as its tools read them."""

    retention: RetentionConfig = RetentionConfig()
    """What the model must not forget."""

    num_examples: int = Field(default=10, ge=0)
    """Prompts that the report shows with both answers."""

    seed: int = 0
    """Of the answers, and of bootstrap draws."""


class RunConfig(Config):
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._=-]*$")
    """The run folder's name: letters, digits and `._=-`."""

    storage: StorageConfig = StorageConfig()
    model: ModelConfig
    reference: ReferenceConfig = ReferenceConfig()
    data: DataConfig
    loss: LossConfig = DpoConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    eval: EvalConfig = EvalConfig()
    early_stopping: EarlyStoppingConfig | None = EarlyStoppingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    """What an aligned model is worth; read by `dpo-ray evaluate` and `dpo-ray judge` only."""

    acquire: AcquireConfig | None = None
    """Active learning; read by `dpo-ray acquire` and `dpo-ray score` only."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_that_depend_on_the_loss(cls, tree: Any) -> Any:
        """A loss without rewards is judged by the loss itself, unless the recipe says otherwise."""
        if isinstance(tree, Mapping) and isinstance(loss := tree.get("loss"), Mapping):
            if loss.get("kind") == "sft" and "early_stopping" not in tree:
                return {**tree, "early_stopping": {"metric": "loss"}}
            if "kind" not in loss:
                return {**tree, "loss": {"kind": "dpo", **loss}}
        return tree

    @property
    def folder(self) -> str:
        """The run folder: `storage.path/name`."""
        return f"{self.storage.path.rstrip('/')}/{self.name}"

    @property
    def best_metric(self) -> str:
        """The held-out metric that picks the best checkpoint."""
        if self.early_stopping is not None:
            return self.early_stopping.metric
        return "loss" if self.loss.kind == "sft" else "rewards/accuracies"


def load_run(path: Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a recipe and lay `{"loss.beta": 0.3}`-style overrides over it.

    Args:
        path: A file, or the name of a recipe that ships with the package.

    Raises:
        InputError: The file is missing or not YAML, a key or value is wrong, or a value holds a password; names the
            key.
    """
    shipped = Path(__file__).parent / "recipes" / f"{path}.yaml"
    try:
        tree = yaml.safe_load((shipped if shipped.is_file() and not Path(path).exists() else Path(path)).read_text())
    except FileNotFoundError:
        raise InputError(f"no recipe at {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise InputError(f"{path} is not a YAML recipe: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} is not a recipe: expected a mapping of sections, found {type(tree).__name__}")
    run = parse_run(tree, overrides)
    _refuse_passwords(run.model_dump(mode="json"), "")
    return run


def _refuse_passwords(value: Any, key: str) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_passwords(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_passwords(item, f"{key}.{index}")
    elif isinstance(value, str) and re.search(r"\w://[^\s/@:]*:[^\s/@]+@", value):
        raise InputError(
            f"`{key}` holds a password, and recipes are kept in run folders: take it from the environment "
            "(MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY)"
        )


def parse_run(tree: dict[str, Any], overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Validate a recipe's tree with overrides laid over it; errors as in `load_run`."""
    for key, value in (overrides or {}).items():
        tree = with_override(tree, key, value)
    return validated(RunConfig, tree)


def validated(kind: type[Section], tree: Mapping[str, Any]) -> Section:
    """A configuration from its tree.

    Raises:
        InputError: A key is unknown or has a wrong value; names it, and the nearest known one.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise InputError(_explain(error, kind)) from None


def parse_override(text: str) -> tuple[str, Any]:
    """Parse `loss.beta=0.3`; the value is YAML: numbers, lists, `null` and `{a: 1}` mean what they do in a recipe."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise InputError(f"expected key=value, such as loss.beta=0.3, got {text!r}")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        return key, value
    if isinstance(parsed, str):  # YAML 1.1 reads 5e-7 as a string; a recipe's field would take it, a sweep should too
        try:
            return key, float(parsed)
        except ValueError:
            return key, parsed
    return key, parsed


def split_recipe(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The recipe, if one is named before the overrides, and the overrides: a word without `=` is a recipe."""
    if words and "=" not in words[0]:
        return Path(words[0]), list(words[1:])
    return None, list(words)


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe."""
    return TypeAdapter(RunConfig).json_schema()


def with_override(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of `tree` with one dotted key set; digits address list items (`data.sources.0.path`)."""

    def put(node: Any, parts: list[str]) -> Any:
        if not parts:
            return value
        part, rest = parts[0], parts[1:]
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise InputError(f"{key}: the list there has {len(node)} items; address one by its number from 0")
            return [put(item, rest) if i == int(part) else item for i, item in enumerate(node)]
        if node is not None and not isinstance(node, dict):
            raise InputError(f"{key}: `{part}` lies below a single value")
        return {**(node or {}), part: put((node or {}).get(part), rest)}

    result: dict[str, Any] = put(tree, key.split("."))
    return result


def places(section: Config, prefix: str = "") -> Iterator[tuple[str, Place, str]]:
    """Every key of a recipe that leads somewhere, with what it says; not those that are null."""
    for name, field in type(section).model_fields.items():
        key, value = f"{prefix}{name}", getattr(section, name)
        if isinstance(value, str):
            yield from ((key, mark, value) for mark in field.metadata if isinstance(mark, Place))
        items = [(key, value)] if not isinstance(value, tuple) else [(f"{key}.{i}", v) for i, v in enumerate(value)]
        for below, item in items:
            if isinstance(item, Config):
                yield from places(item, f"{below}.")


def _explain(error: ValidationError, kind_of_all: type[Config]) -> str:
    """One line for the first problem: the dotted key, what is wrong, and the nearest known key."""
    problem = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    location = [str(part) for part in problem["loc"]]
    kind = ""
    for place in (4, 1) if location[:1] == ["loss"] else ():  # pydantic puts the kind behind `loss` and `losses.N`
        if len(location) > place and (place == 1 or location[1:3] == ["sum", "losses"]):
            kind = kind or location[place]
            del location[place]
    key = ".".join(location)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = sorted(_keys(kind_of_all, ""))
        pattern = ".".join("*" if part.isdigit() else part for part in location)
        if pattern in known:
            return f"`{key}` is not an option of {location[0]}.kind: {kind}{more}"
        nearest = difflib.get_close_matches(pattern, known, n=1, cutoff=0.5)
        last = [k for k in known if k.rpartition(".")[2] == location[-1]]
        hint = nearest or last
        return f"unknown key `{key}`" + (f"; did you mean `{hint[0]}`?" if hint else "") + more
    if problem["type"] == "missing":
        return f"`{key}` is required{more}"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if isinstance(problem["input"], dict | list) else f", got {problem['input']!r}"
    return f"`{key}`: {message}{given}{more}" if key else f"{message}{more}"


def recipe_keys() -> Iterator[str]:
    """Every dotted key of a recipe; `*` stands for an item's number."""
    yield from _keys(RunConfig, "")


def _keys(annotation: Any, prefix: str) -> Iterator[str]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            key = f"{prefix}{name}"
            yield key
            yield from _keys(field.annotation, f"{key}.")
        return
    inner = get_args(annotation)
    star = "*." if getattr(annotation, "__origin__", None) is tuple else ""
    for part in inner:
        yield from _keys(part, prefix + star)
