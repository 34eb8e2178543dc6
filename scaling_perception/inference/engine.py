"""The compiled graphs of a model and its autoencoder: pictures to latents, noise to pixels, in one piece or in several.

What does not change from step to step is computed once, outside the scan: the modulation of every step (it depends on
timestep and label alone) and the tokens of the conditions (once for each image and pass, however many members).
Weights, pictures, keys and the sampler's coefficients are arguments: only shapes and the number of steps make a new
graph.

Rows of the sampling batch are images × members × passes, in this order: I, M, P. On several devices the rows are split
over the mesh's batch axes, and the weights of the transformer over ``fsdp``, ``expert`` and ``tensor`` by the rules of
training: where these are of size 1, as on the mesh that is used unless one is given, every device has all of them. The
autoencoder is whole on every device.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from scaling_perception.diffusion.sampler import SamplerTables, State, advance, final_memory, sample, start_state
from scaling_perception.inference.draws import NoiseKeys
from scaling_perception.models.autoencoders import Autoencoder
from scaling_perception.models.config import DiTConfig
from scaling_perception.models.dit import DiT, PrecomputedConditioning, abstract_params, embed_conditions, modulations
from scaling_perception.parallel.mesh import BATCH_AXES, replicated
from scaling_perception.parallel.rules import tree_shardings
from scaling_perception.support.compiler_options import convolving
from scaling_perception.support.executables import kept_executable
from scaling_perception.support.shapes import Array, EitherArray, Float, Int

Latents = Float[EitherArray, "I h w F"]
"""Of the pictures that condition, the channels of one after another; twice as many channels where members see views:
those of the pictures, then those of their mirror images."""
_AHEAD = 2**30  # bytes of modulation that are kept for all steps together; beyond, each step computes its own


class Passes(NamedTuple):
    """The task's passes: labels (P,) int32; shift and scale (P, C) float32 of the latents they were trained on."""

    labels: Int[EitherArray, " P"]
    shift: Float[EitherArray, "P C"]
    scale: Float[EitherArray, "P C"]


def _inner(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> Float[Array, ""]:
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32))


class Engine:
    """Graphs of one model, compiled once for each set of shapes. Calls from several threads are safe.

    Attributes:
        traces: how often each graph was traced, by name.
        compile_seconds: spent compiling so far.
    """

    def __init__(
        self, config: DiTConfig, autoencoder: Autoencoder, dtype: str, mesh: Any = None, zero_start: bool = False
    ) -> None:
        """Args: ``mesh``: devices to split rows and weights over; None is one device. ``zero_start``: sampling starts
        from zeros in place of noise, as some models of one step were trained."""
        self.config, self.autoencoder, self.zero_start = config, autoencoder, zero_start
        self.mesh = mesh if mesh is not None and mesh.size > 1 else None
        self.model = DiT(config, dtype=jnp.dtype(dtype), mesh=self.mesh)
        self.traces: Counter[str] = Counter()
        self.compile_seconds = 0.0
        shapes = abstract_params(config)
        self._weights = jax.tree.structure(shapes)
        self._places = None if self.mesh is None else tree_shardings(shapes, self.mesh)
        self._compiled: dict[Any, Any] = {}
        self._lock = threading.Lock()

    @property
    def devices(self) -> int:
        """Parts that the rows are split into: the devices along the mesh's batch axes."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in BATCH_AXES)

    @property
    def layout(self) -> str:
        """The mesh in words: ``8``, or ``8 (fsdp 4)`` where weights are split."""
        split = {} if self.mesh is None else {name: size for name, size in self.mesh.shape.items() if size > 1}
        words = ", ".join(f"{name} {size}" for name, size in split.items() if name != "data")
        return f"{1 if self.mesh is None else self.mesh.size}" + (f" ({words})" if words else "")

    def place(self, tree: Any) -> Any:
        """A tree on the devices of the engine: the transformer's parameters by the rules, any other whole."""
        return jax.device_put(tree, self._sharding(tree))

    def _sharding(self, tree: Any) -> Any:
        if self.mesh is None:
            return None
        return self._places if jax.tree.structure(tree) == self._weights else replicated(self.mesh)

    # The graphs

    def encode(
        self, vae: Any, pictures: Float[EitherArray, "F I R R 3"], frames: bool = False
    ) -> Float[Array, "I h w C"]:
        """Pictures (F, I, R, R, 3) of F fields to latents (I, h, w, F * 4), with their features. ``frames``: the second
        field is a second frame, which an autoencoder that ``matches`` encodes together with the first."""
        if frames and self.autoencoder.matches:
            return self.run("encode frames", partial(self._encode, frames=True), vae, pictures)
        return self.run("encode", self._encode, vae, pictures)

    def sample(
        self,
        params: Any,
        vae: Any,
        latents: Latents,
        draw: NoiseKeys,
        passes: Passes,
        tables: SamplerTables,
        keep: tuple[int, ...] | None = None,
    ) -> Float[Array, "*kept I P M R R 3"]:
        """Pixels (I, P, M, R, R, 3), about [-1, 1]; with ``keep`` (K, I, P, M, R, R, 3) of those steps' estimates."""
        name, function, arguments = self._sampling(params, vae, latents, draw, passes, tables, keep)
        return self.run(name, function, *arguments)

    def _sampling(
        self,
        params: Any,
        vae: Any,
        latents: Any,
        draw: NoiseKeys,
        passes: Passes,
        tables: SamplerTables,
        keep: tuple[int, ...] | None = None,
    ) -> tuple[str, Callable[..., jax.Array], tuple[Any, ...]]:
        noisy = bool(np.asarray(tables.sigma).any())  # the graph draws noise, or does not
        name = "sample" + (" with noise" if noisy else "") + (f" keeping {keep}" if keep else "")
        function = partial(self._sample, noisy=noisy, keep=keep)
        return name, function, (params, vae, latents, draw, passes, tables)

    def clean(
        self, params: Any, latents: Latents, draw: NoiseKeys, passes: Passes, tables: SamplerTables
    ) -> Float[Array, "I M P h w C"]:
        """Clean latents of every member, (I, M, P, h, w, C) in training units: what `sample` decodes."""
        name, function, arguments = self._denoising(params, latents, draw, passes, tables)
        return self.run(name, function, *arguments)

    def _denoising(self, *arguments: Any) -> tuple[str, Callable[..., jax.Array], tuple[Any, ...]]:
        noisy = bool(np.asarray(arguments[-1].sigma).any())
        return "clean" + (" with noise" if noisy else ""), partial(self._clean, noisy=noisy), arguments

    def sampling_bytes(self, params: Any, vae: Any, *more: Any, decoded: bool = True) -> int:
        """Memory that `sample` (not ``decoded``: `clean`) needs on a device besides its arguments, by the compiler's
        account (compiles it)."""
        name, function, given = self._sampling(params, vae, *more) if decoded else self._denoising(params, *more)
        analysis = self.compiled(name, function, *given).memory_analysis()
        return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)

    def cache_moments(
        self, params: Any, latents: Latents, draw: NoiseKeys, passes: Passes, tables: SamplerTables
    ) -> Float[np.ndarray, "S 5"]:
        """(T, 5), what `caching.fit_weights` needs, of a run that computes every step; ``tables`` have a cache."""
        function = partial(self._cache_moments, noisy=bool(np.asarray(tables.sigma).any()))
        return np.asarray(self.run("cache moments", function, params, latents, draw, passes, tables))

    def init_state(
        self, params: Any, latents: Latents, draw: NoiseKeys, passes: Passes, tables: SamplerTables
    ) -> tuple[Float[Array, "I *M P T D"], Any, State]:
        """What `run_steps` needs: conditions (I, P, T, D), or (I, M, P, T, D) where members see views; the modulations
        of all steps; a state of (I, M, P, ...)."""
        return self.run("begin", self._init_state, params, latents, draw, passes, tables)

    def run_steps(
        self,
        params: Any,
        cond_tokens: Float[EitherArray, "I *M P T D"],
        modulation_table: Any,
        state: State,
        labels: Int[EitherArray, " P"],
        tables: SamplerTables,
        first: int,
        count: int,
    ) -> State:
        """Steps ``first`` to ``first + count - 1`` of a table without noise and without a cache."""
        if tables.cache is not None:
            raise ValueError("a cache goes with whole runs: use sample")
        function = partial(self._run_steps, count=count)
        return self.run(
            f"{count} steps", function, params, cond_tokens, modulation_table, state, labels, tables, np.int32(first)
        )

    def decode(self, vae: Any, z: Float[EitherArray, "I M P h w C"], passes: Passes) -> Float[Array, "I P M R R 3"]:
        """Clean latents (I, M, P, h, w, C) to pixels (I, P, M, R, R, 3)."""
        return self.run("decode", self._decode, vae, z, passes)

    def round_trip(self, vae: Any, pictures: Float[EitherArray, "B R R 3"]) -> Float[Array, "B R R 3"]:
        """Pictures (B, R, R, 3) through the autoencoder and back."""
        return self.run("round_trip", self._round_trip, vae, pictures)

    # What they trace

    def _encode(self, vae: Any, pictures: jax.Array, frames: bool = False) -> jax.Array:
        if frames:
            first, second = (self._spread(picture) for picture in pictures)
            latents = self.autoencoder.encode(vae, first)[0], self.autoencoder.encode(vae, second, first)[0]
            return jnp.concatenate(latents, axis=-1).astype(jnp.float32)
        fields, images, *shape = pictures.shape
        mean, _ = self.autoencoder.encode(vae, self._spread(pictures.reshape(fields * images, *shape)))
        mean = mean.astype(jnp.float32).reshape(fields, images, *mean.shape[1:])
        return jnp.concatenate(list(mean), axis=-1)

    def _noise(self, draw: NoiseKeys, shape: tuple[int, ...], step: jax.Array | None = None) -> jax.Array:
        """(I, M, *shape): a member's noise depends on key, image and member alone; step None is the start's."""
        if step is None and self.zero_start:
            return jnp.zeros((len(draw.ids), len(draw.members), *shape))

        def one(image: jax.Array, member: jax.Array, sign: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(draw.key, image), member)
            key = key if step is None else jax.random.fold_in(key, step + 1)
            return sign * jax.random.normal(key, shape)

        return jax.vmap(lambda image: jax.vmap(partial(one, image))(draw.members, draw.signs))(draw.ids)

    def _spread(self, rows: jax.Array) -> jax.Array:
        """Rows (N, ...) split over the devices, where they divide."""
        if self.mesh is None or rows.shape[0] % self.devices:
            return rows
        return jax.lax.with_sharding_constraint(rows, NamedSharding(self.mesh, PartitionSpec(BATCH_AXES)))

    def _on_each(self, function: Callable[..., Any], vae: Any, rows: jax.Array) -> Any:
        """``function(vae, rows)``, each device with its own rows. It may loop over rows, a few at a time, and a loop
        over an array that is split would have every device compute all of it."""
        if self.mesh is None or rows.shape[0] % self.devices:
            return function(vae, rows)
        split = PartitionSpec(BATCH_AXES)
        takes = (PartitionSpec(), split)
        return jax.shard_map(function, mesh=self.mesh, in_specs=takes, out_specs=split, check_vma=False)(vae, rows)

    def _cond_tokens(self, params: Any, latents: jax.Array, labels: jax.Array, seen: jax.Array) -> jax.Array:
        """Tokens of the conditions, (I, P, T, D), or of every member (I, M, P, T, D) where they see views."""
        if latents.shape[-1] == 2 * self.config.cond_channels > 0:
            both = [self._cond_tokens(params, half, labels, seen) for half in jnp.split(latents, 2, axis=-1)]
            return jnp.stack(both, axis=1)[:, seen]
        images, passes = latents.shape[0], labels.shape[0]
        each = jnp.broadcast_to(latents[:, None], (images, passes, *latents.shape[1:]))
        label = jnp.broadcast_to(labels[None], (images, passes)).reshape(-1)
        flat = each.reshape(-1, *latents.shape[1:])
        tokens = embed_conditions(self.config, params, flat, label, self.model.dtype)
        return tokens.reshape(images, passes, *tokens.shape[1:])

    def _modulation_table(self, params: Any, labels: jax.Array, tables: SamplerTables) -> Any:
        """Modulations of all steps, or None where they would take too much."""
        per_step = 4 * labels.shape[0] * self.config.dim * (6 * self.config.depth + 2)
        if per_step * len(tables.t) > _AHEAD:
            return None
        return modulations(self.config, params, jnp.asarray(tables.t, jnp.float32), labels)

    def _network(
        self, params: Any, cond_tokens: jax.Array, modulation_table: Any, labels: jax.Array, members: int
    ) -> Callable[..., Any]:
        """(x, row, **more of ``DiT``'s arguments) -> the network's output, or with ``mutable`` also a collection."""
        rows, size = (cond_tokens.shape[0], members, cond_tokens.shape[-3]), cond_tokens.shape[-2:]
        every = cond_tokens if cond_tokens.ndim == 5 else cond_tokens[:, None]
        tokens = self._spread(jnp.broadcast_to(every, (*rows, *size)).reshape(-1, *size))
        label = jnp.broadcast_to(labels[None, None], rows).reshape(-1)

        def each_row(values: jax.Array) -> jax.Array:
            """(..., P, W) to (..., rows, W)."""
            lead, width = values.shape[:-2], values.shape[-1]
            whole = jnp.broadcast_to(values[..., None, None, :, :], (*lead, *rows, width))
            return whole.reshape(*lead, -1, width)

        def network(x: jax.Array, row: SamplerTables, **more: Any) -> Any:
            if modulation_table is None:
                blocks, final = (
                    m[0] for m in modulations(self.config, params, row.t[None].astype(jnp.float32), labels)
                )
            else:
                blocks, final = (jax.lax.dynamic_index_in_dim(m, row.index, keepdims=False) for m in modulation_table)
            fixed = PrecomputedConditioning(tokens, each_row(blocks), each_row(final))
            return self.model.apply({"params": params}, self._spread(x), row.t[None], label, fixed=fixed, **more)

        return network

    def _plain(self, network: Callable[..., Any]) -> Callable[[jax.Array, SamplerTables], jax.Array]:
        return lambda x, row: network(x, row)[..., : self.config.in_channels]  # what follows is the learned variance

    def _features(self, network: Callable[..., Any], kind: str, x: jax.Array, row: SamplerTables) -> Any:
        """The network's output and the features that a cache of this kind keeps."""
        out, found = network(x, row, mutable=["features"])
        features = found["features"]
        kept = {"trunk": features["trunk"]} if kind == "trunk" else {"blocks": features["blocks"]}
        return out[..., : self.config.in_channels], kept

    def _cached(self, network: Callable[..., Any], tables: SamplerTables, x: jax.Array) -> tuple[Any, Any]:
        """(denoise, its memory before the first step): the blocks are computed in the steps that the table's cache
        says, in both kinds of steps with the same shapes. The memory are the features of the last two of them."""
        assert tables.cache is not None
        kind = tables.cache.features

        def compute(x: jax.Array, row: SamplerTables, memory: Any) -> Any:
            out, features = self._features(network, kind, x, row)
            return out, (features, memory[0])

        def reuse(x: jax.Array, row: SamplerTables, memory: Any) -> Any:
            assert row.cache is not None
            last, older = row.cache.last, row.cache.older
            features = jax.tree.map(lambda a, b: last * a.astype(x.dtype) + older * b.astype(x.dtype), *memory)
            return network(x, row, features=features)[..., : self.config.in_channels], memory

        def denoise(x: jax.Array, row: SamplerTables, memory: Any) -> Any:
            assert row.cache is not None
            return jax.lax.cond(row.cache.compute > 0, compute, reuse, x, row, memory)

        return denoise, (self._no_features(network, tables, x),) * 2

    def _no_features(self, network: Callable[..., Any], tables: SamplerTables, x: jax.Array) -> Any:
        """Zeros in the shapes of a cache's features."""
        assert tables.cache is not None
        row = jax.tree.map(lambda column: jnp.asarray(column)[0], tables)
        shapes = jax.eval_shape(partial(self._features, network, tables.cache.features), x, row)[1]
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def _cache_moments(
        self, params: Any, latents: jax.Array, draw: NoiseKeys, passes: Passes, tables: SamplerTables, noisy: bool
    ) -> jax.Array:
        assert tables.cache is not None
        kind, steps = tables.cache.features, len(tables.t)
        network, x, fresh = self._start(params, latents, draw, passes, tables, noisy)
        nothing = self._no_features(network, tables, x)

        def denoise(x: jax.Array, row: SamplerTables, memory: Any) -> Any:
            assert row.cache is not None
            last, older, moments = memory
            out, now = self._features(network, kind, x, row)
            ahead, change = (
                jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), *pair)
                for pair in ((last, older), (now, last))
            )
            pairs = ((last, last), (last, ahead), (ahead, ahead), (last, change), (ahead, change))
            sums = jnp.stack([sum(jax.tree.leaves(jax.tree.map(_inner, *pair))) for pair in pairs])
            computes = row.cache.compute > 0
            older, last = (
                jax.tree.map(lambda new, old: jnp.where(computes, new, old), *pair)
                for pair in ((last, older), (now, last))
            )
            return out, (last, older, moments.at[row.index].set(sums))

        return final_memory(denoise, tables, x, fresh, (nothing, nothing, jnp.zeros((steps, 5))))[2]

    def _shapes(
        self, latents: jax.Array, draw: NoiseKeys, passes: Passes
    ) -> tuple[tuple[int, int, int], tuple[int, ...]]:
        rows = (latents.shape[0], draw.members.shape[0], passes.labels.shape[0])
        return rows, (*latents.shape[1:3], self.config.in_channels)

    def _sample(
        self,
        params: Any,
        vae: Any,
        latents: jax.Array,
        draw: NoiseKeys,
        passes: Passes,
        tables: SamplerTables,
        noisy: bool,
        keep: tuple[int, ...] | None,
    ) -> jax.Array:
        found = self._clean(params, latents, draw, passes, tables, noisy, keep)
        if keep:
            return jax.lax.map(lambda z: self._decode(vae, z, passes), found)
        return self._decode(vae, found, passes)

    def _clean(
        self,
        params: Any,
        latents: jax.Array,
        draw: NoiseKeys,
        passes: Passes,
        tables: SamplerTables,
        noisy: bool,
        keep: tuple[int, ...] | None = None,
    ) -> jax.Array:
        """(I, M, P, h, w, C); with ``keep`` (K, I, M, P, h, w, C) of those steps' estimates."""
        rows, latent = self._shapes(latents, draw, passes)
        network, x, fresh = self._start(params, latents, draw, passes, tables, noisy)
        cached = tables.cache is not None
        denoise, memory = self._cached(network, tables, x) if cached else (self._plain(network), None)
        if keep:
            _, kept = sample(denoise, tables, x, fresh, keep=keep, memory=memory)
            return kept.reshape(len(keep), *rows, *latent)
        return sample(denoise, tables, x, fresh, memory=memory).reshape(*rows, *latent)

    def _start(
        self, params: Any, latents: jax.Array, draw: NoiseKeys, passes: Passes, tables: SamplerTables, noisy: bool
    ) -> tuple[Any, jax.Array, Any]:
        """The network with what it knows ahead, the starting noise of every row, and the noise of a step or None."""
        rows, latent = self._shapes(latents, draw, passes)

        def every_pass(noise: jax.Array) -> jax.Array:  # passes share their noise
            return self._spread(jnp.broadcast_to(noise[:, :, None], (*rows, *latent)).reshape(-1, *latent))

        cond_tokens, modulation_table = (
            self._cond_tokens(params, latents, passes.labels, draw.views),
            self._modulation_table(params, passes.labels, tables),
        )
        network = self._network(params, cond_tokens, modulation_table, passes.labels, rows[1])
        fresh = (lambda row: every_pass(self._noise(draw, latent, row.index))) if noisy else None
        return network, every_pass(self._noise(draw, latent)), fresh

    def _init_state(
        self, params: Any, latents: jax.Array, draw: NoiseKeys, passes: Passes, tables: SamplerTables
    ) -> tuple[Any, Any, State]:
        rows, latent = self._shapes(latents, draw, passes)
        noise = jnp.broadcast_to(self._noise(draw, latent)[:, :, None], (*rows, *latent))
        cond_tokens = self._cond_tokens(params, latents, passes.labels, draw.views)
        return cond_tokens, self._modulation_table(params, passes.labels, tables), start_state(tables, noise)

    def _run_steps(
        self,
        params: Any,
        cond_tokens: Float[EitherArray, "I *M P T D"],
        modulation_table: Any,
        state: State,
        labels: Int[EitherArray, " P"],
        tables: SamplerTables,
        first: Any,
        count: int,
    ) -> State:
        shape = state.x.shape
        denoise = self._plain(self._network(params, cond_tokens, modulation_table, labels, shape[1]))
        flat = jax.tree.map(lambda array: self._spread(array.reshape(-1, *shape[3:])), state)
        return jax.tree.map(lambda array: array.reshape(shape), advance(denoise, tables, flat, first, count))

    def _decode(self, vae: Any, z: jax.Array, passes: Passes) -> jax.Array:
        rows, latent = z.shape[:3], z.shape[3:]
        z = z * passes.scale[None, None, :, None, None, :] + passes.shift[None, None, :, None, None, :]
        pixels = self._on_each(self.autoencoder.decode, vae, z.reshape(-1, *latent)).astype(jnp.float32)
        return pixels.reshape(*rows, *pixels.shape[1:]).swapaxes(1, 2)

    def _round_trip(self, vae: Any, pictures: jax.Array) -> jax.Array:
        mean, _ = self.autoencoder.encode(vae, pictures)
        return self.autoencoder.decode(vae, mean[..., : self.autoencoder.latent_channels])

    # Compiling

    def run(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a graph, compiled once for each set of shapes; compiling apart lets `sweep` time running alone."""
        return self.compiled(name, function, *arguments)(*arguments)

    def compiled(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """The executable of a graph for these shapes (arrays, or ``ShapeDtypeStruct`` in their place)."""
        leaves, tree = jax.tree.flatten(arguments)
        signature = (name, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        with self._lock:
            if signature not in self._compiled:

                def counted(*values: Any) -> Any:
                    self.traces[name] += 1  # runs while tracing only
                    return function(*values)

                # what goes in and out is whole on every device, but for weights; inside, rows are split
                io: dict[str, Any] = {}
                if self.mesh is not None:
                    io = {"in_shardings": tuple(map(self._sharding, arguments)), "out_shardings": replicated(self.mesh)}
                begin = time.perf_counter()
                devices = jax.local_devices()[:1] if self.mesh is None else list(self.mesh.devices.flat)
                options = convolving(devices[0].platform, window_sums=name == "encode frames")

                def build() -> Any:
                    return jax.jit(counted, **io).lower(*arguments).compile(options)

                self._compiled[signature] = kept_executable(self._about(name), arguments, devices, build)
                self.compile_seconds += time.perf_counter() - begin
            return self._compiled[signature]

    def _about(self, name: str) -> str | None:
        """All that decides a graph of this engine besides its shapes; None where the autoencoder does not describe
        itself."""
        autoencoder = self.autoencoder.program
        if autoencoder is None:
            return None
        mesh = None if self.mesh is None else [list(self.mesh.shape.items()), str(self.mesh.axis_types)]
        return repr((name, self.config, self.model.dtype, self.zero_start, mesh, autoencoder))
