"""From a source to a float model on the CPU, its tokenizer, and the files that go along with it.

Directories and GGUF files take the same path: a config, an empty model made from it, the names and
shapes of the files' tensors held against those of that model, and only then the tensors, one by one.
Code that a model brings along (`trust_remote_code`) is never run.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from atomq.config import ResidualRotation
from atomq.errors import ConfigError, StorageError, UnsupportedModelError
from atomq.models.attention import attention_for
from atomq.models.experts import unfuse_experts
from atomq.models.families import STORED_NAMES, find_family
from atomq.models.gguf import read_gguf
from atomq.models.gguf_model import gguf_config, gguf_tensors
from atomq.models.gguf_tokenizer import gguf_tokenizer
from atomq.models.rotation import rotated_tensors
from atomq.models.source import ModelSource, read_config, weight_files
from atomq.models.streaming import StoredWeights, make_buffers
from atomq.models.weights import StoredTensor, read_safetensors_header

STORAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them must be there
_COMPANIONS = (
    *_TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)

# What transformers raises at a config.json with values of the wrong kind.
CONFIG_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    StrictDataclassError,
)


def load_float_model(source: ModelSource, storage_dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load the model on the CPU, in eval mode, with float32 parameters that need no gradient.

    For arguments, the model's config and errors see `open_float_model`.
    """
    model, weights = open_float_model(source, storage_dtype)
    weights.fill(model, "")
    model.tie_weights()
    model.requires_grad_(False)
    return model


def open_float_model(
    source: ModelSource, storage_dtype: torch.dtype | None = None, rotation: ResidualRotation = "none"
) -> tuple[PreTrainedModel, StoredWeights]:
    """The skeleton of the model, in eval mode, and its weights, of which none is read yet.

    Args:
        storage_dtype: float16, bfloat16 or float32; None takes the dtype of the source's embeddings, and
            float16 for GGUF.
        rotation: "fused": the same model with its residual stream rotated (`models.rotation`); its head is
            not tied to the embeddings; never "auto", which is settled before.

    Returns:
        A model whose parameters are on the meta device, whose buffers are on the CPU, whose `config.dtype` is
        the storage dtype and whose config names no path and no quantization.

    Raises:
        UnsupportedModelError: the family is not known, or a tensor is missing, unknown or misshapen; when
            weights are read, one that is not finite or too large for the storage dtype; the message names it.
        ConfigError: the storage dtype is none of the three, or the family cannot be rotated.
    """
    assert rotation != "auto"
    config = load_config(source)
    family = find_family(config.model_type)
    stored = _stored_tensors(source, config)
    if config.num_hidden_layers > len(stored):  # a corrupt number could ask for a billion blocks
        raise UnsupportedModelError(
            f"{source.name} should have {config.num_hidden_layers} blocks (num_hidden_layers), "
            f"but has only {len(stored)} tensors"
        )
    model = empty_model(config, source)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tied_head = stored.pop(f"{family.lm_head}.weight", None) if config.tie_word_embeddings else None
    _check_names_and_shapes(stored, expected, source)
    embeddings = stored[f"{family.embeddings}.weight"]
    storage_dtype = storage_dtype or embeddings.dtype or torch.float16
    if storage_dtype not in STORAGE_DTYPES:
        raise ConfigError(f"storage dtype {storage_dtype} is none of {STORAGE_DTYPES}")
    weights = StoredWeights(source.name, stored, storage_dtype)
    if tied_head is not None and not torch.equal(tied_head.read(), embeddings.read()):
        weights.read(f"{family.embeddings}.weight")  # no NaN is equal to itself
        raise UnsupportedModelError(
            f"{source.name}: {family.lm_head}.weight differs from the embeddings, but config.json ties them "
            f"(tie_word_embeddings); correct config.json"
        )
    if rotation == "fused":
        stored.setdefault(f"{family.lm_head}.weight", embeddings)
        stored = rotated_tensors(stored, family, config)
        config.tie_word_embeddings = False
        model = empty_model(config, source)
        weights = StoredWeights(source.name, stored, storage_dtype)
    make_buffers(model)
    model.config.dtype = storage_dtype
    model.config.architectures = [type(model).__name__]
    model.config._name_or_path = source.name  # or a later save would publish the local path
    model.generation_config = _generation_config(source, config)
    model.requires_grad_(False)
    model.eval()  # type: ignore[no-untyped-call]
    return model, weights


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer.

    A tokenizer.json is taken as it stands. (The tokenizer classes of transformers 5 rebuild it from its
    vocabulary and merges alone, and so lose a pre-tokenizer that is not their own, such as one that
    splits digits.)

    Raises:
        UnsupportedModelError: there is none, or it cannot be read.
    """
    if source.kind == "gguf":
        return gguf_tokenizer(read_gguf(source.path))
    if not any((source.path / name).is_file() for name in _TOKENIZER_FILES):
        raise UnsupportedModelError(
            f"{source.name} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)} is there; "
            f"fetch them beside the weights"
        )
    whole = (source.path / "tokenizer.json").is_file()
    try:
        if whole:
            json.loads((source.path / "tokenizer.json").read_text(encoding="utf-8"))
        loader = PreTrainedTokenizerFast if whole else AutoTokenizer
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise UnsupportedModelError(
            f"{source.name}: the tokenizer cannot be read: {_one_line(error)}; fetch its files again"
        ) from error
    return tokenizer


def companions(source: ModelSource) -> dict[str, bytes]:
    """The files that make a checkpoint usable, by name: tokenizer, chat template, generation config.

    Those of a directory are the same byte for byte, licence included, but for a local path that some
    versions of transformers left in tokenizer_config.json; those of a GGUF file are made from its
    metadata. Never config.json, never weights.

    Raises:
        UnsupportedModelError: a GGUF file has no tokenizer, or a file cannot be read.
    """
    if source.kind == "gguf":
        return _made_companions(source)
    found = {}
    try:
        for pattern in _COMPANIONS:
            for file in sorted(source.path.glob(pattern)):
                if file.is_file():
                    found[file.name] = file.read_bytes()
    except OSError as error:
        raise UnsupportedModelError(f"{source.name}: a file cannot be read: {error}") from error
    if "tokenizer_config.json" in found:
        found["tokenizer_config.json"] = _without_paths(found["tokenizer_config.json"], source)
    return found


def _made_companions(source: ModelSource) -> dict[str, bytes]:
    """What transformers saves of a GGUF file's tokenizer and generation config."""
    tokenizer, generation = load_tokenizer(source), _generation_config(source, load_config(source))
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
            generation.save_pretrained(folder)
        except Exception as error:
            raise StorageError(f"the tokenizer cannot be written to {folder}: {_one_line(error)}") from error
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def load_config(source: ModelSource) -> PreTrainedConfig:
    """The config of a source of a known family, built by transformers."""
    try:
        if source.kind == "gguf":
            return gguf_config(read_gguf(source.path))
        find_family(read_config(source)["model_type"])
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=False
        )
    except CONFIG_ERRORS as error:
        raise UnsupportedModelError(f"{source.name}: the config is unusable: {_one_line(error)}") from error
    return config


def empty_model(config: PreTrainedConfig, source: ModelSource) -> PreTrainedModel:
    """The model's skeleton on the meta device: names and shapes, no memory."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, attn_implementation=attention_for(config)
            )
    except (*CONFIG_ERRORS, RuntimeError, AssertionError) as error:
        raise UnsupportedModelError(
            f"{source.name}: the config makes no model: {_one_line(error)}"
        ) from error
    unfuse_experts(model, find_family(config.model_type))
    return model


def _stored_tensors(source: ModelSource, config: PreTrainedConfig) -> dict[str, StoredTensor]:
    """All tensors of the source's files by transformers' names; a name that occurs twice is refused."""
    if source.kind == "gguf":
        return gguf_tensors(read_gguf(source.path), config)
    stored: dict[str, StoredTensor] = {}
    renames = STORED_NAMES.get(config.model_type, ())
    for file in weight_files(source):
        for name, tensor in read_safetensors_header(file).items():
            for pattern, replacement in renames:
                name = re.sub(pattern, replacement, name)
            if name in stored:
                raise UnsupportedModelError(f"{source.name} has {name} in two files; fetch the model again")
            if not name.endswith("rotary_emb.inv_freq"):  # old files carry it; the config gives it
                stored[name] = tensor
    return stored


def _check_names_and_shapes(
    stored: dict[str, StoredTensor], expected: dict[str, tuple[int, ...]], source: ModelSource
) -> None:
    missing, unknown = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    for names, verb in ((missing, "lacks"), (unknown, "has")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UnsupportedModelError(
                f"{source.name} {verb} the tensor {names[0]}{more}, which its config "
                f"{'asks for' if verb == 'lacks' else 'has no place for'}; "
                f"fetch the model again, or correct its config"
            )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise UnsupportedModelError(
                f"{source.name}: {name} has shape {list(stored[name].shape)}, "
                f"but its config asks for {list(shape)}"
            )


def _generation_config(source: ModelSource, config: PreTrainedConfig) -> GenerationConfig:
    """The source's generation_config.json, or what its config or GGUF metadata says."""
    if source.kind == "gguf" or not (source.path / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(source.path, local_files_only=True)
    except CONFIG_ERRORS as error:
        raise UnsupportedModelError(
            f"{source.name}: generation_config.json is unusable: {_one_line(error)}"
        ) from error


def _without_paths(content: bytes, source: ModelSource) -> bytes:
    """tokenizer_config.json as it is, or without the keys that hold a local path."""
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UnsupportedModelError(
            f"{source.name}: tokenizer_config.json cannot be read: {error}"
        ) from error
    if not isinstance(config, dict):
        raise UnsupportedModelError(f"{source.name}: tokenizer_config.json does not hold a JSON object")
    leaks = [
        key
        for key, value in config.items()
        if key.endswith(("_file", "name_or_path")) and is_local_path(value)
    ]
    if not leaks:
        return content
    kept = {key: value for key, value in config.items() if key not in leaks}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def is_local_path(value: object) -> bool:
    """Whether `value` names a place on some machine, rather than a hub id or a plain file name."""
    if not isinstance(value, str):
        return False
    return (
        PurePosixPath(value).is_absolute()
        or PureWindowsPath(value).is_absolute()
        or value.startswith((".", "~"))
    )


def _one_line(error: BaseException) -> str:
    """The message of an error of another library, which may run over many lines, or repeat a whole file."""
    words = " ".join(str(error).split())
    return words if len(words) <= 500 else f"{words[:500]} ..."
