"""Ways of sampling one prediction, for `bench sample`: the predictor's, those between it and a plain loop, torch's.

Every way gives the decoded members of one picture, so that they can be held against each other.
"""

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.timing import peer
from scaling_perception.timing.rounds import Function

AUTOENCODERS = ("tiny", "taesd", "sd")
LARGEST_PIXEL, LARGEST_ESTIMATE = 1e-3, 1e-4  # difference from torch in float32, over the largest value


class Case(NamedTuple):
    """What is predicted, and by which model."""

    predictor: Any
    settings: Any
    pictures: list[np.ndarray]  # (R, R, 3) uint8

    @property
    def config(self) -> Any:
        return self.predictor.config

    @property
    def tables(self) -> Any:
        return self.settings.tables(self.predictor.diffusion)

    @property
    def evaluations(self) -> int:
        """Of the network, for one image."""
        return self.settings.evaluations * self.settings.ensemble


def draw_leaves(shapes: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Kernels that keep the size of what goes through them, norms near 1, small biases."""
    drawn = {}
    for name, shape in shapes.items():
        leaf = rng.standard_normal(shape, np.float32)
        if name.endswith("bias"):
            leaf *= 0.1
        elif name.endswith("scale"):
            leaf = 1 + 0.1 * leaf
        elif name.endswith("label_embed") or "/modulation/" in name:
            leaf *= 0.1 / np.sqrt(shape[-2])
        else:
            leaf /= np.sqrt(np.prod(shape[1:-1] if name.startswith("blocks") else shape[:-1]))
        drawn[name] = leaf
    return drawn


def _autoencoder(family: str, rng: np.random.Generator) -> Any:
    from scaling_perception.models import tiny_vae, vae
    from scaling_perception.models.autoencoders import PARTS, make_kl, make_tiny

    if family not in AUTOENCODERS:
        raise UserError(f"unknown autoencoder '{family}'{did_you_mean(family, AUTOENCODERS)}")
    config: Any = {"tiny": tiny_vae.SMALL, "taesd": tiny_vae.TAESD, "sd": vae.VAEConfig()}[family]
    module: Any = vae if family == "sd" else tiny_vae
    trees = {part: tiny_vae.unflatten(draw_leaves(module.part_shapes(part, config), rng)) for part in PARTS}
    return (make_kl if family == "sd" else make_tiny)(family, config, trees)


def draw_specialist(model: str, resolution: int, rng: np.random.Generator) -> tuple[Any, dict[str, Any]]:
    """(DiTConfig, parameters) of a preset as a depth specialist.

    Raises:
        UserError: an unknown model, or a resolution that makes no patches.
    """
    from scaling_perception.interop.safetensors_io import flatten_tree, unflatten_tree
    from scaling_perception.models.dit import abstract_params, position_table
    from scaling_perception.models.presets import at_resolution, get_preset

    specialist = {"cond_channels": 4, "task_labels": 0, "routed": False, "num_classes": 1000}
    config = at_resolution(get_preset(model, **specialist), resolution)
    shapes = {name: leaf.shape for name, leaf in flatten_tree(abstract_params(config)).items()}
    params = unflatten_tree(draw_leaves(shapes, rng))
    return config, {**params, "pos_embed": position_table(config.dim, config.grid)}


def make_case(args: argparse.Namespace) -> Case:
    """The model, its autoencoder and pictures, all drawn.

    Raises:
        UserError: an unknown model or autoencoder, a number below 1, or a resolution that makes no patches.
    """
    import dataclasses

    from scaling_perception import Predictor
    from scaling_perception.diffusion.schedules import get_diffusion
    from scaling_perception.inference.settings import Settings

    for name in ("steps", "ensemble", "images", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give 1 or more")
    rng = np.random.default_rng(0)
    autoencoder = _autoencoder(args.autoencoder, rng)
    config, params = draw_specialist(args.model, args.resolution, rng)
    meta = {
        "model": dataclasses.asdict(config),
        "resolution": args.resolution,
        "autoencoder": args.autoencoder,
        "diffusion": dataclasses.asdict(get_diffusion("released")),
        "tasks": ["depth"],
        "latent_norm": {"shift": [[0.0] * 4], "scale": [[1.0] * 4]},
    }
    predictor = Predictor(params, meta, autoencoder, args.dtype)
    pictures = [rng.integers(0, 256, (args.resolution, args.resolution, 3), np.uint8) for _ in range(args.images)]
    return Case(predictor, Settings(steps=args.steps, ensemble=args.ensemble), pictures)


def predict(case: Case) -> Any:
    """The predictor, called as a person does."""
    settings = case.settings
    return case.predictor(case.pictures, "depth", steps=settings.steps, ensemble=settings.ensemble).prediction


def finish(case: Case, pixels: np.ndarray) -> np.ndarray:
    """Decoded members (M, R, R, 3) of one image to a depth map, by the predictor's own means."""
    predictor, (height, width) = case.predictor, case.pictures[0].shape[:2]
    members = predictor.decode_members(np.asarray(pixels)[None], "depth")
    return predictor.merge(members, "depth", (height, width), "lsq").prediction


class Parts(NamedTuple):
    """Arrays of one image that the stages start from."""

    picture: np.ndarray  # (1, R, R, 3) in [-1, 1]
    latents: Any  # (1, h, w, 4)
    draw: Any
    noise: Any  # (M, h, w, 4)


def one_picture(case: Case, picture: np.ndarray) -> Parts:
    import jax

    from scaling_perception.inference.batches import BatchPlan
    from scaling_perception.inference.draws import draw_members
    from scaling_perception.tasks import get_task

    predictor = case.predictor
    raws = predictor.raw_inputs([picture], "depth")
    plain = get_task("depth").conditions(raws[0], predictor.resolution, predictor.options)["image"]
    latents = predictor.encode(raws, "depth", BatchPlan(1, case.settings.ensemble))
    draw = draw_members(jax.random.key(0), predictor.image_ids(raws, 1), 0, case.settings.ensemble, False)
    passes = predictor.passes("depth")
    _, _, state = predictor.engine.init_state(predictor.params, latents, draw, passes, case.tables)
    return Parts(np.asarray(plain, np.float32)[None], latents, draw, np.asarray(state.x[0, :, 0]))


def pixels_of(case: Case, parts: Parts, engine: Any = None) -> np.ndarray:
    """Encode once and sample all members in the engine's graphs: pixels (M, R, R, 3)."""
    predictor = case.predictor
    engine = engine or predictor.engine
    latents = engine.encode(predictor.weights[1], parts.picture[None])
    passes = predictor.passes("depth")
    return np.asarray(engine.sample(*predictor.weights, latents, parts.draw, passes, case.tables))[0, 0]


# The way from a plain loop to the predictor


def make_levers(case: Case, parts: Parts) -> dict[str, Function]:
    """Ways of sampling one image's pixels (M, R, R, 3), each with one lever more than the one before it; and last the
    predictor's own without its attention of the processor."""
    import jax
    import jax.numpy as jnp

    from scaling_perception.diffusion.sampler import sample
    from scaling_perception.inference.engine import Engine
    from scaling_perception.models import dit
    from scaling_perception.ops.attention import attention_einsum, split_heads
    from scaling_perception.support.compiler_options import convolving

    predictor, tables, noise = case.predictor, case.tables, parts.noise
    engine, config = predictor.engine, case.config
    model, (params, coder), label = engine.model, predictor.weights, predictor.passes("depth").labels
    jitted = partial(jax.jit, compiler_options=convolving(jax.default_backend()))  # as the predictor's graphs

    def latent(coder: Any, picture: Any) -> Any:
        return engine.autoencoder.encode(coder, picture)[0]

    encode, decode = jitted(latent), jitted(engine.autoencoder.decode)

    def network(params: Any, known: Any, x: Any, t: Any) -> Any:
        both = jnp.concatenate([jnp.broadcast_to(known, (x.shape[0], *known.shape[1:])), x], axis=-1)
        out: Any = model.apply({"params": params}, both, t[None], jnp.broadcast_to(label, x.shape[:1]))
        return out[..., : config.in_channels]

    def scan(params: Any, coder: Any, known: Any, x: Any, tables: Any) -> Any:
        z = sample(lambda x, row: network(params, known, x, row.t), tables, x)
        return engine.autoencoder.decode(coder, z)

    def hoisted(params: Any, coder: Any, known: Any, x: Any, tables: Any) -> Any:
        tokens = dit.embed_conditions(config, params, known, label, model.dtype)

        def every(values: Any) -> Any:
            return jnp.broadcast_to(values, (*values.shape[:-2], x.shape[0], values.shape[-1]))

        def denoise(x: Any, row: Any) -> Any:
            blocks, final = (m[0] for m in dit.modulations(config, params, row.t[None].astype(jnp.float32), label))
            rows = jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape[1:]))
            fixed = dit.PrecomputedConditioning(rows, every(blocks), every(final))
            labels = jnp.broadcast_to(label, x.shape[:1])
            out: Any = model.apply({"params": params}, x, row.t[None], labels, fixed=fixed)
            return out[..., : config.in_channels]

        return engine.autoencoder.decode(coder, sample(denoise, tables, x))

    step, whole, hoist = jitted(network), jitted(scan), jitted(hoisted)
    again = jitted(
        lambda params, coder, picture, x, tables: scan(params, coder, latent(coder, picture), x, tables)
    )  # everything of a member in one graph

    def loop() -> np.ndarray:
        members = []
        for start in noise:
            known, x = encode(coder, parts.picture), start[None]
            for i, t in enumerate(tables.t):
                out = np.asarray(step(params, known, x, t))
                clean = tables.x0_x[i] * x + tables.x0_out[i] * out
                x = tables.next_x[i] * x + tables.next_x0[i] * clean
            members.append(decode(coder, x)[0])
        return np.stack(members)

    def one_graph() -> np.ndarray:
        return np.stack([again(params, coder, parts.picture, start[None], tables)[0] for start in noise])

    def encode_once() -> np.ndarray:
        known = encode(coder, parts.picture)
        return np.stack([whole(params, coder, known, start[None], tables)[0] for start in noise])

    plain = Engine(config, engine.autoencoder, model.dtype, engine.mesh, engine.zero_start)

    def without() -> np.ndarray:
        def einsum(qkv: Any, heads: int, mesh: Any) -> Any:
            return attention_einsum(*split_heads(qkv, heads)).reshape(*qkv.shape[:2], -1)

        # looked up while the graph is traced
        with mock.patch.object(dit, "projection_attention", einsum):
            return pixels_of(case, parts, plain)

    return {
        "loop in Python": loop,
        "+ one graph": one_graph,
        "+ encode once": encode_once,
        "+ members batched": lambda: np.asarray(whole(params, coder, encode(coder, parts.picture), noise, tables)),
        "+ conditions hoisted": lambda: np.asarray(hoist(params, coder, encode(coder, parts.picture), noise, tables)),
        "+ modulation ahead": lambda: pixels_of(case, parts),
        "the last, attention by einsum": without,
    }


# PyTorch


def make_torch(case: Case, kind: str) -> Any:
    """A `torch_peer.Sampler` of the case's weights; ``kind``: explicit, sdpa, or compiled (sdpa).

    Raises:
        UserError: no torch here, a model it is not written for, or an accelerator on our side.
    """
    torch_peer = peer.prepare()
    import torch  # pyright: ignore[reportMissingImports]

    predictor = case.predictor
    network: Any = torch_peer.make_dit(case.config, predictor.params, "sdpa" if kind == "compiled" else kind)
    network = torch.compile(network) if kind == "compiled" else network
    label = int(predictor.passes("depth").labels[0])
    return torch_peer.Sampler(network, predictor.autoencoder, predictor.diffusion, case.settings.steps, label)


def torch_prediction(case: Case, sampler: Any, every: list[Parts]) -> list[np.ndarray]:
    return [finish(case, sampler(parts.picture[0], parts.noise)) for parts in every]


def difference(one: Any, other: Any) -> float:
    """Largest difference over the largest value of ``other``."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(np.max(np.abs(one - other)) / max(np.max(np.abs(other)), np.finfo(np.float64).tiny))


def agreement(case: Case, parts: Parts, sampler: Any) -> dict[str, float]:
    """Largest relative difference from torch, of decoded depth and of the clean estimate of any step.

    Raises:
        RuntimeError: in float32, more than rounding explains: it is not the same computation.
    """
    predictor, steps = case.predictor, case.settings.steps
    engine, passes, tables = predictor.engine, predictor.passes("depth"), case.tables
    estimates: list[np.ndarray] = []
    theirs = sampler(parts.picture[0], parts.noise, estimates).mean(axis=-1)
    cond_tokens, modulation_table, state = engine.init_state(
        predictor.params, parts.latents, parts.draw, passes, tables
    )
    found = {"pixels": difference(pixels_of(case, parts).mean(axis=-1), theirs), "estimates": 0.0}
    expected = np.stack(estimates).reshape(case.settings.ensemble, steps, *parts.noise.shape[1:])
    for i in range(steps):
        state = engine.run_steps(predictor.params, cond_tokens, modulation_table, state, passes.labels, tables, i, 1)
        found["estimates"] = max(found["estimates"], difference(state.x0[0, :, 0], expected[:, i]))
    exact = engine.model.dtype == np.float32
    if exact and not (found["pixels"] <= LARGEST_PIXEL and found["estimates"] <= LARGEST_ESTIMATE):
        raise RuntimeError(f"ours and torch's results differ by {found}: they do not compute the same")
    return found
