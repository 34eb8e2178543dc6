"""Train or fine-tune from a config; run the same command again to resume.

What to train, on what and how is in the config file; any of its fields can be changed with --config.FIELD=VALUE. The
work folder gets config.json, metrics.jsonl, tb/ (TensorBoard), checkpoints/ and, at the end, model/ (the averaged
weights, ready for predict and evaluate).
"""

import argparse
import contextlib
import math
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling_perception.support.errors import UserError

EXAMPLES = """
scaling-perception train --config configs/mini.py:cache=,steps=100 --workdir runs/first
scaling-perception train --config configs/depth.py:model=a1,res=256,root=DATA/hypersim --workdir runs/a1
scaling-perception train --config configs/mini.py:cache=runs/latents --workdir runs/mini --config.optim.lr=3e-4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--help-config", nargs="?", choices=("text", "markdown"), action=_HelpConfig, help=_HELP_CONFIG)
    parser.add_argument("--config", required=True, help="config file, optionally with arguments: FILE.py:key=value,…")
    parser.add_argument("--workdir", default="", help="folder of this run; an interrupted run in it is resumed")
    parser.add_argument("--dry-run", action="store_true", help="only tell sizes, memory, compute and chip-hours")
    parser.add_argument("--profile", default="", metavar="FIRST:COUNT", help="trace these steps to WORKDIR/profile")


_HELP_CONFIG = "print every field of a config: default, what it may be, what it is; then exit"


class _HelpConfig(argparse.Action):
    """Prints the table of fields and exits, as ``--help`` does, whatever else the line holds."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        from scaling_perception.support import field_checks

        print(field_checks.as_markdown() if values == "markdown" else field_checks.as_text())
        parser.exit()


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate ``--config.some.key=value`` from the other words; the overrides come back as ``some.key=value``."""
    head = "--config."
    overrides = [word.removeprefix(head) for word in words if word.startswith(head)]
    return [word for word in words if not word.startswith(head)], overrides


def run(args: argparse.Namespace) -> int | None:
    from scaling_perception.parallel.processes import is_first, join, leaving_at_once
    from scaling_perception.scaling.memory_advice import explaining_memory
    from scaling_perception.support.configs import load_config

    join()
    overrides = list(getattr(args, "overrides", []))
    config = load_config(args.config, overrides)
    if args.dry_run:
        from scaling_perception.scaling.dry_run import describe_run, print_run

        described = describe_run(config)
        if is_first():
            print_run(described)
        return None
    if not args.workdir:
        raise UserError("--workdir is missing: give the folder of this run (or --dry-run)")
    words = ["scaling-perception", "train", "--config", args.config, "--workdir", args.workdir]
    words += [f"--config.{override}" for override in overrides]
    with leaving_at_once(), explaining_memory(config):
        train(config, Path(args.workdir), shlex.join(words), args.profile)
    return None


class Stopped(SystemExit):
    """The run was asked to stop and has saved; its code (130 or 143) is the exit code of the command."""


def train(config: Any, workdir: Path, command: str = "the same command", profile: str = "") -> Path:
    """Train ``config`` in ``workdir``; returns the folder of the exported model.

    Args:
        config: a ConfigDict as ``configs/common.py`` makes it.
        command: what to run to resume, for messages.
        profile: steps to trace, ``FIRST:COUNT``; "" = none.

    Raises:
        UserError: a field is wrong, the folder belongs to another run, the disk is full, the loss is not finite or a
            spike, or the copies of the state differ.
        Stopped: SIGINT or SIGTERM arrived; everything up to the finished step is saved.
    """
    import jax
    import numpy as np
    from jax.experimental.multihost_utils import reached_preemption_sync_point

    from scaling_perception.data.selection import samples_taken
    from scaling_perception.parallel.mesh import BATCH_AXES, batch_sharding, make_mesh, replicated
    from scaling_perception.parallel.processes import is_first, own_places, places_of, put_batch, put_tree
    from scaling_perception.parallel.rules import tree_shardings
    from scaling_perception.support.field_checks import best_metric, check_config, notes
    from scaling_perception.support.files import write_json
    from scaling_perception.training import averaging, trouble
    from scaling_perception.training.checkpoints import Checkpoints, load_ema, newest_meta
    from scaling_perception.training.goodput import Clock, waiting_advice
    from scaling_perception.training.identity import (
        as_json,
        keep_table,
        only_run_in,
        refuse_foreign,
        refuse_other_model,
        same_everywhere,
        same_run,
    )
    from scaling_perception.training.optim import make_optimizer
    from scaling_perception.training.profile import parse_steps, trace_steps
    from scaling_perception.training.record import open_record, why_ended
    from scaling_perception.training.replicas import differing, replica_sums
    from scaling_perception.training.saving import from_first
    from scaling_perception.training.silent import Silent
    from scaling_perception.training.spikes import new_guard, spike_window
    from scaling_perception.training.state import new_state
    from scaling_perception.training.step import make_step
    from scaling_perception.training.streams import stream_key
    from scaling_perception.training.validation import check_metric, make_validation
    from scaling_perception.training.writer import Pace, Window, Writer, duration

    check_config(config)
    clock, traced = Clock(), parse_steps(profile) if profile else (1, 0)
    # ---- Objective and optimiser ------------------------------------------------------------------------------------
    total, every = config.train.steps, config.train.checkpoint_every
    apart, window_size, best = averaging.kept_apart(config.optim), spike_window(config.train), best_metric(config.train)
    mesh, size = make_mesh(**config.mesh.to_dict()), config.train.batch_size
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES) * config.train.accumulate
    if size % parts:
        what = f"{parts // config.train.accumulate} device(s) that share it times train.accumulate"
        raise UserError(f"train.batch_size is {size}: give a multiple of {parts}, the {what}")
    objective = _objective(config, mesh, newest_meta(workdir / "checkpoints"))
    tx, schedule = make_optimizer(config.optim, total, objective.frozen)
    identity = as_json(
        {"config": config.to_dict(), "data": dict(objective.batches.fingerprint), "meta": objective.meta}
    )

    same_everywhere(identity)
    files = getattr(objective.batches, "files", {})

    # ---- Devices: the batch is split over them, the state by parallel/rules.py -------------------------------------
    whole, split = replicated(mesh), batch_sharding(mesh)
    rows = own_places(split, size).tolist()
    readers = sum(len(places) for places in places_of(split, size).values()) // size  # processes that read each row
    key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=whole)()
    constants = put_tree(objective.constants, jax.tree.map(lambda _: whole, objective.constants))

    # ---- Init or restore --------------------------------------------------------------------------------------------
    def begin(params: Any) -> Any:
        average = averaging.first_average(params, apart, objective.frozen)
        return new_state(params, tx)._replace(ema=average, guard=new_guard(window_size))

    shapes = jax.eval_shape(lambda key: begin(objective.init(key)), jax.random.key(0))
    places = averaging.placed(tree_shardings(shapes, mesh, objective.rules), apart)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
    )
    refuse_foreign(workdir)  # 4. refuse: the folder holds something that this run would overwrite
    keeping = (config.train.keep, config.train.keep_every, config.train.keep_best, best)
    checkpoints = Checkpoints(workdir / "checkpoints", *keeping)
    with contextlib.ExitStack() as closing:
        closing.enter_context(only_run_in(workdir))
        closing.callback(checkpoints.close)
        if config.train.matmul_precision != "default":  # of everything that is traced from here on
            closing.enter_context(jax.default_matmul_precision(config.train.matmul_precision))
        with clock.spend("restore"):
            state = checkpoints.restore(abstract, lambda saved: same_run(saved, identity, workdir, files), _say)
        if state is not None:  # 1. our own earlier run
            if window_size and not state.guard:  # the policy for spikes is new
                state = state._replace(guard=jax.jit(lambda: new_guard(window_size), out_shardings=places.guard)())
            story = f"resuming from step {int(state.step)}"
        elif objective.starting_params is not None:  # 2. another model's weights
            params = put_tree(objective.starting_params, places.params)
            state = jax.jit(begin, out_shardings=places)(params)
            story = f"starting from the weights of {config.init}"
        else:  # 3. from scratch
            state = jax.jit(lambda key: begin(objective.init(stream_key(key, "init"))), out_shardings=places)(key)
            story = "starting from scratch"
        start = step = int(state.step)
        model = workdir / "model"
        finished = step == total and model.exists()
        ignored = refuse_other_model(workdir, identity["config"]) if finished else []
        if is_first():
            write_json(workdir / "config.json", identity["config"])
            keep_table(workdir, files)
        macs = _macs(objective)
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
        facts = {"command": command, "config": identity["config"], "data": identity["data"], "parameters": count}
        samples = samples_taken(objective.batches)
        facts |= {"macs_per_sample": macs, "samples_per_step": objective.samples_per_step, "samples": samples}
        record = open_record(workdir, facts, is_first())
        _say(f"{config.model if objective.model else config.objective}: {count / 1e6:.2f} M parameters, {story}")
        spread = " × ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "whole"
        on = f"{mesh.size} {mesh.devices.flat[0].platform} device(s) ({spread})"
        for line in (*samples, *notes(config)):
            _say(line)
        if warning := averaging.start_warning(config.optim, total):
            _say(warning)
        _say(f"{total} steps of {config.train.batch_size} on {on}, {jax.process_count()} process(es)")
        if readers > 1:
            _say(f"each sample is read by {readers} processes: mesh.tensor spans that many")

        if not finished:
            record.attempt_started(step, clock.elapsed())

            def ended(_: Any, error: BaseException | None, __: Any) -> None:
                record.attempt_ended(step, why_ended(error), clock.totals(), str(error or ""))

            closing.push(ended)

        # ---- Loop ---------------------------------------------------------------------------------------------------
        if step < total:
            told = {"wandb": config.train.wandb, "config": identity["config"]}
            writer = Writer(workdir, start, total, **told) if is_first() else Silent()
            closing.callback(writer.close)
            several = jax.process_count() > 1
            asked = closing.enter_context(_asked_to_stop(several))
            step_of = make_step(
                objective,
                tx,
                None if apart else config.optim.ema,
                config.train.accumulate,
                config.train.on_nan == "skip",
                places,
                config.train.spike_factor if window_size else 0.0,
                config.train.on_spike == "skip",
                config.optim.ema_warmup,
            )
            inside = places._replace(ema=()) if apart else places  # what the step is given
            jitted = jax.jit(step_of, donate_argnums=0, out_shardings=(inside, whole))
            validate = make_validation(objective, config, mesh) if config.train.validate_every else None
            pace, advance = Pace(), None
            window, since_saved, waited, told_at, late = Window(), Window(), 0.0, start, None
            advised = False
            hook = closing.enter_context(trace_steps(workdir, *traced, _say))
            kind, tokens = mesh.devices.flat[0].device_kind, getattr(objective.model, "tokens", 0)

            def take(
                number: int,
                metrics: Mapping[str, Any],
                keys: Mapping[int, str],
                read: Any,
                copies: Any,
                held: Mapping[str, float],
            ) -> None:
                """Look at what step ``number`` told; stops the run where its state must not be saved."""
                nonlocal waited, told_at, advised
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                refuse_differing(number, read, trouble.inputs_differ)
                finite = trouble.is_finite(values)
                if not finite or values.get("spike"):
                    if (config.train.on_spike if finite else config.train.on_nan) == "raise":
                        checkpoints.wait()
                        raise trouble.went_wrong(number, values, keys, workdir, checkpoints.steps())
                    trouble.note_skipped(number, values, keys, workdir)
                refuse_differing(number, copies, trouble.replicas_differ)
                if number == start + 1:
                    check_metric(best, [*values], config.train)
                if values.get("skipped"):  # its loss is in skipped.jsonl, and no part of a mean
                    values = {name: values[name] for name in ("skipped", "spike") if name in values}
                window.add(values)
                since_saved.add(values)
                writer.tick()
                pace.tick()
                if number % config.train.log_every == 0 or number == total or held:
                    steps, told_at = number - told_at, number
                    samples = number * objective.samples_per_step
                    row = {**window.means(), **held, "lr": float(np.asarray(schedule(number - 1))), "samples": samples}
                    row |= pace.row(objective.samples_per_step, macs, mesh.size, kind, tokens)
                    row |= {"data_wait": waited / steps / row["seconds_per_step"], "macs": samples * macs}
                    writer.report(number, {**row, **clock.row()})
                    waited = 0.0
                    if number > start + 1 and not advised and (advice := waiting_advice(row["data_wait"], config)):
                        advised = True
                        writer.say(advice)

            def refuse_differing(number: int, copies: Any, error: Callable[..., UserError]) -> None:
                what = differing(copies) if copies is not None else ""
                if what:
                    checkpoints.wait()
                    raise error(number, what, checkpoints.steps())

            def save(held: Mapping[str, float]) -> None:
                """Save the state, all of whose steps have been looked at; the copies of it are looked at here."""
                assert state is not None
                copies = replica_sums(state) if config.train.check_replicas else None
                refuse_differing(step, copies, trouble.replicas_differ)
                checkpoints.save(state, identity, metrics={**since_saved.means(), **held})

            batches = objective.batches.iterate(step)
            closing.callback(getattr(batches, "close", lambda: None))  # lets the readers' threads or processes end
            closing.enter_context(clock.spend("step"))
            while step < total and not asked:
                before = time.monotonic()
                with clock.spend("data_wait"):
                    batch = dict(next(batches))
                waited += time.monotonic() - before
                keys = dict(zip(rows, batch.pop("key", ()), strict=False))
                arrays = put_batch(batch, split, size)
                read = replica_sums(arrays) if readers > 1 and config.train.check_replicas else None
                if advance is None:
                    with clock.spend("compile"):
                        given = state._replace(ema=()) if apart else state
                        compiled = jitted.lower(given, arrays, key, constants).compile()
                        advance = averaging.around(compiled, apart, total, places.ema)
                    writer.say(f"compiled the step in {duration(time.monotonic() - before)}")
                    writer.begin()
                    pace.resume()
                    waited = 0.0
                # nothing may travel that is not asked for
                with hook(step + 1, state), jax.transfer_guard("disallow"):
                    state, metrics = advance(step + 1, state, arrays, key, constants)
                step += 1
                checkpoints.poll()  # a save that failed behind our back is told here
                if late is not None:  # one step late: the device is already busy with the next
                    take(*late)
                copies, held = None, {}
                if config.train.check_replicas and step % config.train.check_replicas == 0:
                    copies = replica_sums(state)
                if validate and (step % config.train.validate_every == 0 or step == total):
                    jax.block_until_ready(metrics)
                    before = time.monotonic()
                    with clock.spend("evaluate"):
                        held = validate(state.ema, key, constants)
                    pace.leave_out(time.monotonic() - before)
                late = (step, metrics, keys, read, copies, held)
                if several and reached_preemption_sync_point(step):  # all processes stop at the same step
                    asked.append(signal.SIGTERM)
                if step % every == 0 or step == total or asked:  # before the next batch, and never unchecked weights
                    take(*late)
                    late = None
                    with clock.spend("checkpoint"):
                        save(held)
                    record.seen(step, clock.totals())
                    pace.resume()  # the pace of training is told without saving
            if late is not None:  # the signal came after the last look
                take(*late)
            writer.close()
            if asked and step < total:
                with clock.spend("checkpoint"):
                    save({})
                    checkpoints.wait()
                _say(f"stopped at step {step} of {total}; to resume run: {command}")
                raise Stopped(128 + asked[0])

        checkpoints.wait()

        # ---- Export -------------------------------------------------------------------------------------------------
        if finished:
            changed = f" (of no effect on it: {'; '.join(ignored)})" if ignored else ""
            _say(f"already finished: {model}{changed}")
            return model
        ema, at = state.ema, total
        if config.train.export_from == "best":
            at = from_first(next((one for _, one in checkpoints.best()), total))
            ema = ema if at == total else load_ema(checkpoints.folder, abstract.ema, _say, at)[0]
        kept = [one for one in checkpoints.steps() if config.train.keep_every and one % config.train.keep_every == 0]
        for one in kept if config.train.export_kept else ():
            then = load_ema(checkpoints.folder, abstract.ema, _say, one)[0]
            _export(objective, then, one, workdir / "models" / str(one), identity, macs, mesh, shapes.params)
        _export(objective, ema, at, model, identity, macs, mesh, shapes.params)
        _say(f"exported the averaged weights {'' if at == total else f'of step {at} '}to {model}")
        return model


def _export(objective: Any, ema: Any, step: int, model: Path, identity: Any, macs: float, mesh: Any, like: Any) -> None:
    """Write the averaged weights of ``step`` as the model folder ``model``: whole, or not at all."""
    import jax
    import numpy as np

    from scaling_perception.parallel.processes import is_first, to_host
    from scaling_perception.training.identity import without_places

    samples = step * objective.samples_per_step
    info = {"steps": step, "samples": samples, "macs": samples * macs, "data": identity["data"]}
    info |= {"config": without_places(identity["config"])}
    average = jax.tree.map(lambda leaf, one: np.asarray(leaf, one.dtype), to_host(ema, mesh), like)
    if is_first():
        half = model.with_name(f".{model.name}")  # a kill meanwhile leaves nothing that looks like a finished model
        half.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(half, ignore_errors=True)
        objective.export(average, str(half), info)
        shutil.rmtree(model, ignore_errors=True)
        os.rename(half, model)


def _objective(config: Any, mesh: Any, resumed: Mapping[str, Any] | None) -> Any:
    if config.objective == "diffusion":
        from scaling_perception.training.diffusion import diffusion_objective

        return diffusion_objective(config, mesh=mesh, resumed=resumed)
    from scaling_perception.training.autoencoder import autoencoder_objective

    return autoencoder_objective(config, mesh)


def _macs(objective: Any) -> float:
    """Forward multiply-accumulates of one sample (0 where they are not counted)."""
    if objective.model is None:
        return 0.0
    from scaling_perception.models.compute import forward_macs

    return float(forward_macs(objective.model))


@contextlib.contextmanager
def _asked_to_stop(several: bool) -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM append themselves to, so that the step under way can finish.

    A second SIGINT interrupts at once. Outside the main thread, where Python allows no handlers, the list stays empty.
    In a run of several processes JAX's own handler of SIGTERM tells all of them, and SIGINT is passed on to it.
    """
    asked: list[int] = []

    def note(number: int, _: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        asked.append(number)
        _say(
            "stopping after this step; saving (Ctrl-C again: stop at once, losing the steps since the last checkpoint)"
        )

    before: dict[int, Callable[..., Any] | int | None] = {}
    with contextlib.suppress(ValueError):
        for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    import sys

    from scaling_perception.parallel.processes import is_first

    if is_first():
        print(line, file=sys.stderr, flush=True)
