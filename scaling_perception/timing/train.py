"""Speed of a training step: loss, gradient, AdamW, running average; `bench train`.

The step is the one that `train` compiles, for a depth specialist on latents. Beside it stands the same step in PyTorch
(`benchmarks/torch_peer.py`), eager with either attention and through torch.compile, all with as many threads. They take
turns in one process, and the loss and every gradient are held against each other first: what is not the same
computation is not compared. Weights and data are drawn: speed does not depend on them.
"""

import argparse
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import COUNT
from scaling_perception.timing import peer
from scaling_perception.timing.rounds import Function, in_rounds, keep_to, ratio, several
from scaling_perception.timing.sample import ratio_lines
from scaling_perception.timing.ways import difference, draw_specialist

LARGEST_LOSS, LARGEST_GRADIENT = 1e-5, 1e-3  # relative difference from torch in float32
_SPAN = 1.0  # seconds that a timed call should take: so many steps
_QUICK = {"repeats": 1}
_OPTIM = {"name": "adamw", "lr": 1e-4, "lr_final": 1e-6, "warmup": 0, "schedule": "constant", "b1": 0.9, "b2": 0.999}
_OPTIM |= {"eps": 1e-8, "weight_decay": 0.0, "grad_clip": 0.0, "ema": 0.9999}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="a1", help="a preset, as a depth specialist")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="ours; torch is float32")
    parser.add_argument("--remat", action="store_true", help="ours: store the tokens between blocks alone")
    parser.add_argument("--against", choices=("torch",), help="also the same step in PyTorch")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes at first")
    parser.add_argument("--cores", type=COUNT, help="processors for everybody")
    parser.add_argument("--quick", action="store_true", help="one step, one round: no measurement")


class Case(NamedTuple):
    """What is trained, on what."""

    config: Any  # DiTConfig
    params: dict[str, Any]
    batch: dict[str, np.ndarray]
    optim: Any
    settings: Any  # fields of a training config that the loss reads
    diffusion: Any


def make_case(args: argparse.Namespace) -> Case:
    """The model and one batch, drawn.

    Raises:
        UserError: an unknown model, a number below 1, or a resolution that makes no patches.
    """
    from ml_collections import ConfigDict

    from scaling_perception.diffusion.schedules import get_diffusion

    for name in ("batch", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give 1 or more")
    rng = np.random.default_rng(0)
    config, params = draw_specialist(args.model, args.resolution, rng)
    latents = (args.batch, config.input_size, config.input_size, 4)
    batch = {name: rng.standard_normal(latents, np.float32) for name in ("image", "target")}
    batch |= {"valid": rng.random(latents[:3]) < 0.9, "pass_id": np.zeros(args.batch, np.int32)}
    mixture = {"drawn": {"task": "depth", "weight": 1.0}}
    settings = {"timestep_sampling": "uniform", "noise": "gaussian", "balance_loss": 0.01, "data": {"mixture": mixture}}
    return Case(config, params, batch, ConfigDict(_OPTIM), ConfigDict(settings), get_diffusion("fixed"))


class Ours:
    """The step that `train` compiles; each call goes one step on, with its own batch or another, and returns the loss.

    Attributes:
        state: after the last step.
        compile_seconds, first_loss, first_gradient: of the first step, the gradient as leaf name -> array.
    """

    def __init__(self, case: Case, dtype: str, remat: bool) -> None:
        import jax
        import jax.numpy as jnp
        import optax

        from scaling_perception.models.dit import DiT, frozen_paths
        from scaling_perception.support.compiler_options import convolving
        from scaling_perception.training.diffusion import make_loss
        from scaling_perception.training.objective import Objective
        from scaling_perception.training.optim import make_optimizer
        from scaling_perception.training.state import named_leaves, new_state
        from scaling_perception.training.step import make_step

        model = DiT(case.config, dtype=jnp.dtype(dtype), remat=remat)
        norm = {"shift": [[0.0] * 4], "scale": [[1.0] * 4]}
        frozen = tuple(frozen_paths(case.config))
        nothing: Any = None
        objective = Objective(
            init=nothing,
            loss=make_loss(model, case.diffusion, case.settings, norm, None),
            batches=nothing,
            export=nothing,
            samples_per_step=len(case.batch["pass_id"]),
            model=case.config,
            frozen=frozen,
        )
        tx, _ = make_optimizer(case.optim, 1000, frozen)
        self._key, self._batch = jax.random.key(0), jax.tree.map(jnp.asarray, case.batch)
        self.state = new_state(jax.tree.map(jnp.asarray, case.params), tx)
        begin = time.perf_counter()
        step = jax.jit(make_step(objective, tx, case.optim.ema), donate_argnums=0)
        lowered = step.lower(self.state, self._batch, self._key, None)
        self._step = lowered.compile(convolving(jax.default_backend()))  # as `train` does
        self.compile_seconds = time.perf_counter() - begin
        self.first_loss = self()
        # the first moment starts at zero, so one step leaves the gradient there, times 1 - b1
        moment = named_leaves(optax.tree_utils.tree_get(self.state.opt_state, "mu"))
        self.first_gradient = {name: np.asarray(leaf) / (1 - case.optim.b1) for name, leaf in moment.items()}

    def __call__(self, batch: Any = None) -> float:
        import jax

        self.state, metrics = self._step(self.state, self._batch if batch is None else batch, self._key, None)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])


def first_draws(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps and noise of our first step, for the others to take."""
    import jax
    import jax.numpy as jnp

    from scaling_perception.training.noising import sample_noise

    key, shape = jax.random.fold_in(jax.random.key(0), 0), case.batch["target"].shape
    t, eps = jax.jit(lambda key: sample_noise(key, jnp.arange(shape[0]), shape, case.settings))(key)
    return np.asarray(t), np.asarray(eps)


def make_torch(case: Case, kind: str) -> Any:
    """A `torch_peer.Trainer` of the case's weights; ``kind``: explicit, sdpa, or compiled (sdpa).

    Raises:
        UserError: no torch here, a model it is not written for, or an accelerator on our side.
    """
    torch_peer = peer.prepare()
    import torch  # pyright: ignore[reportMissingImports]

    network = torch_peer.make_dit(case.config, case.params, "sdpa" if kind == "compiled" else kind)
    forward: Any = torch.compile(network) if kind == "compiled" else network
    return torch_peer.Trainer(network, forward, case.diffusion, case.optim, case.batch, case.config.null_label)


def agreement(case: Case, ours: Ours, trainer: Any, exact: bool) -> dict[str, float]:
    """Relative difference of the first step's loss from torch's, and the largest of any gradient, each over its
    largest value.

    Raises:
        RuntimeError: in float32, more than rounding explains: it is not the same computation.
    """
    from scaling_perception.interop.safetensors_io import unflatten_tree
    from scaling_perception.interop.torch_dit import dit_to_torch

    loss = trainer(first_draws(case))
    held = {"pos_embed": np.zeros_like(case.params["pos_embed"])}
    gradient = dit_to_torch(unflatten_tree({**held, **ours.first_gradient}), case.config, attention="timm")
    theirs = trainer.gradients()
    found = {
        "loss": abs(ours.first_loss / loss - 1),
        "gradient": max(difference(gradient[name], value) for name, value in theirs.items()),
    }
    if exact and not (found["loss"] <= LARGEST_LOSS and found["gradient"] <= LARGEST_GRADIENT):
        raise RuntimeError(f"our step and torch's differ by {found}: they do not compute the same")
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see the module and docs/speed.md.

    Returns:
        ``ways``: for each its seconds a step (median), the fastest, all rounds; with ``--against`` ratios and
        differences.

    Raises:
        UserError: options that are unknown or do not go together, or no torch.
        RuntimeError: losses or gradients that should be equal are not.
    """
    import jax

    from scaling_perception.models.compute import TRAINING_FACTOR, forward_macs
    from scaling_perception.support.chips import peak_flops

    if args.quick:
        vars(args).update(_QUICK)
    if args.cores is not None:
        keep_to(args.cores)
    case = make_case(args)
    kinds = ("explicit", "sdpa", "compiled")[: 2 if args.no_compile or args.quick else 3] if args.against else ()
    trainers = {f"torch {kind}": make_torch(case, kind) for kind in kinds}
    ours = Ours(case, args.dtype, args.remat)
    differences, failed = {}, {}
    for name, trainer in list(trainers.items()):
        try:
            differences[name] = agreement(case, ours, trainer, args.dtype == "float32")
        except Exception as error:
            if name != "torch compiled" or "do not compute the same" in str(error):
                raise
            failed[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]  # no compiler, as a rule
            del trainers[name]
    ways: dict[str, Function] = {"ours": ours, **trainers}
    steps: dict[str, int] = {}
    for name, way in ways.items():
        ways[name], steps[name] = several(way, 0.0 if args.quick else _SPAN)
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    found = in_rounds(ways, args.repeats)
    work = 2 * TRAINING_FACTOR * forward_macs(case.config) * args.batch
    peak = peak_flops(jax.devices()[0].device_kind)
    for name, row in found.items():
        count = steps[name]
        row.update({field: row[field] / count for field in ("seconds", "fastest", "processor_seconds")})
        row["rounds"] = [seconds / count for seconds in row["rounds"]]
        row["steps_a_round"], row["gflops_per_second"] = count, 1e-9 * work / row["seconds"]
        if peak:
            row["mfu"] = work / row["seconds"] / peak
        row.pop("first_call_seconds")
    names = ("model", "resolution", "batch", "dtype", "remat", "cores", "repeats")
    result: dict[str, Any] = {"what": "train", **{name: getattr(args, name) for name in names}}
    result |= {"flops": work, "compile_seconds": ours.compile_seconds, "load_before": list(load), "ways": found}
    if trainers:
        ratios = {name: ratio(found, name, "ours") for name in trainers}
        opponent = min(trainers, key=lambda name: found[name]["seconds"])
        result["against"] = {"opponent": opponent, "ratios": ratios, "differences": differences, "failed": failed}
    return result


def table(result: Mapping[str, Any]) -> str:
    """The result as lines of text."""
    return "\n".join(_lines(result))


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'way':<16} {'s/step':>8} {'fastest':>8} {'slowest':>8} {'processor s':>12} {'GFLOP/s':>8} {'images/s':>9}"
    for name, row in result["ways"].items():
        times = f"{row['seconds']:8.4f} {row['fastest']:8.4f} {max(row['rounds']):8.4f}"
        times = f"{times} {row['processor_seconds']:12.4f}"
        share = f"  MFU {row['mfu']:.1%}" if "mfu" in row else ""
        yield f"{name:<16} {times} {row['gflops_per_second']:8.0f} {result['batch'] / row['seconds']:9.2f}{share}"
    yield f"ours: compiling {result['compile_seconds']:.1f} s"
    if against := result.get("against"):
        yield from ratio_lines(against)
        for name, reason in against["failed"].items():
            yield f"{name}: {reason}"
