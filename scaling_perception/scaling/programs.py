"""The programs of a config as shapes: its train step, its sampler and its encoder on a mesh, without a single array.

They are what ``train``, ``predict`` and ``prepare`` compile; only data, weights and devices are missing.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from scaling_perception.diffusion.schedules import get_diffusion
from scaling_perception.inference.draws import NoiseKeys
from scaling_perception.inference.engine import Engine, Passes
from scaling_perception.inference.settings import Settings
from scaling_perception.models import vae
from scaling_perception.models.autoencoders import Autoencoder, load_autoencoder, make_kl, part_size
from scaling_perception.models.compute import TRAINING_FACTOR, forward_macs, inference_macs
from scaling_perception.models.config import DiTConfig
from scaling_perception.models.dit import abstract_params
from scaling_perception.models.presets import LATENT_FACTOR
from scaling_perception.parallel.mesh import AXES, BATCH_AXES, batch_sharding, replicated
from scaling_perception.parallel.rules import spec_for, tree_shardings
from scaling_perception.scaling.dry_run import DECODINGS
from scaling_perception.support.configs import Config
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import get_task
from scaling_perception.training.diffusion import diffusion_objective, network_of, tasks_of
from scaling_perception.training.noising import LATENT
from scaling_perception.training.optim import make_optimizer, update_flops
from scaling_perception.training.state import abstract_state, named_leaves
from scaling_perception.training.step import gather_dtype, make_step

_PROMPT = 768  # width of the text encoder's embeddings where no encoder is read (CLIP ViT-L/14)
# Fake devices run nothing, so their machine code need not be good: half of the time.
_FAKE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Program(NamedTuple):
    """Something that can be compiled.

    Attributes:
        name: train, sample or encode. compile: makes the executable.
        flops: of the model in one call, over all devices: twice the analytic MACs, times 3 where it is trained.
        update_flops: of the optimizer on all weights, once; 0 where it multiplies no matrices.
        batch, tokens: rows that are computed together, and tokens of each (0: no tokens).
        shapes: name -> shape of every array that stays from call to call.
        rules, specs: name -> the PartitionSpec of its rule, and its own; nothing where every device has all of it.
        expert_rows: rows that a device's experts compute in one layer if their load is even; 0 = no experts.
        head: width of an attention head; 0 = no attention.
    """

    name: str
    compile: Callable[[], Any]
    flops: float
    batch: int
    tokens: int
    shapes: dict[str, tuple[int, ...]]
    rules: dict[str, PartitionSpec]
    specs: dict[str, PartitionSpec]
    expert_rows: float
    head: int
    update_flops: float = 0.0


class AbstractBatches:
    """Batches that say what they would look like. Their arrays are one zero, seen many times."""

    fingerprint: Mapping[str, Any] = {}
    autoencoders: set[str] = set()
    class_count = 0

    def __init__(self, batch: int, side: int, channels: int, generation: bool, features: int = 0) -> None:
        def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            return np.broadcast_to(np.zeros((), dtype), shape)

        pictures = zeros((batch, side, side, channels), np.float32)
        latents = ("target", "target_logvar") if channels == LATENT else ("target",)
        names = latents if generation else ("image", "prompt", "target")
        self.fields: dict[str, Any] = dict.fromkeys(names, pictures)
        if features and channels == LATENT and not generation:
            self.fields |= dict.fromkeys(
                ("image", "prompt"), zeros((batch, side, side, channels + features), np.float32)
            )
        self.fields["valid"] = zeros((batch, side, side), bool)
        self.fields |= dict.fromkeys(("pass_id", "label"), zeros((batch,), np.int32))

    def at(self, step: int) -> dict[str, Any]:
        return dict(self.fields)

    def iterate(self, start: int) -> Iterator[dict[str, Any]]:
        while True:
            yield self.at(start)


def _without_files(config: Config) -> Config:
    """The config without what is read from disk: weights to start from, prompts, measured norms."""
    plain = config.copy_and_resolve_references()
    with plain.unlocked():
        if len(plain.task_prompts):
            changes = dict(plain.model_changes)
            plain.model_changes.context_dim = changes.get("context_dim", _PROMPT)
            for name in list(plain.task_prompts):
                del plain.task_prompts[name]
        plain.update({"init": "", "latent_norm": "none"})
    return plain


def abstract_autoencoder(name: str, limits: Any = None, dtype: Any = "float32") -> Autoencoder:
    """``tiny`` with or without features; for any other name Stable Diffusion's AutoencoderKL. Parameters are shapes."""
    if name.partition("+")[0] == "tiny":
        found = load_autoencoder(name, dtype=dtype)
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found.params)
    else:
        sizes = vae.VAEConfig()
        found = make_kl(name, sizes, {"encoder": {}, "decoder": {}}, limits, dtype)
        params = {part: jax.eval_shape(lambda p=part: vae.init_part(p, sizes, jax.random.key(0))) for part in vae.PARTS}
    fields = {field: getattr(found, field) for field in found.__dataclass_fields__}
    return Autoencoder(**{**fields, "params": params})


def _placed(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree with one sharding, or a tree of them."""
    if not isinstance(shardings, (dict, tuple, list)):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, shardings)


def _parts(mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _expert_rows(dit: DiTConfig, rows: float) -> float:
    return rows * dit.tokens * dit.active_experts if dit.experts else 0.0


def train_program(config: Config, mesh: Mesh) -> Program:
    """The train step of a config, its state spread by the sharding rules and its batch over the batch axes.

    Batches are latents where the config names a cache (which is not read), else pixels, which the step encodes.

    Raises:
        UserError: another objective than diffusion, or a batch that the mesh cannot share.
    """
    if config.objective == "autoencoder":
        raise UserError(
            f"compile knows the objectives 'diffusion' and 'one_step', and this config's is '{config.objective}'"
        )
    batch, count = config.train.batch_size, config.train.accumulate
    if batch < 1 or count < 1 or batch % (_parts(mesh) * count):
        raise UserError(
            f"a batch of {batch} cannot be shared: give a multiple of {_parts(mesh) * count}, the "
            f"{_parts(mesh)} device(s) that share it times train.accumulate {count}"
        )
    plain, tasks = _without_files(config), tasks_of(config)
    latents = bool(config.data.cache)
    side, channels = (config.resolution // LATENT_FACTOR, LATENT) if latents else (config.resolution, 3)
    generation = not all(get_task(task).conditioned for task in tasks)
    stand = AbstractBatches(batch, side, channels, generation, network_of(plain).features)
    objective = diffusion_objective(plain, stand, mesh, load=abstract_autoencoder)
    flops = 2.0 * TRAINING_FACTOR * forward_macs(objective.model) * batch
    if not latents:
        pictures = objective.model.conditions + 1
        pictures -= config.objective == "one_step"  # the target stays as it is
        flops += 2.0 * _autoencoder_macs(config, "encoder") * batch * pictures
    if config.objective == "one_step":
        flops += 2.0 * _autoencoder_macs(config, "decoder") * batch * (DECODINGS + latents)
    tx, _ = make_optimizer(config.optim, config.train.steps, objective.frozen)
    state = abstract_state(objective.init, tx)
    places, whole = tree_shardings(state, mesh), replicated(mesh)

    def compile_it() -> Any:
        skip = config.train.on_nan == "skip"
        warmup, gather = bool(config.optim.ema_warmup), gather_dtype(config.train)
        step = make_step(objective, tx, config.optim.ema, count, skip, places, ema_warmup=warmup, gather=gather)
        key = jax.eval_shape(lambda: jax.random.key(0))
        given = (_placed(state, places), _placed(stand.fields, batch_sharding(mesh)), _placed(key, whole))
        constants = None if objective.constants is None else _placed(objective.constants, whole)
        precision = config.train.matmul_precision
        with jax.default_matmul_precision(None if precision == "default" else precision):
            lowered = jax.jit(step, donate_argnums=0, out_shardings=(places, whole)).lower(*given, constants)
        return lowered.compile(_FAKE if mesh.devices.flat[0].platform == "cpu" else None)

    arrays = named_leaves(state)
    return Program(
        name="train",
        compile=compile_it,
        flops=flops,
        batch=batch // count,
        tokens=objective.model.tokens,
        shapes={name: tuple(leaf.shape) for name, leaf in arrays.items()},
        rules={name: spec_for(name) if leaf.ndim else PartitionSpec() for name, leaf in arrays.items()},
        specs={name: place.spec for name, place in named_leaves(places).items()},
        expert_rows=_expert_rows(objective.model, batch / count / _parts(mesh)),
        head=objective.model.dim // objective.model.heads,
        update_flops=update_flops(config.optim, state.params, objective.frozen),
    )


def _autoencoder_macs(config: Config, part: str) -> int:
    return part_size(abstract_autoencoder(config.autoencoder), part, config.resolution, config.resolution)[1]


def _engine(config: Config, mesh: Mesh) -> tuple[Engine, int]:
    """The engine of a config's model, and how many pictures condition it."""
    dit = network_of(_without_files(config))
    if not dit.cond_channels:
        raise UserError("compile --what sample and encode are for tasks that start from a picture; use --what train")
    return Engine(dit, abstract_autoencoder(config.autoencoder), config.train.dtype, mesh), dit.conditions


def sample_program(config: Config, mesh: Mesh, images: int, steps: int, members: int) -> Program:
    """The sampler: ``images`` pictures, whose members and passes are rows that are split over all devices."""
    engine, _ = _engine(config, mesh)
    dit, task = engine.config, tasks_of(config)[0]
    diffusion = get_diffusion(config.diffusion, **config.diffusion_changes.to_dict())
    passes = len(get_task(task).passes)
    rows = images * members * passes
    if rows % _parts(mesh):
        raise UserError(
            f"{images} image(s) of {members} member(s) and {passes} pass(es) are {rows} rows, which are not "
            f"shared by {_parts(mesh)} devices: give --batch a multiple of them"
        )

    def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    def compile_it() -> Any:
        key = jax.eval_shape(lambda: jax.random.key(0))
        ids, numbers = shape(images, dtype=jnp.uint32), shape(members, dtype=jnp.uint32)
        draw = NoiseKeys(key, ids, numbers, shape(members), shape(members, dtype=jnp.int32))
        labels = Passes(shape(passes, dtype=jnp.int32), shape(passes, LATENT), shape(passes, LATENT))
        latents = shape(images, dit.input_size, dit.input_size, dit.cond_channels)
        tables = Settings(steps=steps, ensemble=members).tables(diffusion)
        name, function, given = engine._sampling(
            abstract_params(dit), engine.autoencoder.params, latents, draw, labels, tables
        )
        return engine.compiled(name, function, *given)

    decoder = part_size(engine.autoencoder, "decoder", config.resolution, config.resolution)[1]
    flops = 2.0 * (inference_macs(dit, steps, members, passes) + decoder * members * passes) * images
    share = _expert_rows(dit, rows / _parts(mesh))
    tree = {"params": abstract_params(dit)}
    shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(tree).items()}
    split = any(mesh.shape[axis] > 1 for axis in AXES if axis != "data")
    rules = {name: spec_for(name) for name in shapes} if split else {}
    specs = {name: at.spec for name, at in named_leaves(tree_shardings(tree, mesh)).items()} if split else {}
    return Program("sample", compile_it, flops, rows, dit.tokens, shapes, rules, specs, share, dit.dim // dit.heads)


def encode_program(config: Config, mesh: Mesh, images: int) -> Program:
    """Pictures to latents, as the sampler needs them: every field that conditions the model."""
    engine, fields = _engine(config, mesh)
    size = (fields, images, config.resolution, config.resolution, 3)

    def compile_it() -> Any:
        pictures = jax.ShapeDtypeStruct(size, jnp.float32)
        return engine.compiled("encode", engine._encode, engine.autoencoder.params, pictures)

    macs = part_size(engine.autoencoder, "encoder", config.resolution, config.resolution)[1]
    return Program("encode", compile_it, 2.0 * macs * images * fields, images * fields, 0, {}, {}, {}, 0.0, 0)
