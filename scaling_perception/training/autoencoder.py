"""Training the small autoencoder by distilling TAESD: the encoder learns its latents, the decoder learns to undo them.

Two phases, each an ordinary run of ``train.py``. ``encoder``: regress the teacher's latents. ``decoder``: reconstruct
pictures from the frozen encoder's latents and the teacher's, mixed. Both read a *bank* on disk: procedural pictures
(textures, rendered scenes and what the tasks draw) with the teacher's latents, made once, block by block, and resumed
where it stopped. No photograph takes part.
"""

import copy
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from scaling_perception.data.sources.textures import RGB_KINDS, TARGET_KINDS, texture
from scaling_perception.models import tiny_vae
from scaling_perception.models.autoencoders import (
    Autoencoder,
    load_autoencoder,
    load_part,
    make_tiny,
    save_part,
    tree_hash,
)
from scaling_perception.parallel.rules import WHOLE_RULES
from scaling_perception.support.compiler_options import convolving
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import atomic_path, read_json, save_npy, write_json
from scaling_perception.support.progress import progress
from scaling_perception.training.objective import Objective, Parts, own_share

BLOCK = 250  # pictures a bank file; texture and scene blocks alternate
SCENE_VIEWS = ("image", "depth", "image", "flow_x", "whole", "image", "visible", "flow_y")
TARGET_WEIGHT = 2.0  # of a target-like picture's error: predictions pass through the decoder, photographs need not


def bank_picture(index: int, resolution: int) -> tuple[np.ndarray, bool]:
    """Training picture ``index``: ((R, R, 3) float32 in about [-1, 1], whether it looks like a task's target).

    About half the pictures are RGB (textures and scenes), half what the tasks draw (depth, flow components, masks,
    objects on white). Scenes are the training split's, from their index alone.
    """
    block, place = divmod(index, BLOCK)
    number = block // 2 * BLOCK + place
    if block % 2 == 0:
        kinds = (RGB_KINDS, RGB_KINDS, TARGET_KINDS)[number % 3]
        names = list(kinds)
        return texture(number, resolution, names[number // 3 % len(names)]), kinds is TARGET_KINDS
    view = SCENE_VIEWS[number % len(SCENE_VIEWS)]
    return scene_views(number, resolution, (view,))[view], view != "image"


def scene_views(index: int, resolution: int, views: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Pictures (R, R, 3) float32 that the tasks make of scene ``index``; ``views`` as in :func:`task_pictures`."""
    from scaling_perception.data.sources.scenes import render_scene

    return task_pictures(render_scene(index, resolution), resolution, views)


def task_pictures(raw: Mapping[str, Any], resolution: int, views: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Pictures of one raw sample as the tasks hand them on: image, depth, flow_x, flow_y, whole, visible."""
    from scaling_perception.tasks import TaskOptions, amodal, depth, flow

    options = TaskOptions()
    out: dict[str, np.ndarray] = {}
    if "image" in views:
        out["image"] = depth.conditions(raw, resolution, options)["image"]
    if "depth" in views:
        out["depth"] = depth.encode(raw, resolution, options)[0]["target"]
    if "flow_x" in views or "flow_y" in views:
        both = flow.encode(raw, resolution, options)
        out |= {"flow_x": both[0]["target"], "flow_y": both[1]["target"]}
    if "whole" in views or "visible" in views:
        sample = amodal.encode(raw, resolution, options)[0]
        out |= {"whole": sample["target"], "visible": sample["prompt"]}
    return {view: out[view] for view in views}


@dataclasses.dataclass(frozen=True)
class Bank:
    """Pictures and latents on disk; ``open_bank`` makes the missing blocks.

    Attributes:
        pictures: one (BLOCK, R, R, 3) float16 memory map a block.
        latents: the teacher's, (BLOCK, R/8, R/8, 4) float16 a block.
        targets: (N,) bool, which pictures look like a task's target.
        description: JSON-able; what the bank was made of.
    """

    pictures: list[np.ndarray]
    latents: list[np.ndarray]
    targets: np.ndarray
    description: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.targets)

    def rows(self, arrays: list[np.ndarray], indices: np.ndarray) -> np.ndarray:
        """Rows ``indices`` of a list of blocks, as one array."""
        return np.stack([arrays[i // BLOCK][i % BLOCK] for i in indices])


def open_bank(folder: str | os.PathLike[str], teacher: str, count: int, resolution: int) -> Bank:
    """The bank in ``folder`` with at least ``count`` pictures, making what is missing.

    Raises:
        UserError: the folder holds a bank of another teacher or resolution, or the teacher cannot be loaded.
    """
    folder = Path(folder)
    blocks = -(-count // BLOCK)
    paths = [folder / f"block_{block:05d}" for block in range(blocks)]
    missing = [b for b, path in enumerate(paths) if not path.with_suffix(".latents.npy").exists()]
    described = folder / "bank.json"
    model = load_autoencoder(teacher)
    description = {"format": 1, "teacher": model.id, "resolution": resolution, "block": BLOCK}
    if not described.exists():
        write_json(described, description)
    elif read_json(described) != description:
        raise UserError(f"{folder}: this bank is not {description}: choose another folder with config.data.cache")
    for block in progress(missing, len(missing), "autoencoder bank") if missing else ():
        _make_block(paths[block], block, model, resolution)
    pictures = [np.load(path.with_suffix(".pictures.npy"), mmap_mode="r") for path in paths]
    latents = [np.load(path.with_suffix(".latents.npy")) for path in paths]
    targets = np.concatenate([np.load(path.with_suffix(".targets.npy")) for path in paths])
    return Bank(pictures, latents, targets, {**description, "count": blocks * BLOCK})


def _make_block(path: Path, block: int, teacher: Autoencoder, resolution: int) -> None:
    made = [bank_picture(index, resolution) for index in range(block * BLOCK, (block + 1) * BLOCK)]
    pictures = np.stack([picture for picture, _ in made]).astype(np.float16)
    latents = encode_all(teacher, pictures).astype(np.float16)
    targets = np.array([target for _, target in made])
    # The latents come last: their presence says that the block is whole.
    for name, array in (("pictures", pictures), ("targets", targets), ("latents", latents)):
        with atomic_path(path.with_suffix(f".{name}.npy")) as temporary:
            save_npy(temporary, array)


def encode_all(model: Autoencoder, pictures: np.ndarray, batch: int = 10) -> np.ndarray:
    """Latents (N, h, w, 4) float32 of pictures (N, R, R, 3), ``batch`` at a time."""
    run = _jitted_encode(model.encode)
    chunks = []
    for start in range(0, len(pictures), batch):
        part = np.asarray(pictures[start : start + batch], np.float32)
        padded = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), np.float32)])  # one compilation
        chunks.append(np.asarray(run(model.params, padded))[: len(part)])
    return np.concatenate(chunks)


@functools.lru_cache(maxsize=8)
def _jitted_encode(encode: Any) -> Any:
    options = convolving(jax.default_backend())
    return jax.jit(lambda params, images: encode(params, images)[0], compiler_options=options)


class BankBatches:
    """Batches of a bank as a pure function of the step: every epoch is a permutation seeded by (seed, epoch).

    Fields: image (B, R, R, 3), latent (B, h, w, 4) the teacher's, own (B, h, w, 4) the frozen encoder's (decoder phase
    only), all float16; weight (B,) float32; key.
    """

    def __init__(self, bank: Bank, batch_size: int, seed: int, own: np.ndarray | None = None, own_id: str = "") -> None:
        if batch_size > len(bank):
            raise UserError(f"train.batch_size {batch_size} exceeds the {len(bank)} pictures: raise config.bank")
        self.bank, self.batch_size, self.seed, self.own, self.own_id = bank, batch_size, seed, own, own_id
        self.places: Sequence[int] = range(batch_size)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must find unchanged."""
        return {**self.bank.description, "seed": self.seed, "batch_size": self.batch_size, "encoder": self.own_id}

    def holding(self, places: Sequence[int]) -> "BankBatches":
        """The same batches, of which only the pictures at ``places`` are read, in that order."""
        held = copy.copy(self)
        held.places = places
        return held

    def at(self, step: int) -> dict[str, Any]:
        """The batch of ``step``, at the places that are read."""
        epoch, place = divmod(step, len(self.bank) // self.batch_size)
        order = _permutation(self.seed, epoch, len(self.bank))
        indices = order[place * self.batch_size + np.asarray(self.places)]
        batch: dict[str, Any] = {
            "image": self.bank.rows(self.bank.pictures, indices),
            "latent": self.bank.rows(self.bank.latents, indices),
            "weight": np.where(self.bank.targets[indices], np.float32(TARGET_WEIGHT), np.float32(1)),
            "key": [f"bank/{index}" for index in indices],
        }
        if self.own is not None:
            batch["own"] = self.own[indices]
        return batch

    def iterate(self, start: int) -> Iterator[dict[str, Any]]:
        """Batches from ``start`` on, without end. Reading is a memory map: there is nothing to prefetch."""
        step = start
        while True:
            yield self.at(step)
            step += 1


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def encoder_tally(config: tiny_vae.TinyVAEConfig, params: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Sums over the pictures of the squared error of the latents; target-like pictures count double."""
    z = tiny_vae.Encoder(config).apply({"params": params}, batch["image"].astype(jnp.float32))
    error = jnp.square(z - batch["latent"].astype(jnp.float32)).mean(axis=(1, 2, 3))  # type: ignore[operator]
    return _tally(error, error, batch["weight"])


def decoder_tally(
    config: tiny_vae.TinyVAEConfig, params: Any, batch: Mapping[str, Any], key: jax.Array
) -> dict[str, jax.Array]:
    """Sums over the pictures of the error of what is decoded from mixed, slightly noisy latents.

    Per picture: mean |d| + mean |d|^2 + half the mean |difference of neighbours of d| (both directions), with d the
    difference of the decoded picture to the truth, weighted as in :func:`encoder_tally`. Where the truth is just black
    or white (-1 or 1, as masks, the far plane and empty background are), going beyond it is no error: pictures are
    clipped, and what lies beyond leaves room for a threshold close to white. The squared term keeps flat areas true,
    the last one keeps edges in place. One picture in four is decoded from the teacher's latents; the noise has a
    deviation of up to 0.03, uniform from picture to picture. Each draws from ``key`` and its place in the batch alone.
    """
    image = batch["image"].astype(jnp.float32)

    def draw(place: jax.Array) -> tuple[jax.Array, jax.Array]:
        pick, scale, noise = jax.random.split(jax.random.fold_in(key, place), 3)
        rough = 0.03 * jax.random.uniform(scale) * jax.random.normal(noise, batch["latent"].shape[1:])
        return jax.random.bernoulli(pick, 0.75), rough

    own, rough = jax.vmap(draw)(batch.get("index", jnp.arange(len(image))))
    z = jnp.where(own[:, None, None, None], batch["own"], batch["latent"]).astype(jnp.float32) + rough
    d = tiny_vae.Decoder(config).apply({"params": params}, z) - image  # type: ignore[operator]
    d = jnp.where((jnp.abs(image) == 1) & (d * image > 0), 0, d)
    squares = jnp.square(d).mean(axis=(1, 2, 3))
    edges = jnp.abs(jnp.diff(d, axis=1)).mean(axis=(1, 2, 3)) + jnp.abs(jnp.diff(d, axis=2)).mean(axis=(1, 2, 3))
    error = jnp.abs(d).mean(axis=(1, 2, 3)) + squares + 0.5 * edges
    return _tally(error, squares, batch["weight"])


_SORTS = ("rgb", "target")
_COUNTS = ("weight", *(f"count_{sort}" for sort in _SORTS))  # what the score divides by


def _tally(error: jax.Array, plain: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
    """Sums over pictures (B,): weighted errors and weights; plain errors and numbers of RGB and target-like ones."""
    found = {"error": jnp.sum(error * weight), "weight": jnp.sum(weight)}
    for sort, here in zip(_SORTS, (weight <= 1, weight > 1), strict=True):
        found[sort], found[f"count_{sort}"] = jnp.sum(jnp.where(here, plain, 0.0)), jnp.sum(here, dtype=jnp.float32)
    return found


def _score(name: str, found: Mapping[str, jax.Array], parts: int = 1) -> tuple[jax.Array, dict]:
    """The weighted mean error; the plain mean of each sort, NaN where the batch has none."""
    metrics = {f"{name}_{sort}": found[sort] / found[f"count_{sort}"] for sort in _SORTS}
    return found["error"] / found["weight"], metrics


def autoencoder_objective(config: Any, mesh: Mesh | None = None) -> Objective:
    """The objective of ``configs/tiny_vae.py``.

    Reads ``config.phase`` ('encoder' | 'decoder'), ``config.teacher`` (folder or hub id with TAESD), ``config.vae``
    (fields of TinyVAEConfig), ``config.bank`` (number of pictures), ``config.data.cache`` (folder of the bank),
    ``config.resolution``, ``config.seed``, ``config.train.batch_size``, and ``config.init``: an exported folder. The
    encoder phase goes on from its encoder; the decoder phase freezes its encoder, and goes on from its decoder if there
    is one. ``mesh``: what the step runs on, by which several processes share the batches.

    Raises:
        UserError: a missing teacher or encoder.
    """
    phase = str(config.phase)
    batch_size, seed = int(config.train.batch_size), int(config.seed)
    network, encoder, start = tiny_vae.TinyVAEConfig(**config.vae.to_dict()), None, None
    if phase == "decoder" and not config.init:
        raise UserError("the decoder phase needs the trained encoder: give config.init=FOLDER of the encoder run")
    if config.init:
        network, encoder = load_part(config.init, "encoder")
        if phase == "encoder":
            start = encoder
        elif (Path(config.init) / "decoder.safetensors").exists():
            start = load_part(config.init, "decoder")[1]
    bank = open_bank(config.data.cache, str(config.teacher), int(config.bank), int(config.resolution))

    def init(key: jax.Array) -> Any:
        return tiny_vae.init_part(phase, network, key)

    def told(info: Mapping[str, Any]) -> dict[str, Any]:
        # Only what matters elsewhere: the whole config would carry the names of somebody's folders along.
        kept = {name: info[name] for name in ("steps", "samples") if name in info}
        return {**kept, "seed": seed, "optim": config.optim.to_dict(), "bank": dict(bank.description)}

    if phase == "encoder":

        def tally(params: Any, batch: Mapping[str, Any], key: jax.Array) -> dict[str, jax.Array]:
            return encoder_tally(network, params, batch)

        def export(params: Any, path: str, info: Mapping[str, Any]) -> None:
            save_part(path, "encoder", network, params, told(info))

        batches = own_share(BankBatches(bank, batch_size, seed), mesh, batch_size)
        parts = Parts(tally, _COUNTS, functools.partial(_score, "latent_mse"))
        return Objective(
            init, parts.loss, batches, export, batch_size, starting_params=start, parts=parts, rules=WHOLE_RULES
        )

    own, own_id = _own_latents(Path(config.data.cache), bank, network, encoder)

    def decoding(params: Any, batch: Mapping[str, Any], key: jax.Array) -> dict[str, jax.Array]:
        return decoder_tally(network, params, batch, key)

    def export_both(params: Any, path: str, info: Mapping[str, Any]) -> None:
        save_part(path, "decoder", network, params, {**told(info), "encoder": own_id})
        source, target = Path(config.init) / "encoder.safetensors", Path(path) / "encoder.safetensors"
        if source.resolve() != target.resolve():
            with atomic_path(target) as temporary:
                temporary.write_bytes(source.read_bytes())

    batches = own_share(BankBatches(bank, batch_size, seed, own, own_id), mesh, batch_size)
    parts = Parts(decoding, _COUNTS, functools.partial(_score, "pixel_mse"))
    return Objective(
        init, parts.loss, batches, export_both, batch_size, starting_params=start, parts=parts, rules=WHOLE_RULES
    )


def _own_latents(folder: Path, bank: Bank, network: tiny_vae.TinyVAEConfig, encoder: Any) -> tuple[np.ndarray, str]:
    """Our frozen encoder's latents of the whole bank, kept beside it under the encoder's hash."""
    own_id = tree_hash(encoder)
    path = folder / f"own_{own_id}_{len(bank)}.npy"
    if not path.exists():
        model = make_tiny("own", network, {"encoder": encoder})
        blocks = progress(bank.pictures, len(bank.pictures), "latents of the frozen encoder")
        latents = np.concatenate([encode_all(model, pictures).astype(np.float16) for pictures in blocks])
        with atomic_path(path) as temporary:
            save_npy(temporary, latents)
    return np.load(path), own_id
