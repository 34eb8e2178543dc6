"""Autoencoders by name: one small interface over every network that turns pictures into latents and back."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.models import lite0, matching, tiny_vae, vae
from scaling_perception.models.vae_tiles import VAELimits, tiled_decode, tiled_encode
from scaling_perception.models.vae_torch import CLASS, vae_config_from_json, vae_from_torch
from scaling_perception.models.weight_files import read_safetensors
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import atomic_path, read_json
from scaling_perception.support.hub import fetch
from scaling_perception.support.remote import local
from scaling_perception.support.shapes import AnyArray, Array, Float

PARTS = ("encoder", "decoder")
FEATURES = "lite0"
MATCH = "match"
_PROGRAM = "_program"  # attribute of functions, so that a function put in place of one has none
_NO_VARIANCE = -30.0  # log
TINY_FOLDER = Path(__file__).resolve().parent.parent / "weights" / "tiny_vae"
_FORMAT = "scaling-perception tiny autoencoder 1"
_KL_STEM = "diffusion_pytorch_model"
_KL_FILES = (f"{_KL_STEM}.safetensors", f"{_KL_STEM}.fp16.safetensors")  # the second where the first is absent
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclasses.dataclass(frozen=True, eq=False)
class Autoencoder:
    """A frozen autoencoder. ``encode`` and ``decode`` are pure functions to be jitted by the caller.

    Attributes:
        name: the name or path it was loaded by.
        id: 12 hex digits of the encoder's weights. Latents depend on nothing else, so a cache of latents stays valid
            when only the decoder is replaced.
        params: ``{"encoder": tree, "decoder": tree}``, float32.
        encode: (params, images (B, H, W, 3) in [-1, 1]) -> (mean (B, H/8, W/8, 4), log-variance or None); the mean is
            already multiplied by Stable Diffusion's 0.18215, and the log-variance (of an AutoencoderKL) is that of the
            latent so multiplied: ``vae.sample`` of the two is a scaled latent, also after a cache.
        decode: (params, latents (B, h, w, 4)) -> images (B, 8h, 8w, 3), about [-1, 1], not clipped.
        latent_channels: 4.
        factor: 8.
        config: ``TinyVAEConfig`` or ``VAEConfig``.
        features: F, channels that ``encode`` appends to the latents (see ``with_features``); ``decode`` takes latents.
        matches: whether ``encode`` takes the first frame as a third argument where ``images`` are second frames, whose
            features are then those of the match of both (see ``with_match``).
    """

    name: str
    id: str
    params: Any
    encode: Callable[..., tuple[jax.Array, jax.Array | None]]
    decode: Callable[[Any, jax.Array], jax.Array]
    latent_channels: int = 4
    factor: int = 8
    config: Any = None
    features: int = 0
    matches: bool = False

    @property
    def program(self) -> str | None:
        """All that ``encode`` and ``decode`` compute, weights aside, in words; None where one of them is not of this
        module: it may then compute anything."""
        parts = [getattr(function, _PROGRAM, None) for function in (self.encode, self.decode)]
        return None if None in parts else repr(parts)


def _described(function: Any, *words: Any) -> Any:
    """The function with what it computes in words."""
    setattr(function, _PROGRAM, repr(words))
    return function


def make_tiny(
    name: str, config: tiny_vae.TinyVAEConfig, params: Mapping[str, Any], dtype: Any = "float32"
) -> Autoencoder:
    """An :class:`Autoencoder` of TAESD's family from its two parameter trees; ``dtype`` as of :func:`make_kl`."""

    def network(kind: Any, params: Any, x: Any) -> Any:
        if np.dtype(dtype) == np.float32:  # as the input is
            return kind(config).apply({"params": params}, x)
        params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, x))
        return kind(config).apply({"params": params}, x).astype(np.float32)

    def encode(params: Any, images: Float[AnyArray, "B H W 3"]) -> tuple[Float[Array, "B h w C"], None]:
        if images.shape[1] % config.factor or images.shape[2] % config.factor:
            raise UserError(
                f"image size {images.shape[2]}x{images.shape[1]} is no multiple of {config.factor}, which the "
                f"autoencoder '{name}' needs: resize or pad the images"
            )
        return network(tiny_vae.Encoder, params["encoder"], images), None

    def decode(params: Any, latents: Float[AnyArray, "B h w C"]) -> Float[Array, "B H W 3"]:
        return network(tiny_vae.Decoder, params["decoder"], latents)

    return Autoencoder(
        name=name,
        id=tree_hash(params["encoder"]),
        params=dict(params),
        encode=_described(encode, "tiny", config, np.dtype(dtype)),
        decode=_described(decode, "tiny", config, np.dtype(dtype)),
        latent_channels=config.latent_channels,
        factor=config.factor,
        config=config,
    )


def make_kl(
    name: str,
    config: vae.VAEConfig,
    params: Mapping[str, Any],
    limits: VAELimits | None = None,
    dtype: Any = "float32",
) -> Autoencoder:
    """An :class:`Autoencoder` of Stable Diffusion's family from its two parameter trees.

    Args:
        limits: what of a batch is in the network at once; None = ``VAELimits()``: few samples decoded together, no
            tiles.
        dtype: of the computation; latents and images are float32.
    """
    limits = limits or VAELimits()

    def encode(
        params: Any, images: Float[AnyArray, "B H W 3"]
    ) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
        return vae.scale_moments(config, *tiled_encode(params, config, images, limits, dtype))

    def decode(params: Any, latents: Float[AnyArray, "B h w C"]) -> Float[Array, "B H W 3"]:
        return tiled_decode(params, config, latents / config.scaling_factor, limits, dtype)

    return Autoencoder(
        name=name,
        id=tree_hash(params["encoder"]),
        params=dict(params),
        encode=_described(encode, "kl", config, limits, np.dtype(dtype)),
        decode=_described(decode, "kl", config, limits, np.dtype(dtype)),
        latent_channels=config.latent_channels,
        factor=config.factor,
        config=config,
    )


def part_size(model: Autoencoder, part: str, height: int, width: int) -> tuple[int, int]:
    """(parameters, multiply-accumulates for one picture of ``height`` x ``width`` pixels) of encoder or decoder."""
    family: Any = vae if isinstance(model.config, vae.VAEConfig) else tiny_vae
    shapes = family.part_shapes(part, model.config)
    count, macs = sum(int(np.prod(shape)) for shape in shapes.values()), family.macs(part, model.config, height, width)
    if model.features and part == "encoder":
        count += sum(int(np.prod(shape)) for shape in lite0.shapes(model.features).values())
        macs += lite0.macs(model.features, height, width)
    return count, macs


def with_features(model: Autoencoder, dtype: Any = "float32") -> Autoencoder:
    """The same autoencoder whose ``encode`` appends the features of a network trained on photographs (``lite0``):
    (B, H, W, 3) -> (B, H/8, W/8, 4 + 32). A condition's are of use to the transformer; a target's are cut off."""
    own = lite0.load()

    def encode(params: Any, images: Float[AnyArray, "B H W 3"]) -> tuple[Any, Any]:
        latents, logvar = model.encode({**params, "encoder": params["encoder"]["latents"]}, images)
        weights = jax.tree.map(lambda leaf: leaf.astype(dtype), params["encoder"]["features"])
        found = lite0.features(weights, images.astype(dtype)).astype(latents.dtype)
        if logvar is not None:  # features are no distribution
            logvar = jnp.concatenate([logvar, jnp.full_like(found, _NO_VARIANCE, logvar.dtype)], axis=-1)
        return jnp.concatenate([latents, found], axis=-1), logvar

    params = {**model.params, "encoder": {"latents": model.params["encoder"], "features": own}}
    made = {"name": f"{model.name}+{FEATURES}", "id": tree_hash(params["encoder"]), "params": params}
    inner = getattr(model.encode, _PROGRAM, None)
    if inner is not None:
        _described(encode, FEATURES, np.dtype(dtype), inner)
    return dataclasses.replace(model, **made, encode=encode, features=len(own["features"]["bias"]))


def with_match(model: Autoencoder) -> Autoencoder:
    """The same autoencoder with features, whose ``encode`` knows two frames: those of a second frame (B, H, W, 3) are
    not its own, but say where the first frame's pixels lie in it (``matching``).

    Raises:
        UserError: the autoencoder has no features, or of another number than a match.
    """
    if model.features != matching.FEATURES:
        raise UserError(
            f"autoencoder '{model.name}+{MATCH}': a match takes the place of {matching.FEATURES} features, and "
            f"'{model.name}' has {model.features}: give {model.name.partition('+')[0]}+{FEATURES}+{MATCH}"
        )

    def encode(params: Any, images: Float[AnyArray, "B H W 3"], first: Any = None) -> tuple[Any, Any]:
        found, logvar = model.encode(params, images)
        if first is None:
            return found, logvar
        matched = matching.features(first, images).astype(found.dtype)
        return jnp.concatenate([found[..., : model.latent_channels], matched], axis=-1), logvar

    # caches and models depend on the version of the matching as on weights
    coder = {**model.params["encoder"], MATCH: {"version": np.asarray([matching.VERSION], np.float32)}}
    made = {"name": f"{model.name}+{MATCH}", "id": tree_hash(coder), "params": {**model.params, "encoder": coder}}
    inner = getattr(model.encode, _PROGRAM, None)
    if inner is not None:
        _described(encode, MATCH, inner)
    return dataclasses.replace(model, **made, encode=encode, matches=True)


def is_matching(name: str) -> bool:
    """Whether the autoencoder of this name matches two frames."""
    return name.endswith(f"+{MATCH}")


def check_flow_frame(name: str, frame: str, mend: str) -> None:
    """Raise a UserError if the autoencoder of this name matches two frames, in pixels of the square that it is given,
    and flow is measured in those of another ``frame``; ``mend``: what to give instead."""
    if is_matching(name) and frame != "square":
        raise UserError(
            f"autoencoder '{name}' matches two frames in pixels of the model's square, and flow is measured in "
            f"{frame} ones: give {mend}"
        )


def tree_hash(tree: Mapping[str, Any]) -> str:
    """12 hex digits of the SHA-256 of names, shapes and float32 bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, leaf in sorted(tiny_vae.flatten(tree).items()):
        digest.update(f"{name}{leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())
    return digest.hexdigest()[:12]


def load_autoencoder(name_or_path: str, limits: VAELimits | None = None, dtype: Any = "float32") -> Autoencoder:
    """Load an autoencoder.

    Args:
        name_or_path: ``"tiny"`` (the weights shipped with this package), a folder, or a hub id ``owner/name``. A folder
            holds ``encoder.safetensors`` + ``decoder.safetensors`` (ours), ``taesd_encoder.safetensors`` +
            ``taesd_decoder.safetensors`` (TAESD's own files), ``diffusion_pytorch_model.safetensors`` (diffusers'
            ``AutoencoderTiny``, or Stable Diffusion's ``AutoencoderKL`` with its ``config.json``; where that file is
            absent its ``.fp16.`` variant is read), or a whole Stable Diffusion model with such a folder named ``vae``.
            Followed by ``+lite0``: with features beside the latents, see :func:`with_features`; by ``+lite0+match``:
            where two frames match in place of the second one's, see :func:`with_match`.
        limits: bounds of memory, see :func:`make_kl`; an AutoencoderKL's only.
        dtype: of the computation; latents and images are float32.

    Raises:
        UserError: nothing there, an incomplete or foreign file, a missing or unexpected tensor or one of another shape.
    """
    if is_matching(name_or_path):
        return with_match(load_autoencoder(name_or_path.removesuffix(f"+{MATCH}"), limits, dtype))
    if name_or_path.endswith(f"+{FEATURES}"):
        return with_features(load_autoencoder(name_or_path.removesuffix(f"+{FEATURES}"), limits, dtype), dtype)
    if name_or_path == "tiny":
        config, encoder = load_part(TINY_FOLDER, "encoder")
        return make_tiny("tiny", config, {"encoder": encoder, "decoder": load_part(TINY_FOLDER, "decoder")[1]}, dtype)
    folder = Path(local(name_or_path))
    if not folder.is_dir():
        if folder.exists() or not _HUB_ID.fullmatch(name_or_path):
            raise UserError(
                f"autoencoder '{name_or_path}' is neither 'tiny' nor a folder nor a hub id (owner/name): "
                "give the folder that holds the safetensors files"
            )
        folder = _download(name_or_path)
    if (folder / "encoder.safetensors").exists():
        config, encoder = load_part(folder, "encoder")
        other, decoder = load_part(folder, "decoder")
        if other != config:
            raise UserError(f"{folder}: encoder and decoder are of different models: take both from one run")
        return make_tiny(name_or_path, config, {"encoder": encoder, "decoder": decoder}, dtype)
    files = {part: folder / f"taesd_{part}.safetensors" for part in PARTS}
    if not any(file.exists() for file in files.values()):
        file = _published_file(folder)
        if file is not None:
            state = read_safetensors(file)[0]
            if _is_kl(file, state):
                return make_kl(name_or_path, *_kl_of(file, state), limits, dtype)
            return make_tiny(name_or_path, tiny_vae.TAESD, _taesd_of(dict.fromkeys(PARTS, (file, state))), dtype)
    states = {part: (file, read_safetensors(file)[0]) for part, file in files.items()}
    return make_tiny(name_or_path, tiny_vae.TAESD, _taesd_of(states), dtype)


def load_kl(folder: str | Path) -> tuple[vae.VAEConfig, dict[str, Any]]:
    """Config and float32 parameters (numpy) of an AutoencoderKL's folder, or of the ``vae`` folder in it.

    Raises:
        UserError: as :func:`load_autoencoder`, and where the folder holds another autoencoder.
    """
    file = _published_file(Path(folder))
    if file is None:
        raise UserError(f"{Path(folder) / _KL_FILES[0]} does not exist: give the folder of an {CLASS}")
    state = read_safetensors(file)[0]
    if not _is_kl(file, state):
        raise UserError(f"{file}: this is no {CLASS}: give the folder of one")
    return _kl_of(file, state)


def _published_file(folder: Path) -> Path | None:
    """diffusers' file of an autoencoder, in ``folder`` or in the ``vae`` of a whole model; None = there is none."""
    places = [folder, folder / "vae"]
    for place in places:
        for name in _KL_FILES:
            if (place / name).exists():
                return place / name
    for place in places:
        for file in sorted(place.glob("*.bin")) + sorted(place.glob("*.ckpt")):
            raise UserError(
                f"{file} is a pickled checkpoint, which is not read because it may run code: convert it to "
                f"{_KL_FILES[0]} (diffusers: save_pretrained with safe_serialization=True)"
            )
    return None


def _is_kl(file: Path, state: Mapping[str, Any]) -> bool:
    described = file.parent / "config.json"
    name = _read_config(described).get("_class_name") if described.exists() else None
    if name in (CLASS, "AutoencoderTiny"):
        return name == CLASS
    if name is not None:
        raise UserError(f"{described}: _class_name is {name!r}: give an {CLASS} or an AutoencoderTiny")
    return any(tensor.startswith(("quant_conv", "encoder.conv_in")) for tensor in state)


def _read_config(file: Path) -> dict[str, Any]:
    fields = read_json(file)
    if not isinstance(fields, dict):
        raise UserError(f"{file} is no description of a model: copy or download it again")
    return fields


def _kl_of(file: Path, state: Mapping[str, Any]) -> tuple[vae.VAEConfig, dict[str, Any]]:
    described = file.parent / "config.json"
    config = vae.VAEConfig()
    if described.exists():
        config = vae_config_from_json(_read_config(described), str(described))
    return config, vae_from_torch(state, config, str(file))


def _taesd_of(files: Mapping[str, tuple[Path, Mapping[str, Any]]]) -> dict[str, Any]:
    return {part: tiny_vae.from_torch(part, tiny_vae.TAESD, state, str(file)) for part, (file, state) in files.items()}


def load_part(folder: str | Path, part: str) -> tuple[tiny_vae.TinyVAEConfig, dict[str, Any]]:
    """One half of an autoencoder that :func:`save_part` wrote: its config and its float32 parameters (numpy).

    Raises:
        UserError: the file is missing, truncated, not ours, or a tensor is missing or of another shape.
    """
    file = Path(folder) / f"{part}.safetensors"
    state, metadata = read_safetensors(file)
    if metadata.get("format") != _FORMAT or metadata.get("part") != part:
        raise UserError(f"{file} is no {part} written by 'scaling-perception train': give the folder of such a run")
    config = tiny_vae.TinyVAEConfig(**json.loads(metadata["config"]))
    shapes = tiny_vae.part_shapes(part, config)
    for name in sorted(set(shapes) | set(state)):
        if name not in state:
            raise UserError(f"{file}: tensor '{name}' is missing: copy the file again")
        if name not in shapes:
            raise UserError(f"{file}: tensor '{name}' does not belong to the model in its own config: copy it again")
        if state[name].shape != shapes[name]:
            raise UserError(
                f"{file}: tensor '{name}' has shape {state[name].shape} but {shapes[name]} is expected: "
                "copy the file again"
            )
    return config, tiny_vae.unflatten({k: np.asarray(v, np.float32) for k, v in state.items()})


def save_part(
    folder: str | Path, part: str, config: tiny_vae.TinyVAEConfig, params: Mapping[str, Any], info: Mapping[str, Any]
) -> Path:
    """Write one half as float16 ``<part>.safetensors``; ``info`` (JSON-able) goes into the file's metadata."""
    from safetensors.numpy import save_file

    flat = {name: np.ascontiguousarray(leaf, np.float16) for name, leaf in tiny_vae.flatten(params).items()}
    metadata = {
        "format": _FORMAT,
        "part": part,
        "config": json.dumps(config.to_dict()),
        "training": json.dumps(dict(info), sort_keys=True),
    }
    file = Path(folder) / f"{part}.safetensors"
    with atomic_path(file) as temporary:
        save_file(flat, temporary, metadata=metadata)
    return file


def _download(hub_id: str) -> Path:
    patterns = ["config.json", "taesd_*.safetensors", "*coder.safetensors", "vae/config.json"]
    for name in _KL_FILES:  # one after the other: the second, a copy in half precision, is rarely needed
        folder = fetch(hub_id, [*patterns, name, f"vae/{name}"], "autoencoder")
        own = ("encoder.safetensors", "taesd_encoder.safetensors", name, f"vae/{name}")
        if any((folder / file).exists() for file in own):
            return folder
    raise UserError(
        f"autoencoder '{hub_id}' on the hub has no safetensors file of an autoencoder: convert its .bin file "
        "(diffusers: save_pretrained with safe_serialization=True) and give the folder"
    )
