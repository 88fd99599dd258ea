"""Every setting of a run: nested frozen dataclasses, named as Hugging Face names them."""

from __future__ import annotations

from dataclasses import dataclass, field

from taskmoe.moe.config import ConfigError, TaskMoEConfig

__all__ = ["BalancingConfig", "Config", "ConfigError", "ContrastiveConfig", "DataConfig", "DatasetConfig",
           "EvaluationConfig", "MixingConfig", "PhaseConfig", "SkillGymConfig", "SurgeryConfig",
           "TokenizerConfig", "TrackConfig"]  # fmt: skip


@dataclass(frozen=True)
class TokenizerConfig:
    """A tokenizer trained on the training data; only for models built from a config."""

    kind: str = "bpe"  # bpe | wordlevel | char
    vocab_size: int = 4096


@dataclass(frozen=True)
class SkillGymConfig:
    """The built-in generator: tasks that are compositions of latent string operations."""

    num_tasks: int = 12
    num_skills: int = 6
    skills_per_task: int = 2
    alphabet_size: int = 16
    max_string_length: int = 8
    min_string_length: int = 3
    train_rows: int = 2000  # per task
    validation_rows: int = 100
    test_rows: int = 100
    task_visible: bool = False  # True: the task's name stands in the input
    unseen_tasks: int = 0  # compositions kept out of training (generated, but not in the mixture)
    correlation: float = 0.5  # probability that a task takes a skill from its own family
    rivals: int = 1  # tasks in a row that have the same skills, but answer in other letters; 1: none
    conflict: float = 1.0  # rivals: share of an answer's letters, the first ones, in which they differ
    seed: int = 0


@dataclass(frozen=True)
class DatasetConfig:
    """One data source: a file, a folder, or a name on the hub."""

    name: str | None = None  # the task's name, unless the rows carry a task column
    path: str = ""
    subset: str | None = None  # the hub's configuration name
    split: str = "train"
    validation_path: str | None = None
    validation_split: str | None = None
    test_path: str | None = None
    test_split: str | None = None
    # auto, text_label, input_output, instruction, prompt_completion, messages, conversations, pairs
    format: str = "auto"
    template: str | None = None  # Jinja, placeholders are the row's columns and task, its name
    weight: float | None = None  # sampling share (mixing.strategy: explicit)
    group: str | None = None
    metric: str | None = None
    labels: tuple[str, ...] | None = None
    task_column: str | None = None  # default: the first of task, channel, data_name, task_id, task_type
    max_rows: int | None = None


@dataclass(frozen=True)
class DataConfig:
    """How rows become tokens."""

    root: str | None = None  # one folder a task: train|validation|test.jsonl
    skill_gym: SkillGymConfig | None = None
    template: str | None = None  # default template of all datasets
    max_length: int = 256  # tokens of a sequence (seq2seq: of the input)
    max_target_length: int = 64  # seq2seq: tokens of the target; contrastive: of a text to find
    on_bad_row: str = "error"  # error | skip
    on_long_row: str = "error"  # error | skip | truncate
    packing: bool = False
    group_by_length_window: int = 1  # optimiser steps over which rows are regrouped by length
    cache_dir: str | None = None
    max_rows_per_task: int | None = None


@dataclass(frozen=True)
class MixingConfig:
    """Which task each sequence comes from."""

    strategy: str = "unimax"  # proportional | equal | temperature | capped | explicit | unimax
    temperature: float = 2.0  # strategy: temperature
    cap: int | None = None  # strategy: capped (examples), optional for temperature
    max_epochs: float = 4.0  # strategy: unimax
    weights: dict[str, float] | None = None  # strategy: explicit, {task: weight}


@dataclass(frozen=True)
class PhaseConfig:
    """One phase of a schedule; what is None is as in the run."""

    name: str = "main"
    steps: int | None = None  # None: what is left of max_steps
    train: tuple[str, ...] = ("experts", "router", "task_embedding", "heads", "saved")
    adapters: bool = True  # False: the base model alone runs (for phases that train the base)
    mixing: MixingConfig | None = None
    learning_rate: float | None = None
    router_learning_rate: float | None = None
    task_embedding_learning_rate: float | None = None
    base_learning_rate: float | None = None
    router_temperature: tuple[float, float] | None = None  # from, to, over the phase
    router_temperature_schedule: str = "linear"  # linear | exponential: the same factor every step
    gate: str | None = None  # another gate than moe.gate, with its default options
    reinit: tuple[str, ...] = ()  # groups that start anew as the phase begins: experts, router, ...
    restart_schedule: bool = False  # warm-up and decay begin anew here; False: one schedule over the run


@dataclass(frozen=True)
class BalancingConfig:
    """How the tasks' losses are weighed as they go; the weights multiply task_weights."""

    method: str | None = None  # fixed | random | uncertainty | dwa | coba | famo (taskmoe.train.balancing)
    options: dict | None = None  # of the method, for example {lr: 0.02}
    validation_rows: int = 1  # method: coba; validation rows of each task that every step looks at


SURGERY_WAYS = ("auto", "fused", "separate", "slices")
SURGERY_SCOPES = ("all", "experts", "routers", "layer")


@dataclass(frozen=True)
class SurgeryConfig:
    """How the tasks' gradients are combined where they conflict; without a method they are summed."""

    method: str | None = None  # sum | mean | pcgrad | upgrad | cagrad | ... (taskmoe.train.surgery)
    options: dict | None = None  # of the method, for example {reduction: mean}
    scope: str = "all"  # all shared parameters | experts | routers | layer (all, layer by layer)
    way: str = "auto"  # fused (one backward pass) | separate (one a task) | slices (one a task's rows) | auto
    refresh_every: int = 1  # steps that use the same weights
    max_tasks: int = 16  # rows of the Gramian; above it tasks share rows, in random groups
    matrix_steps: int | None = None  # every so many steps log the cosine of every pair of tasks


@dataclass(frozen=True)
class ContrastiveConfig:
    """task_type FEATURE_EXTRACTION: each query must find its text among those of its task in the batch."""

    similarity: str = "cosine"  # cosine | dot
    temperature: float = 0.05  # similarities are divided by it


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured, and on how much."""

    metrics: dict[str, str] | None = None  # {task name pattern: metric}; first match wins
    groups: dict[str, str] | None = None  # {group: task name pattern}: the score averages these first
    max_rows: int | None = None  # per task, during training
    max_new_tokens: int = 32
    num_beams: int = 1
    controls: bool = False  # score the end of training with the experts disabled and with uniform gates too


@dataclass(frozen=True)
class TrackConfig:
    """wandb, the log and the report."""

    wandb_project: str = "taskmoe"
    wandb_entity: str | None = None
    per_task_keys: int = 64  # at most so many tasks get curves of their own in wandb
    detail: str = "brief"  # brief | detailed: with curves for each routing group in wandb
    max_keys: int = 1000  # at most so many curves in wandb
    media_steps: int | None = None  # tables and images every so many steps; null: with each evaluation
    log_artifacts: bool = False  # a wandb artifact for each checkpoint
    report: bool = True  # write report.html at the end


@dataclass(frozen=True)
class Config:
    """One run."""

    # model
    model_name_or_path: str | None = None
    model: dict | None = None  # {type: llama, hidden_size: ...}: built from a config instead
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    task_type: str = "CAUSAL_LM"  # CAUSAL_LM | SEQ_2_SEQ_LM | SEQ_CLS | FEATURE_EXTRACTION (contrastive)
    # SEQ_CLS, FEATURE_EXTRACTION: model (the model's own head; the first position) | mean (of the last hidden
    # state over the text)
    pooling: str = "model"
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    # experts and routers
    moe: TaskMoEConfig = field(default_factory=TaskMoEConfig)
    # data
    datasets: tuple[DatasetConfig, ...] = ()
    data: DataConfig = field(default_factory=DataConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    # optimisation
    output_dir: str = "runs/run"
    overwrite_output_dir: bool = False  # remove the run that output_dir holds
    seed: int = 42
    max_steps: int = 1000  # 0: nothing trains; what was attached is evaluated and saved
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    optim: str = "adamw_torch"  # adamw_torch | sgd
    learning_rate: float = 1e-3  # experts, heads, saved modules
    router_learning_rate: float | None = None  # None: 10 x learning_rate
    task_embedding_learning_rate: float | None = None  # None: router_learning_rate
    base_learning_rate: float | None = None  # None: learning_rate; used where a phase trains the base
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    lr_scheduler_type: str = "linear"  # linear | cosine | constant
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None
    loss_reduction: str = "token"  # token | task | sample
    task_weights: dict[str, float] | None = None  # loss weight per task, default 1
    balancing: BalancingConfig = field(default_factory=BalancingConfig)
    surgery: SurgeryConfig = field(default_factory=SurgeryConfig)
    label_smoothing_factor: float = 0.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    gradient_checkpointing_reentrant: bool = False
    phases: tuple[PhaseConfig, ...] = (PhaseConfig(),)
    deepspeed: str | None = None  # a DeepSpeed JSON; "auto" values are filled in
    # following along
    logging_steps: int = 10
    eval_steps: int | None = None
    eval_split: str = "validation"
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    save_steps: int | None = None
    save_total_limit: int = 2
    metric_for_best_model: str = "score"  # score | loss
    early_stopping_patience: int | None = None  # evaluations without a better one
    resume_from_checkpoint: str | None = None  # true | PATH
    report_to: tuple[str, ...] = ("wandb",)
    run_name: str | None = None
    track: TrackConfig = field(default_factory=TrackConfig)
