"""The base model and its tokenizer: from a folder, the hub or an earlier run, or built from a config."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from taskmoe.moe.config import ConfigError
from taskmoe.moe.tasks import TaskTable
from taskmoe.train.config import Config
from taskmoe.train.earlier_run import earlier_run
from taskmoe.train.vocabulary import train_tokenizer

# Set here from the tokenizer and the tasks; a value in the settings would contradict them.
OWN_KEYS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "num_labels", "model_type")
# transformers refuses a model in these ways (its own errors are subclasses of the first three).
LOAD_ERRORS = (OSError, ValueError, ImportError, RuntimeError, KeyError, TypeError, SafetensorError)


def build_tokenizer(config: Config, texts: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer of ``model_name_or_path``, or one trained on ``texts`` for a model built from a config.

    A trained one is of ``tokenizer.kind``: ``bpe`` (byte-level, loses nothing), ``wordlevel`` (split at
    whitespace), ``char``; rare words or characters beyond ``tokenizer.vocab_size`` become the unknown token.
    The same texts give the same tokenizer. A pretrained one without a padding token pads with its end token
    (padding is masked and never a label), so that no embedding has to be added.

    Raises:
        ConfigError: no such model, no end token to pad with, an unknown kind, a vocabulary too small.
    """
    _require_one_source(config)
    if config.model_name_or_path is None:
        assert config.model is not None
        return train_tokenizer(config.tokenizer, _model_type(config.model), texts)
    run = earlier_run(config.model_name_or_path)
    path = _checked_path(config.model_name_or_path) if run is None else str(run.tokenizer)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except LOAD_ERRORS as error:
        raise ConfigError(f"model_name_or_path: no tokenizer in {path!r}: {_one_line(error)}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"model_name_or_path: the tokenizer of {path!r} has neither a padding nor an end token; "
                "add a pad_token to its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_model(config: Config, tokenizer: PreTrainedTokenizerBase, tasks: TaskTable) -> PreTrainedModel:
    """The base model, in training mode off, its new weights drawn from ``config.seed`` alone.

    CAUSAL_LM and SEQ_2_SEQ_LM give the language model; SEQ_CLS gives the model with its own classification
    head of ``num_labels`` = the largest label count (``pooling: model``), or the bare encoder without pooler
    (``pooling: mean``); the heads per task come from ``taskmoe.moe.heads.attach_heads``. FEATURE_EXTRACTION
    gives the bare encoder. With ``bf16`` the
    weights are bf16 unless a phase trains the base: whatever trains stays in fp32.

    Raises:
        ConfigError: no such model or folder, a model that does not fit the task type, an unknown key or type
            in ``model:``, missing weights, a vocabulary or a length the model has no embeddings for.
    """
    _require_one_source(config)
    if (run := earlier_run(config.model_name_or_path)) is not None:
        its = run.config()
        same = replace(config, model=its.model, model_name_or_path=its.model_name_or_path)
        built = build_model(same, tokenizer, tasks)
        run.load_base(built, new_head=config.task_type == "SEQ_CLS")
        return built
    base_trains = any("base" in phase.train for phase in config.phases)
    kwargs: dict[str, Any] = {"dtype": torch.bfloat16 if config.bf16 and not base_trains else torch.float32}
    if config.attn_implementation is not None:
        kwargs["attn_implementation"] = config.attn_implementation
    if config.model_name_or_path is None:
        assert config.model is not None
        where, hf_config = "model", _new_config(config.model, tokenizer)
    else:
        where, hf_config = "model_name_or_path", _pretrained_config(config)
    auto = _auto_class(config, hf_config, where)
    if auto is AutoModelForSequenceClassification:
        hf_config.num_labels = max((len(task.labels or ()) for task in tasks), default=0) or 1
    elif auto is AutoModel and type(hf_config) in MODEL_MAPPING:
        cls = MODEL_MAPPING[type(hf_config)]
        if isinstance(cls, type) and "add_pooling_layer" in inspect.signature(cls).parameters:
            kwargs["add_pooling_layer"] = False
    _check_length(config, hf_config, where)
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(config.seed)
        try:
            if config.model_name_or_path is None:
                model = auto.from_config(hf_config, **kwargs)
            else:
                model = _load(auto, config, hf_config, kwargs)
        except ConfigError:
            raise
        except LOAD_ERRORS as error:
            raise ConfigError(f"{where}: cannot build {hf_config.model_type}: {_one_line(error)}") from error
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ConfigError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens but the model embeds {rows}; embeddings "
            "are not resized here: save the model with resized embeddings first"
        )
    for settings in (model.config, getattr(model, "generation_config", None)):
        if settings is not None and getattr(settings, "pad_token_id", None) is None:
            settings.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def _require_one_source(config: Config) -> None:
    if (config.model_name_or_path is None) == (config.model is None):
        found = "neither" if config.model is None else "both"
        raise ConfigError(
            f"model_name_or_path, model: {found} given; set exactly one (a folder or hub name, "
            "or a config such as {type: llama, hidden_size: 64})"
        )


def _one_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 300 else text[:297] + "..."


@contextmanager
def _quiet() -> Iterator[None]:
    """Mute transformers' load report and bar, on every rank; :func:`_load` checks what is missing."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _checked_path(name: str) -> str:
    """A model folder that exists, or a name to look up on the hub.

    Raises:
        ConfigError: a path that is not there, or a folder without a model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"model_name_or_path: {name!r} is neither a model folder (it has no config.json) nor a run's"
            )
        return str(path)
    if path.is_file():
        raise ConfigError(f"model_name_or_path: {name!r} is a file; give the folder that holds config.json")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name or not name:
        hint = "; `taskmoe train` makes that of a run" if "runs" in path.parts else ""
        raise ConfigError(f"model_name_or_path: no such folder {name!r}{hint}")
    return name


def _pretrained_config(config: Config) -> PreTrainedConfig:
    assert config.model_name_or_path is not None
    path = _checked_path(config.model_name_or_path)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except LOAD_ERRORS as error:
        raise ConfigError(f"model_name_or_path: cannot read {path!r}: {_one_line(error)}") from error


def _load(auto: Any, config: Config, hf_config: PreTrainedConfig, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load the weights and insist that everything but a new classification head was there."""
    assert config.model_name_or_path is not None
    model, info = auto.from_pretrained(
        _checked_path(config.model_name_or_path),
        config=hf_config,
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=config.task_type == "SEQ_CLS",  # another task's head
        **kwargs,
    )
    fresh = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    if auto is AutoModelForSequenceClassification:
        base = model.base_model_prefix + "."
        fresh = {key for key in fresh if key.startswith(base)}
    if fresh:
        hint = "; use pooling: mean" if auto is AutoModelForSequenceClassification else ""
        raise ConfigError(
            f"model_name_or_path: {config.model_name_or_path!r} has no weights for {len(fresh)} tensors of "
            f"{type(model).__name__}, for example {sorted(fresh)[0]}{hint}"
        )
    return model


def _model_type(values: dict[str, Any]) -> str:
    """The ``type`` of ``model:``.

    Raises:
        ConfigError: missing, or unknown to transformers.
    """
    kind = values.get("type")
    if not isinstance(kind, str):
        raise ConfigError(
            f"model.type: {kind!r} is not a model type; give one such as llama, gpt2, t5 or bert"
        )
    if kind not in CONFIG_MAPPING_NAMES:
        near = difflib.get_close_matches(kind, CONFIG_MAPPING_NAMES, n=3) or ["llama", "gpt2", "t5", "bert"]
        raise ConfigError(f"model.type: unknown model type {kind!r}; the nearest are {', '.join(near)}")
    return kind


def _new_config(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    kind = _model_type(values)
    cls = CONFIG_MAPPING[kind]
    known = {*getattr(cls, "__dataclass_fields__", ()), *getattr(cls, "attribute_map", {})}
    known |= {
        *inspect.signature(cls.__init__).parameters,
        *vars(cls()),
        "decoder_start_token_id",
        "rope_theta",
    }
    known = {key for key in known if not key.startswith("_")} - {
        "self",
        "args",
        "kwargs",
        "transformers_version",
    }
    # A key without a value takes back what a file below says.
    own = {key: value for key, value in values.items() if key != "type" and value is not None}
    for key in own:
        if key in OWN_KEYS:
            raise ConfigError(
                f"model.{key}: {own[key]!r} is not yours to set; it follows from the tokenizer and the data"
            )
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3) or sorted(known)[:8]
            raise ConfigError(f"model.{key}: unknown key for {kind}; the nearest are {', '.join(near)}")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    try:
        hf_config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **ids, **own)
    except Exception as error:  # each config class validates in its own way
        raise ConfigError(f"model: {kind} refuses these values: {_one_line(error)}") from error
    if hf_config.is_encoder_decoder and "decoder_start_token_id" not in own:
        hf_config.decoder_start_token_id = tokenizer.pad_token_id  # as T5 does
    return hf_config


def _auto_class(config: Config, hf_config: PreTrainedConfig, where: str) -> Any:
    """The auto class of the task type.

    Raises:
        ConfigError: an unknown task type or pooling, or a model that has no such form.
    """
    if config.task_type not in AUTO_CLASSES:
        raise ConfigError(f"task_type: {config.task_type!r} is none of {', '.join(AUTO_CLASSES)}")
    auto = AUTO_CLASSES[config.task_type]
    if config.task_type == "SEQ_CLS":
        if config.pooling not in ("model", "mean"):
            raise ConfigError(f"pooling: {config.pooling!r} is neither model nor mean")
        if config.pooling == "mean":
            auto = AutoModel
    if auto is AutoModel and hf_config.is_encoder_decoder:
        auto = AutoModelForTextEncoding
    remote = config.trust_remote_code and auto.__name__ in (getattr(hf_config, "auto_map", None) or {})
    if type(hf_config) in auto._model_mapping or remote:
        return auto
    fits = [t for t, cls in AUTO_CLASSES.items() if type(hf_config) in cls._model_mapping]
    raise ConfigError(
        f"task_type: {config.task_type} does not fit {where} of type {hf_config.model_type}; "
        f"it fits {', '.join(fits) or 'none of the task types'}"
    )


def _check_length(config: Config, hf_config: PreTrainedConfig, where: str) -> None:
    positions = getattr(hf_config, "max_position_embeddings", None)
    if isinstance(positions, int) and config.data.max_length > positions > 0:
        raise ConfigError(
            f"data.max_length: {config.data.max_length} is more than the {positions} positions of {where} "
            f"({hf_config.model_type}: max_position_embeddings)"
        )


AUTO_CLASSES: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "FEATURE_EXTRACTION": AutoModel,
}
