"""Which keys the chosen settings ignore, and why.

Setting one of them is an error: a run that ignores without a word what it was told cannot be trusted.
"""

from __future__ import annotations

from collections.abc import Iterator

from taskmoe.train.config import Config, MixingConfig

Rule = tuple[str, bool, str]  # (path, whether it is ignored, the reason)


def ineffective(config: Config) -> dict[str, str]:
    """{dotted path of a key or a section: why it has no effect}, whether it was set or not.

    ``datasets`` beside ``data.root`` is not in it: the folders take templates, labels and metrics from there.
    """
    rules = [*_model(config), *_experts(config), *_data(config), *_optimisation(config), *_following(config)]
    for i in range(len(config.phases)):
        rules += _phase(config, i)
    rules += _mixing("mixing", config.mixing)
    return {path: reason for path, ignored, reason in rules if ignored}


def _model(config: Config) -> Iterator[Rule]:
    named = config.model_name_or_path is not None
    yield "tokenizer", named, "a model named by model_name_or_path brings its own tokenizer"
    yield "trust_remote_code", not named, "there is no model_name_or_path to load code from"
    encodes = config.task_type in ("SEQ_CLS", "FEATURE_EXTRACTION")
    yield "pooling", not encodes, f"task_type is {config.task_type!r}, which pools nothing"
    contrasts = config.task_type == "FEATURE_EXTRACTION"
    yield "contrastive", not contrasts, f"task_type is {config.task_type!r}, not 'FEATURE_EXTRACTION'"
    yield "label_smoothing_factor", contrasts, "task_type is 'FEATURE_EXTRACTION': nothing is smoothed"
    yield (
        "gradient_checkpointing_reentrant",
        not config.gradient_checkpointing,
        "gradient_checkpointing is false",
    )


def _experts(config: Config) -> Iterator[Rule]:
    from taskmoe.moe.choices import ignored  # imports torch

    for key, reason in ignored(config.moe).items():
        # Heads have rows of tasks, whatever the experts and routers have.
        yield f"moe.{key}", not (key == "new_task_rows" and config.task_type == "SEQ_CLS"), reason
    yield from _rates("", config, config.task_embedding_learning_rate)


def absent_groups(config: Config) -> dict[str, str]:
    """{group of parameters of which none trains, whatever a phase says: why}."""
    from taskmoe.moe.choices import absent_groups as absent_of

    found = absent_of(config.moe)
    if config.task_type != "SEQ_CLS":
        found["heads"] = f"task_type is {config.task_type!r}, which has no heads"
    if not config.moe.modules_to_save:
        found["saved"] = "moe.modules_to_save is not set"
    return found


def _rates(prefix: str, config: Config, of_vectors: float | None) -> Iterator[Rule]:
    """Learning rates of groups that the choices do not have; of_vectors: that of the task embedding."""
    absent = absent_groups(config)
    vectors = absent.get("task_embedding", "")
    yield f"{prefix}task_embedding_learning_rate", bool(vectors), vectors
    # It holds for vectors of tasks too, where they have no rate of their own.
    alone = bool(vectors) or of_vectors is not None
    yield f"{prefix}router_learning_rate", "router" in absent and alone, absent.get("router", "")


def _data(config: Config) -> Iterator[Rule]:
    data, kind = config.data, config.task_type
    one_text = kind in ("CAUSAL_LM", "SEQ_CLS")
    yield "data.max_target_length", one_text, f"task_type is {kind!r}, whose rows are one text each"
    if data.skill_gym is not None:
        yield "data.skill_gym.conflict", data.skill_gym.rivals == 1, "data.skill_gym.rivals is 1"
    yield "data.group_by_length_window", data.packing, "data.packing is true: packs have no padding to save"
    explicit = [m for m in _mixings(config) if m.strategy == "explicit"]
    for i in range(len(config.datasets)):
        yield f"datasets.{i}.weight", not explicit, "mixing.strategy is not 'explicit'"
        yield (
            f"datasets.{i}.weight",
            bool(explicit) and all(m.weights for m in explicit),
            "mixing.weights is set",
        )
    for key in ("evaluation.max_new_tokens", "evaluation.num_beams"):
        yield key, kind in ("SEQ_CLS", "FEATURE_EXTRACTION"), f"task_type is {kind!r}: nothing is generated"


def _optimisation(config: Config) -> Iterator[Rule]:
    for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        yield key, config.optim != "adamw_torch", f"optim is {config.optim!r}"
    yield "warmup_ratio", config.warmup_steps is not None, "warmup_steps is set; give one of the two"
    trained = {group for phase in config.phases for group in phase.train}
    yield "bf16", "base" in trained, "a phase trains the base, and what trains is kept in fp32"
    yield "base_learning_rate", "base" not in trained, "no phase trains the base"
    yield "router_learning_rate", not trained & {"router", "task_embedding"}, "no phase trains the router"
    yield (
        "task_embedding_learning_rate",
        "task_embedding" not in trained,
        "no phase trains the task embedding",
    )
    yield from _balancing(config)
    yield from _surgery(config)
    own = bool(config.phases) and all(phase.mixing is not None for phase in config.phases)
    yield "mixing", own, "every phase has a mixing of its own"


def _balancing(config: Config) -> Iterator[Rule]:
    method = config.balancing.method
    yield "balancing.options", method is None, "balancing.method is not set"
    yield "balancing.validation_rows", method != "coba", f"balancing.method is {method!r}, not 'coba'"


def _surgery(config: Config) -> Iterator[Rule]:
    surgery = config.surgery
    for key in ("options", "scope", "way", "refresh_every", "max_tasks", "matrix_steps"):
        yield f"surgery.{key}", surgery.method is None, "surgery.method is not set"
    nothing = unshared_scopes(config).get(surgery.scope)
    yield "surgery.scope", nothing is not None, nothing or ""


def unshared_scopes(config: Config) -> dict[str, str]:
    """{scope of surgery in which no phase trains what tasks share: the reason}."""
    from taskmoe.moe.choices import shared_groups

    trained = {group for phase in config.phases for group in phase.train} - absent_groups(config).keys()
    shared = trained & {"base", "saved", *shared_groups(config.moe)}
    of_scope = {"experts": shared & {"experts"}, "routers": shared & {"router"}}
    found = {s: f"no phase trains {s} that tasks share" for s, those in of_scope.items() if not those}
    if not shared:
        found.update(dict.fromkeys(("all", "layer"), "no phase trains anything that tasks share"))
    return found


def _following(config: Config) -> Iterator[Rule]:
    for key in ("wandb_project", "wandb_entity", "per_task_keys", "detail", "max_keys", "log_artifacts"):
        yield f"track.{key}", "wandb" not in config.report_to, "report_to does not name wandb"
    yield "early_stopping_patience", config.eval_steps is None, "eval_steps is not set"


def _phase(config: Config, i: int) -> Iterator[Rule]:
    from taskmoe.moe.choices import choices_in_use, keys_read
    from taskmoe.moe.gates import GATES, with_gate

    phase, here = config.phases[i], f"phases.{i}"
    moe, chosen = config.moe, choices_in_use(config.moe)
    yield f"{here}.base_learning_rate", "base" not in phase.train, "the phase does not train the base"
    router = bool({"router", "task_embedding"} & set(phase.train))
    yield f"{here}.router_learning_rate", not router, "the phase does not train the router"
    embedding = f"{here}.task_embedding_learning_rate"
    yield embedding, "task_embedding" not in phase.train, "the phase does not train the task embedding"
    own = phase.task_embedding_learning_rate
    yield from _rates(f"{here}.", config, config.task_embedding_learning_rate if own is None else own)
    yield f"{here}.gate", not phase.adapters, f"{here}.adapters is false"
    yield f"{here}.gate", "gate" not in chosen, f"moe.bank {moe.bank!r} takes no gates"
    gated = phase.gate in GATES and "gate" in chosen
    cold = "router_temperature" not in keys_read(with_gate(moe, str(phase.gate)) if gated else moe)
    key, gate = ("moe", moe.gate) if phase.gate is None else (here, phase.gate)
    options = f" with {moe.gate_options}" if moe.gate_options and not gated else ""
    for name in ("router_temperature", "router_temperature_schedule"):
        yield f"{here}.{name}", not phase.adapters, f"{here}.adapters is false"
        yield f"{here}.{name}", cold, f"{key}.gate is {gate!r}{options}"
    constant = phase.router_temperature is None
    yield f"{here}.router_temperature_schedule", constant, f"{here}.router_temperature is not set"
    yield f"{here}.reinit", i == 0, "the first phase starts from fresh weights in any case"
    yield f"{here}.restart_schedule", i == 0, "the first phase begins the schedule in any case"
    if phase.mixing is not None:
        yield from _mixing(f"{here}.mixing", phase.mixing)


def _mixing(here: str, mixing: MixingConfig) -> Iterator[Rule]:
    uses = {
        "temperature": ("temperature",),
        "cap": ("capped", "temperature"),
        "max_epochs": ("unimax",),
        "weights": ("explicit",),
    }
    for key, strategies in uses.items():
        wanted = " or ".join(map(repr, strategies))
        yield (
            f"{here}.{key}",
            mixing.strategy not in strategies,
            f"{here}.strategy is {mixing.strategy!r}, not {wanted}",
        )


def _mixings(config: Config) -> list[MixingConfig]:
    return [phase.mixing or config.mixing for phase in config.phases]
