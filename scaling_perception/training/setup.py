"""What a run is made of before its first step: objective, optimiser, mesh, where each array lives, and its identity."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding

from scaling_perception.models.compute import forward_macs
from scaling_perception.parallel import processes
from scaling_perception.parallel.mesh import BATCH_AXES, batch_sharding, replicated
from scaling_perception.parallel.rules import tree_shardings
from scaling_perception.support.compiler_options import convolving
from scaling_perception.support.configs import Config
from scaling_perception.support.errors import UserError
from scaling_perception.support.field_checks import best_metric
from scaling_perception.training import averaging
from scaling_perception.training.identity import as_json, same_everywhere
from scaling_perception.training.objective import Objective
from scaling_perception.training.optim import make_optimizer
from scaling_perception.training.spikes import new_guard, spike_window
from scaling_perception.training.state import TrainState, new_state
from scaling_perception.training.step import gather_dtype, make_step

Advance = Callable[..., tuple[TrainState, Mapping[str, jax.Array]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run, all but its state.

    Attributes:
        config: a ConfigDict as ``configs/common.py`` makes it, checked.
        workdir: its folder. command: what to run to resume, for messages.
        objective, tx, schedule: what is trained, and how; ``schedule``: step -> learning rate.
        macs: forward multiply-accumulates of one sample; 0 where they are not counted.
        mesh: of all devices. whole, split: shardings of an array that every device holds, and of a batch.
        rows: places in the global batch of the samples that this process reads.
        readers: processes that read each sample; above 1 where ``mesh.tensor`` spans processes.
        key: the run's random key, from which those of all steps and streams are folded.
        constants: ``objective.constants`` on the devices.
        ema: how the running average is kept, where the step does not keep it itself.
        shapes, shardings: of the state, leaf by leaf.
        identity: "config", "data" and "meta" as JSON: what a checkpoint must have been saved with to be resumed.
    """

    config: Config
    workdir: Path
    command: str
    objective: Objective
    macs: float
    tx: optax.GradientTransformation
    schedule: Callable[[int], Any]
    mesh: Mesh
    whole: NamedSharding
    split: NamedSharding
    rows: list[int]
    readers: int
    key: jax.Array
    constants: Any
    ema: averaging.EmaConfig | None
    shapes: TrainState
    shardings: TrainState
    identity: dict[str, Any]

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.config.train.steps

    @property
    def files(self) -> Mapping[str, str]:
        """Path -> hash of the content of every file that the run reads, as far as the data has them."""
        return getattr(self.objective.batches, "files", {})

    @property
    def best(self) -> str:
        """The metric that ``train.keep_best`` compares."""
        return best_metric(self.config.train)

    @property
    def parameters(self) -> int:
        """How many numbers are trained, or frozen among them."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes.params))

    @property
    def abstract(self) -> TrainState:
        """Shape, dtype and sharding of each leaf of the state, as a checkpoint is restored to."""
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            self.shapes,
            self.shardings,
        )


def check_batch(train: Config, mesh: Mesh) -> None:
    """Refuse a batch that the devices cannot share.

    Raises:
        UserError: the batch size is no multiple of devices times ``train.accumulate``.
    """
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    parts = devices * train.accumulate
    if train.batch_size % parts:
        what = f"{devices} device(s) that share it times train.accumulate"
        raise UserError(f"train.batch_size is {train.batch_size}: give a multiple of {parts}, the {what}")


def make_run(config: Config, workdir: Path, command: str, objective: Objective, mesh: Mesh) -> Run:
    """The run of ``config`` in ``workdir``; makes no array but the key and the constants. All processes must call it.

    Raises:
        UserError: the processes were not started alike, or a field of ``optim`` is wrong.
    """
    tx, schedule = make_optimizer(config.optim, config.train.steps, objective.frozen)
    data = dict(objective.batches.fingerprint)
    identity = as_json({"config": config.to_dict(), "data": data, "meta": objective.meta})
    same_everywhere(identity)
    whole, split = replicated(mesh), batch_sharding(mesh)
    size, ema = config.train.batch_size, averaging.ema_config(config.optim)
    # shapes alone: a large model must not be made whole on one device only to learn them
    shapes = jax.eval_shape(lambda key: first(config, objective, tx, objective.init(key)), jax.random.key(0))
    return Run(
        config=config,
        workdir=workdir,
        command=command,
        objective=objective,
        macs=float(forward_macs(objective.model)) if objective.model is not None else 0.0,
        tx=tx,
        schedule=schedule,
        mesh=mesh,
        whole=whole,
        split=split,
        rows=processes.own_places(split, size).tolist(),
        readers=sum(len(places) for places in processes.places_of(split, size).values()) // size,
        key=jax.jit(lambda: jax.random.key(config.seed), out_shardings=whole)(),
        constants=processes.put_tree(objective.constants, jax.tree.map(lambda _: whole, objective.constants)),
        ema=ema,
        shapes=shapes,
        shardings=averaging.placed(tree_shardings(shapes, mesh, objective.rules), ema),
        identity=identity,
    )


def first(config: Config, objective: Objective, tx: optax.GradientTransformation, params: Any) -> TrainState:
    """The state before the first step, of these parameters; pure."""
    average = averaging.first_average(params, averaging.ema_config(config.optim), objective.frozen)
    return new_state(params, tx)._replace(ema=average, guard=new_guard(spike_window(config.train)))


def first_of(run: Run) -> Callable[[Any], TrainState]:
    """params -> the state before the first step of ``run``; pure."""
    return functools.partial(first, run.config, run.objective, run.tx)


def with_guard(run: Run, state: TrainState) -> TrainState:
    """``state`` with an empty memory of losses where the policy for spikes is new to a run that is resumed."""
    window = spike_window(run.config.train)
    if not window or state.guard:
        return state
    return state._replace(guard=jax.jit(lambda: new_guard(window), out_shardings=run.shardings.guard)())


def compile_step(run: Run, state: TrainState, batch: Mapping[str, jax.Array]) -> Advance:
    """advance(number, state, batch, key, constants) -> (state, metrics): the compiled step, and the running average.

    Args:
        state, batch: what the first step is given; only their shapes and shardings matter.
    """
    optim, train = run.config.optim, run.config.train
    step = make_step(
        run.objective,
        run.tx,
        None if run.ema else optim.ema,
        train.accumulate,
        train.on_nan == "skip",
        run.shardings,
        train.spike_factor if spike_window(train) else 0.0,
        train.on_spike == "skip",
        optim.ema_warmup,
        gather_dtype(train),
    )
    # an average that is kept apart from the step is no part of what the step is given
    shardings = run.shardings._replace(ema=()) if run.ema else run.shardings
    given = state._replace(ema=()) if run.ema else state
    # donated: the old state's memory holds the new one
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, run.whole))
    lowered = jitted.lower(given, batch, run.key, run.constants)
    compiled = lowered.compile(convolving(jax.default_backend()))
    return averaging.with_ema_update(compiled, run.ema, run.total, run.shardings.ema)
