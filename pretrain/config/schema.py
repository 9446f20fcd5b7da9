"""The keys of a run file: names, types, limits and what each means.

The sections `model:`, `layout:` and `memory:` are declared in `xlstm_mcore.settings`, `data:` in
`pretrain.config.data_section`. The docstring under a field is its help text (`--help`,
docs/configuration.md) and part of its error message. Rules that need two fields are in
`pretrain.config.checks.fields`.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
)
from pydantic.fields import FieldInfo

from pretrain.config.data_section import DataConfig
from xlstm_io.remote import masked_values
from xlstm_mcore.settings import (
    Fraction,
    LayoutConfig,
    MemoryConfig,
    ModelConfig,
    NonEmpty,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


def _words(value: Any) -> Any:
    """A list may be given as one text, `a, b`, as the command line does."""
    return [w.strip() for w in value.split(",") if w.strip()] if isinstance(value, str) else value


class RunSection(Section):
    """Where the run lives and how long it is."""

    dir: NonEmpty
    """folder for checkpoints, metrics and the resolved config; rerun with it to continue"""
    steps: PositiveInt
    """optimizer steps in the whole run"""
    init_from: NonEmpty | None = None
    """checkpoint, run folder or URL whose weights a new run starts from; null for random ones"""
    init_optimizer: bool = False
    """with init_from: take the optimizer's state too"""
    seed: NonNegativeInt = 0
    """seed of the initial weights, the data order and dropout"""
    grace_seconds: PositiveFloat | None = None
    """seconds from a stop signal to the kill that follows; check compares; null: not known"""
    max_minutes: PositiveFloat | None = None
    """minutes after which a start saves and ends with exit code 75; null for no limit"""
    on_event: NonEmpty | None = None
    """command that gets a JSON object on stdin when the run stops, diverges or ends"""
    deterministic: bool = False
    """on GPUs: only operations that give the same bits every time, where there is a choice"""


class EngineConfig(Section):
    """What runs a training step."""

    name: Literal["megatron", "deepspeed"] = "megatron"
    """training engine"""
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None
    """ZeRO: share out 1 optimizer state, 2 gradients, 3 weights; null: 0 with muon, 1 with adamw"""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """deepspeed: keep the optimizer (or, at stage 3, the parameters too) in host memory"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """compute type; master weights, gates and norms are fp32 either way"""
    grad_reduce: Literal["fp32", "bf16"] = "fp32"
    """in which ranks sum gradients; bf16 halves the messages; megatron's sums are then bf16 too"""
    overlap_grad_reduce: bool | None = None
    """reduce gradients while the backward pass still runs; null for yes with NCCL, no with gloo"""
    overlap_param_gather: bool | None = None
    """megatron: gather new weights in the forward pass; null for yes with NCCL, no with gloo"""


ParameterKind = Literal[
    "embedding", "head", "norm", "skip", "recurrent", "conv", "projection", "bias"
]


class OptimizerConfig(Section):
    """AdamW; by default kernels decay, and norms, biases and the embedding do not."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the update of hidden matrices; all else gets adamw"""
    # Adam divides it by its bias correction, in fp32 on the host; beyond this that may overflow.
    lr: Annotated[float, Field(gt=0, le=1e30)] = 1e-3
    """peak learning rate"""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """decay of the running mean and square of the gradient"""
    eps: PositiveFloat = 1e-8
    """added to the root of the running square"""
    muon_momentum: Fraction = 0.95
    """muon: decay of the momentum (Nesterov's)"""
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 0.1
    """decoupled weight decay"""
    decay: dict[ParameterKind, bool] = Field(default_factory=dict)
    """which kinds of parameters decay, where it differs from the papers' choice"""
    clip_grad: NonNegativeFloat = 1.0
    """largest norm of the whole gradient; 0 never clips"""


class ScheduleConfig(Section):
    """Learning rate over steps; see `pretrain.lr_schedule` for the formulas."""

    name: Literal["constant", "linear", "cosine", "exponential", "wsd"] = "cosine"
    """shape between warmup and cooldown; wsd is warmup, stable, and a cooldown"""
    warmup_steps: NonNegativeInt = 0
    """steps of linear warmup from 0 to optimizer.lr"""
    decay_steps: PositiveInt | None = None
    """steps after the warmup until min_lr_ratio is reached; null for all up to the cooldown"""
    cooldown_steps: NonNegativeInt = 0
    """last steps of the run, falling to cooldown_min_lr_ratio"""
    cooldown_shape: Literal["linear", "1-sqrt", "cosine", "exponential"] = "linear"
    """shape of the cooldown"""
    cooldown_min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """learning rate at the end of the cooldown over optimizer.lr"""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """learning rate at the end of the decay over optimizer.lr"""
    extend: Literal["stretch", "hold", "recompute"] = "stretch"
    """if run.steps changes in mid-run: stretch the rest, hold the last rate, or compute it anew"""


class CheckpointConfig(Section):
    """When to save, where, and what to keep."""

    interval: PositiveInt = 1000
    """steps between checkpoints; the last step and a requested stop always save"""
    dir: NonEmpty | None = None
    """folder or fsspec URL (s3://...) of the checkpoints; null for checkpoints in run.dir"""
    asynchronous: bool = True
    """write in the background; training waits only for the copy to host memory"""
    keep: PositiveInt = 3
    """newest checkpoints kept; older ones are deleted"""
    keep_every: PositiveInt | None = None
    """checkpoints of steps that this divides are never deleted; null for none"""
    keep_best: NonNegativeInt = 0
    """also kept: so many with the lowest validation loss measured at their own step"""
    accept_changes: Annotated[list[NonEmpty], BeforeValidator(_words)] = Field(default_factory=list)
    """keys or sections that may differ from the checkpoint's; as an option: key,key"""


class EvaluationConfig(Section):
    """Loss on the validation split."""

    interval: PositiveInt = 1000
    """steps between evaluations; the last step always evaluates"""
    max_batches: PositiveInt | None = None
    """global batches per evaluation; null for the whole split"""
    prompts: list[str] = Field(default_factory=list)
    """texts that the model continues at every evaluation, into samples.jsonl and the report"""
    prompt_tokens: PositiveInt = 32
    """tokens to add to each prompt at most; each costs a forward pass over all prompts"""


def _not_a_switch(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


class SpikesConfig(Section):
    """Finite steps that do not fit the steps before them."""

    policy: Annotated[Literal["off", "skip", "stop"], BeforeValidator(_not_a_switch)] = "off"
    """what is done about a spike: nothing, its update is not applied, or the run stops"""
    window: Annotated[int, Field(ge=4)] = 128
    """applied steps that a step is compared with; the first so many steps are not judged"""
    z_loss: PositiveFloat = 10.0
    """robust z-score of the loss from which on it is a spike"""
    z_norm: PositiveFloat = 20.0
    """robust z-score of the gradient norm before clipping from which on it is a spike"""


class GuardConfig(Section):
    """When a run stops itself."""

    stop_on_nonfinite: bool = True
    """stop when loss or gradient is not finite; false skips that step and goes on"""
    spikes: SpikesConfig = SpikesConfig()
    """finite steps that do not fit the steps before them"""
    max_skipped: PositiveInt = 50
    """steps in a row without an update that stop a run, whatever the reason of each"""
    check_replicas: NonNegativeInt = 1000
    """steps between comparisons of what several ranks hold or compute, bit for bit; 0: never"""
    kernel_check: Literal["once", "always", "off"] = "once"
    """compare the kernels with fp64 references before training; once: per device and driver"""
    hang_timeout: NonNegativeFloat | None = None
    """seconds without progress that end a process; null: 600, or 20 median steps; 0: no watch"""
    startup_timeout: PositiveFloat = 1800.0
    """seconds from the start of a process to its first step, after which it is ended"""
    evaluation_timeout: PositiveFloat | None = None
    """seconds of one batch of an evaluation that end a process; null: as hang_timeout"""
    rendezvous_timeout: PositiveFloat = 600.0
    """seconds in which all ranks must have come; those that are missing are named, exit code 70"""
    checkpoint_timeout: PositiveFloat = 3900.0
    """seconds of waiting for a checkpoint that must be complete, after which a process is ended"""


class WandbConfig(Section):
    """Weights & Biases; needs `pip install 'xlstm-pretrain[logging]'`."""

    project: NonEmpty | None = None
    """project to write to; null: nothing is sent"""
    entity: NonEmpty | None = None
    """user or team; null for the one that is logged in"""
    name: NonEmpty | None = None
    """name of the run at W&B; null for that of the run's folder"""
    mode: Literal["online", "offline"] = "online"
    """offline: into the run's folder, for `wandb sync` later"""


class ProfileConfig(Section):
    """A profile of a few steps, on every rank."""

    from_step: PositiveInt | None = None
    """first step that is profiled, counted from 1; null: none"""
    steps: PositiveInt = 3
    """how many"""


class LoggingConfig(Section):
    """What is written while training."""

    interval: PositiveInt = 10
    """steps between lines in metrics.jsonl and on the screen"""
    tensorboard: bool = True
    """also write TensorBoard events"""
    wandb: WandbConfig = WandbConfig()
    """also write to Weights & Biases"""
    ranks: NonNegativeInt = 100
    """steps between comparisons of the ranks, which name slow hosts; 0: never"""
    cells: NonNegativeInt = 0
    """steps between looks into every layer: gates, states, gradients and updates; 0: never"""
    profile: ProfileConfig = ProfileConfig()
    """trace and table of a few steps, into profile/ of the run's folder"""
    peak_tflops: PositiveFloat | None = None
    """dense TFLOP/s of one device, for the utilisation (mfu); null for the maker's bf16 figure"""


class RunConfig(Section):
    """One training run. Sections run, model and data have keys without a default."""

    run: RunSection
    model: ModelConfig
    data: DataConfig
    layout: LayoutConfig = Field(default_factory=LayoutConfig)
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)

    @model_serializer(mode="wrap")
    def _for_files(
        self, dump: SerializerFunctionWrapHandler, about: SerializationInfo
    ) -> dict[str, Any]:
        """As JSON, which goes into files that are shared, without credentials of URLs."""
        values = dump(self)
        return masked_values(values) if about.mode == "json" else values

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one global batch, after the ramp."""
        return self.data.global_batch * self.data.seq_len


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type)
}
# By dotted key, such as `optimizer.lr`.
FIELDS: dict[str, FieldInfo] = {
    f"{section}.{key}": field
    for section, model in SECTIONS.items()
    for key, field in model.model_fields.items()
}
