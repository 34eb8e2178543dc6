"""What a training run needs to know of the thing it trains: four functions and where its batches come from.

``train.py`` and ``step.py`` know only this; ``diffusion.py`` and ``autoencoder.py`` each make one.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
from jax.sharding import Mesh

from scaling_perception.parallel.mesh import batch_sharding
from scaling_perception.parallel.processes import own_places
from scaling_perception.parallel.rules import DIT_RULES, Rules

Params = Any  # a nested dict of arrays
Batch = Mapping[str, Any]  # field -> array (B, ...); "key" alone is a list of str and stays on the host
Metrics = dict[str, jax.Array]  # name -> float32 scalar


class Batches(Protocol):
    """Batches as a pure function of the step, so that a resumed run sees what an uninterrupted one would have seen."""

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """JSON-able description of the data; a run refuses to resume on another one."""
        ...

    def at(self, step: int) -> dict[str, Any]:
        """The batch of ``step``: numpy arrays (B, ...) and ``key``, a list of B sample ids."""
        ...

    def iterate(self, start: int) -> Iterator[dict[str, Any]]:
        """``at(start)``, ``at(start + 1)``, … without end, prefetched."""
        ...


class LatentBatches(Batches, Protocol):
    """Batches of latents or pictures, as ``data.pipeline`` makes them."""

    @property
    def autoencoders(self) -> set[str]:
        """Ids of the autoencoders that made the cached latents; empty without a cache."""
        ...

    @property
    def class_count(self) -> int:
        """The largest number of classes of the data; 0 where none says."""
        ...


def own_share(batches: Any, mesh: Mesh | None, size: int) -> LatentBatches:
    """``batches`` (of ``size``) with the rows alone that this process's devices hold, where several processes run.

    They need ``holding(places)``: the same batches, of which only the rows at ``places`` are read, in that order.
    """
    if jax.process_count() == 1 or mesh is None:
        return batches
    return batches.holding(own_places(batch_sharding(mesh), size).tolist())


class Parts(NamedTuple):
    """A loss that can be computed in parts of a batch, and is then that of the whole batch, to rounding.

    Attributes:
        tally: (params, batch, key) -> named arrays whose means over equal parts are those of the whole batch: sums,
            counts or means.
        known: the names of those that ``score`` divides by, or multiplies others with. They carry no gradient.
        score: (tally, parts) -> (loss, metrics), linear in all entries but the known ones. ``parts``: how many the
            tally is the mean of.
    """

    tally: Callable[[Params, Batch, jax.Array], dict[str, jax.Array]]
    known: tuple[str, ...]
    score: Callable[[Mapping[str, jax.Array], int], tuple[jax.Array, Metrics]]

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """The loss of a batch in one piece, as ``Objective.loss`` has it."""
        return self.score(self.tally(params, batch, key), 1)


class Objective(NamedTuple):
    """A trainable problem.

    Attributes:
        init: key -> params (pure; run under jit).
        loss: (params, batch, key) -> (float32 scalar, metrics) (pure; run under jit and differentiated by params).
            ``batch`` holds the arrays only, and ``index`` (B,): each sample's place in the whole batch, which its noise
            must depend on (and not on how the batch is cut up). A metric is a scalar, and NaN where it is undefined for
            this batch (such as the loss of a task that the batch has no sample of); one called ``weight`` says how much
            this loss counts beside those of other parts of the same batch (default 1).
        batches: where the batches come from; of several processes each has its own rows (``own_share``).
        export: (params, path, info) -> None: writes the finished model as a folder or file; ``params`` are the averaged
            ones, on the host; ``info`` is JSON-able (steps, samples, macs, seconds, ...).
        samples_per_step: global batch size B.
        constants: arrays that the loss needs and nobody trains (such as a frozen autoencoder's); the loss finds them as
            ``batch["constants"]``. Closing over them instead would bake them into the compiled program.
        model: config of the trained network, where its multiply-accumulates can be counted (a DiTConfig), else None.
        frozen: paths (names joined by '/') of leaves that are never updated, such as a fixed position table.
        starting_params: params to start from instead of ``init`` (None = from scratch); host arrays.
        meta: JSON-able facts fixed before the first step (such as the latent normalisation); stored with each
            checkpoint, and a resumed run must find the same.
        parts: the loss as parts of a batch need it, where its denominators are those of the whole batch; None weighs
            the parts' losses and metrics by ``weight``.
        held_out: batches of samples that are not trained on, whole, as ``validation.py`` wants them; None = none.
        rules: which parameter is split over which axis of the mesh.
    """

    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, Batch, jax.Array], tuple[jax.Array, Metrics]]
    batches: Batches
    export: Callable[[Params, str, Mapping[str, Any]], None]
    samples_per_step: int
    constants: Any = None
    model: Any = None
    frozen: tuple[str, ...] = ()
    starting_params: Params | None = None
    meta: Mapping[str, Any] = {}
    held_out: Batches | None = None
    parts: Parts | None = None
    rules: Rules = DIT_RULES
