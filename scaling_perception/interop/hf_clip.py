"""CLIP text encoders as Hugging Face publishes them: names of the tensors, ``config.json``, tokenizer, whole folders.

Published files name the tower ``text_model.``; transformers 5 itself does not, and both are read. Arrays are numpy on
the host; nothing here needs torch. The tokenizer is transformers' own, imported when the first one is loaded.
"""

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from scaling_perception.interop.safetensors_io import flatten_tree, unflatten_tree
from scaling_perception.interop.sharded import find_weights, open_sharded
from scaling_perception.models.clip_text import (
    ACTIVATIONS,
    LEGACY_EOS,
    CLIPTextConfig,
    abstract_params,
    check_ids,
    encode_text,
)
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.files import read_json
from scaling_perception.support.hub import fetch

PREFIX = "text_model."
PROJECTION = "text_projection.weight"
_BUFFER = "embeddings.position_ids"  # the numbers 0..T-1, which older files carry along

# our layer -> its name in the file
_LAYERS = {
    "token_embed": "embeddings.token_embedding",
    "position_embed": "embeddings.position_embedding",
    "final_norm": "final_layer_norm",
    "projection": "text_projection",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "attn/query": "self_attn.q_proj",
    "attn/key": "self_attn.k_proj",
    "attn/value": "self_attn.v_proj",
    "attn/out": "self_attn.out_proj",
}
# field of the published config.json -> ours
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
    "max_position_embeddings": "max_positions",
    "hidden_act": "activation",
    "layer_norm_eps": "layer_norm_eps",
    "projection_dim": "projection_dim",
    "eos_token_id": "eos_token_id",
    "bos_token_id": "bos_token_id",
    "pad_token_id": "pad_token_id",
}
# what would be another network; the many other fields that transformers writes change nothing here
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("clip_text_model",),
    "hidden_act": ACTIVATIONS,
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}
_WEIGHTS = ("model.safetensors", "model.fp16.safetensors")  # the second where the first is absent
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")
_TOKENIZER_MORE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Clip(NamedTuple):
    """A text encoder and its tokenizer.

    Attributes:
        params: float32 numpy, for ``models.clip_text.encode_text``.
        config: its sizes.
        tokenize: texts -> int32 (B, max_positions), cut or padded with the folder's padding token.
    """

    params: dict[str, Any]
    config: CLIPTextConfig
    tokenize: Callable[[Sequence[str]], np.ndarray]


def torch_names(config: CLIPTextConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter (joined by '/') -> the published names of its tensors: one of each layer under ``blocks``."""
    names = {}
    for leaf in flatten_tree(abstract_params(config)):
        layer, _, end = leaf.removeprefix("blocks/").rpartition("/")
        kind = "bias" if end == "bias" else "weight"
        if leaf.startswith("blocks/"):
            layers = range(config.layers)
            names[leaf] = tuple(f"{PREFIX}encoder.layers.{i}.{_LAYERS[layer]}.{kind}" for i in layers)
        else:
            name = f"{_LAYERS[layer or end]}.{kind}"
            names[leaf] = (name if name == PROJECTION else PREFIX + name,)
    return names


def clip_from_torch(
    state: Mapping[str, Any], config: CLIPTextConfig, dtype: Any = np.float32, origin: str = "text encoder"
) -> dict[str, Any]:
    """Our parameter tree (numpy) from a state dict of arrays, named with or without ``text_model.``.

    Args:
        dtype: None = that of the state dict.
        origin: names the file in errors.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape, by its name.
    """
    prefix = PREFIX if any(name.startswith(PREFIX) for name in state) else ""
    left = set(state) - {prefix + _BUFFER}
    shapes, flat = flatten_tree(abstract_params(config)), {}
    for leaf, names in torch_names(config).items():
        turned = leaf.endswith("/kernel")
        stacked = leaf.startswith("blocks/")
        shape = shapes[leaf].shape[1:] if stacked else shapes[leaf].shape
        expected = shape[::-1] if turned else shape
        pieces = []
        for name in names:
            name = name if name == PROJECTION else prefix + name.removeprefix(PREFIX)
            if name not in state:
                raise UserError(f"{origin}: tensor '{name}' {expected} is missing: copy or download the file again")
            value = np.asarray(state[name], dtype)
            if value.shape != expected:
                raise UserError(
                    f"{origin}: tensor '{name}' has shape {value.shape} but {expected} is expected: give the "
                    "config.json that belongs to the file"
                )
            left.discard(name)
            pieces.append(value.T if turned else value)
        flat[leaf] = np.stack(pieces) if stacked else np.array(pieces[0], order="C")
    if left:
        raise UserError(
            f"{origin}: tensor '{min(left)}' has no place in the text encoder of its config.json: give the one that "
            "belongs to the file"
        )
    return unflatten_tree(flat)


def clip_to_torch(params: Mapping[str, Any], config: CLIPTextConfig) -> dict[str, np.ndarray]:
    """The inverse of :func:`clip_from_torch`: contiguous arrays under the published names.

    Raises:
        UserError: a parameter is missing, unexpected, or of another shape, by its name.
    """
    shapes, flat, state = flatten_tree(abstract_params(config)), flatten_tree(params), {}
    for leaf in sorted(set(shapes) | set(flat)):
        if leaf not in shapes or leaf not in flat:
            what = "is missing" if leaf in shapes else "has no place in this text encoder"
            raise UserError(f"parameter {leaf} {what}: give the parameters of the config's model")
        if np.shape(flat[leaf]) != shapes[leaf].shape:
            raise UserError(f"parameter {leaf} has shape {np.shape(flat[leaf])}, the config needs {shapes[leaf].shape}")
    for leaf, names in torch_names(config).items():
        value = np.asarray(flat[leaf])
        for piece, name in zip(value if leaf.startswith("blocks/") else value[None], names, strict=True):
            state[name] = np.ascontiguousarray(piece.T if leaf.endswith("/kernel") else piece)
    return state


def clip_config_from_json(fields: Mapping[str, Any], origin: str = "text encoder config.json") -> CLIPTextConfig:
    """The sizes that a published ``config.json`` describes: that of a text encoder, or of a whole CLIP model. Fields
    that it leaves out have transformers' defaults, which are ours.

    Args:
        origin: names the file in errors.

    Raises:
        UserError: another kind of network, a value that this package does not support, or a size that is none, by the
            name of the field.
    """
    text, classes = fields, fields.get("architectures") or ()
    if _is_whole(fields):
        if fields.get("model_type", "clip") != "clip":
            raise UserError(f"{origin}: model_type is {fields['model_type']!r}, which is not supported: only 'clip' is")
        # an older way to state the same; where both are there transformers believes this one, defaults included
        text = fields.get("text_config_dict") or fields.get("text_config") or {}
        if not isinstance(text, Mapping):
            raise UserError(f"{origin}: text_config is {text!r}: restore the published file")
        text = {**text, "projection_dim": fields.get("projection_dim", CLIPTextConfig.projection_dim)}
    elif "model_type" not in fields and "hidden_size" not in fields:
        raise UserError(f"{origin} describes no CLIP text encoder (no model_type, no hidden_size): give that of one")
    for name, known in _FIXED.items():
        if name in text and text[name] not in known:
            only = " or ".join(repr(value) for value in known)
            raise UserError(f"{origin}: {name} is {text[name]!r}, which is not supported: only {only} is")
    defaults = {field.name: field.default for field in dataclasses.fields(CLIPTextConfig)}
    given: dict[str, Any] = {}
    for name, ours in _FIELDS.items():
        if name not in text:
            continue
        value, kind = text[name], type(defaults[ours])
        free = name in ("bos_token_id", "pad_token_id", "projection_dim") and value is None
        if not free and (not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool)):
            raise UserError(f"{origin}: {name} is {value!r}, which is not supported: give one {kind.__name__}")
        given[ours] = value
    if not given.get("projection_dim", defaults["projection_dim"]) or "CLIPTextModel" in classes:
        given["projection_dim"] = 0  # the class without a projection states a size all the same
    try:
        return CLIPTextConfig(**given)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def clip_config_to_json(config: CLIPTextConfig) -> dict[str, Any]:
    """A ``config.json`` of a text encoder, as transformers and :func:`clip_config_from_json` read it."""
    values = {name: getattr(config, ours) for name, ours in _FIELDS.items()}
    if not config.projection_dim:
        del values["projection_dim"]
    kind = "CLIPTextModelWithProjection" if config.projection_dim else "CLIPTextModel"
    return {"architectures": [kind], "model_type": "clip_text_model", **values}


def _is_whole(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a whole CLIP model, with its vision tower."""
    return "text_config" in fields or "text_config_dict" in fields


def load_clip(name_or_path: str | os.PathLike[str]) -> Clip:
    """Load a text encoder and its tokenizer: (params, config, tokenize).

    Args:
        name_or_path: a folder with ``config.json``, ``model.safetensors`` (of a text encoder or of a whole CLIP model;
            where it is absent, its ``.fp16.`` variant) and a tokenizer, a Stable Diffusion folder with
            ``text_encoder`` and ``tokenizer`` in it, that ``text_encoder`` itself, or a hub id ``owner/name``.

    Raises:
        UserError: a file is missing, damaged or of another network; a tensor is missing, unexpected or misshapen; the
            tokenizer is not the encoder's; the hub cannot be reached.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        if folder.exists() or not _HUB_ID.fullmatch(str(name_or_path)):
            raise UserError(
                f"text encoder '{name_or_path}' is neither a folder nor a hub id (owner/name): give the folder that "
                "holds config.json and model.safetensors"
            )
        folder = _download(str(name_or_path))
    if not (folder / "config.json").is_file() and (folder / "text_encoder").is_dir():
        folder = folder / "text_encoder"
    described = folder / "config.json"
    fields = read_json(described)
    if not isinstance(fields, dict):
        raise UserError(f"{described} is no description of a model: copy or download it again")
    config = clip_config_from_json(fields, str(described))
    source = open_sharded(_weights(folder))
    names = list(source.shapes)
    if _is_whole(fields):
        names = [name for name in names if name.startswith(PREFIX) or name == PROJECTION]
    elif not fields.get("architectures") and PROJECTION not in names:
        config = dataclasses.replace(config, projection_dim=0)  # nothing else says whether there is one
    params = clip_from_torch({name: source.read(name) for name in names}, config, origin=source.origin)
    return Clip(params, config, _tokenize_with(load_tokenizer(_tokenizer_folder(folder)), config, described))


def _weights(folder: Path) -> Path:
    found = find_weights(folder)
    if found is None and (folder / _WEIGHTS[1]).is_file():
        found = folder / _WEIGHTS[1]
    if found is None:
        pickled = next((file for end in ("bin", "pt", "ckpt") for file in sorted(folder.glob(f"*.{end}"))), None)
        if pickled:
            raise UserError(
                f"{pickled} is a pickled checkpoint, which is not read because it may run code: convert it to "
                f"{_WEIGHTS[0]} (transformers: save_pretrained)"
            )
        raise UserError(f"{folder} has no {_WEIGHTS[0]}: give the folder of a CLIP text encoder")
    return found


def _tokenizer_folder(folder: Path) -> Path:
    # text_encoder, or a second text_encoder_2, has its tokenizer beside it
    beside = folder.absolute().parent / folder.absolute().name.replace("text_encoder", "tokenizer")
    for place in (folder, folder / "tokenizer", beside):
        if any((place / name).is_file() for name in _TOKENIZER):
            return place
    raise UserError(f"{folder} has no tokenizer (vocab.json and merges.txt), nor is one beside it: put it there")


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """transformers' ``CLIPTokenizer`` of a folder, silently, without a look at the network.

    Raises:
        UserError: a file is missing or damaged, or merges are missing, without which words would fall apart.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):  # transformers would make do with an empty tokenizer
            if not (folder / name).is_file():
                raise UserError(f"{folder / name} is missing, without which there is no tokenizer: copy it there")
    with _errors_only():
        try:
            tokenizer = _transformers().CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
            known = {"".join(pair) for pair in model["merges"]}
            words = (word for word in model["vocab"] if len(word.removesuffix("</w>")) > 1 and word[:2] != "<|")
            lost = next((word for word in words if word not in known), None)
        except Exception as error:  # whatever damaged files make the reader raise
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise UserError(f"{folder} holds no whole CLIP tokenizer ({reason}): copy or download it again") from error
    if lost is not None:
        raise UserError(f"{folder} holds no whole CLIP tokenizer: no merge makes {lost!r}; copy its merges.txt again")
    return tokenizer


def _transformers() -> Any:
    # by name: for an import statement a type checker reads all its models, half of the time of the whole check
    return importlib.import_module("transformers")


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """transformers says nothing below an error: not that torch is missing, nor which of its classes it would rather."""
    library = logging.getLogger("transformers")

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    library.addFilter(keep)  # the import sets the level anew, but not this
    try:
        logs = _transformers().logging
        before = logs.get_verbosity()
        logs.set_verbosity_error()
        try:
            yield
        finally:
            logs.set_verbosity(before)
    finally:
        library.removeFilter(keep)


def _tokenize_with(tokenizer: Any, config: CLIPTextConfig, described: Path) -> Callable[[Sequence[str]], np.ndarray]:
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{described}: vocab_size is {config.vocab_size} but the tokenizer has {len(tokenizer)} tokens: take both "
            "from one model"
        )
    if config.eos_token_id not in (LEGACY_EOS, tokenizer.eos_token_id):
        raise UserError(
            f"{described}: eos_token_id is {config.eos_token_id} but the tokenizer ends texts with "
            f"{tokenizer.eos_token_id}: take both from one model"
        )

    def tokenize(texts: Sequence[str]) -> np.ndarray:
        if isinstance(texts, str):
            raise TypeError("give a list of texts, not one text")
        if not texts:
            return np.zeros((0, config.max_positions), np.int32)
        made = tokenizer(list(texts), padding="max_length", max_length=config.max_positions, truncation=True)
        return np.asarray(made["input_ids"], np.int32)

    return tokenize


def task_context(prompts: Mapping[str, str], clip: Clip, passes: Sequence[str]) -> np.ndarray:
    """One embedding for each pass, (len(passes), width) float32: ``text_embeds`` where the encoder has a projection,
    else ``pooled``; zeros for a pass without a prompt.

    Args:
        prompts: pass -> text, such as {"depth": "a depth map"}.
        passes: names of the rows, in their order (``tasks.model_passes``).

    Raises:
        UserError: a prompt for something that is no pass.
    """
    for name, text in prompts.items():
        if name not in passes:
            raise UserError(f"a prompt for '{name}', which is no pass{did_you_mean(name, passes)}")
        if not isinstance(text, str):
            raise UserError(f"the prompt for '{name}' is {text!r}: give a text")
    table = np.zeros((len(passes), clip.config.projection_dim or clip.config.width), np.float32)
    if prompts:
        ids = check_ids(clip.config, clip.tokenize(list(prompts.values())))
        with jax.default_matmul_precision("highest"):  # computed once and kept: rounding gains nothing here
            made = encode_text(clip.config, clip.params, ids)
        table[[list(passes).index(name) for name in prompts]] = (
            made.pooled if made.text_embeds is None else made.text_embeds
        )
    return table


def _download(hub_id: str) -> Path:
    tokenizer = [*_TOKENIZER, *_TOKENIZER_MORE]
    patterns = ["config.json", "text_encoder/config.json", *tokenizer, *(f"tokenizer/{name}" for name in tokenizer)]
    for name in _WEIGHTS:
        folder = fetch(hub_id, [*patterns, name, f"text_encoder/{name}"], "text encoder")
        if (folder / name).exists() or (folder / "text_encoder" / name).exists():
            return folder
    raise UserError(
        f"text encoder '{hub_id}' on the hub has no {_WEIGHTS[0]}: convert its weights (transformers: save_pretrained) "
        "and give the folder"
    )
