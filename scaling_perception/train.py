"""Train or fine-tune from a config; run the same command again to resume.

What to train, on what and how is in the config file; any of its fields can be changed with --config.FIELD=VALUE. The
work folder gets config.json, metrics.jsonl, tb/ (TensorBoard), checkpoints/ and, at the end, model/ (the averaged
weights, ready for predict and evaluate).
"""

import argparse
import contextlib
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_perception.support.errors import UserError

if TYPE_CHECKING:  # --help must not wait for JAX
    from scaling_perception.training.checkpoints import Checkpoints
    from scaling_perception.training.goodput import Clock
    from scaling_perception.training.record import Attempt
    from scaling_perception.training.setup import Run
    from scaling_perception.training.state import TrainState

EXAMPLES = """
scaling-perception train --config configs/mini.py:cache=,steps=100 --workdir runs/first
scaling-perception train --config configs/depth.py:model=a1,res=256,root=DATA/hypersim --workdir runs/a1
scaling-perception train --config configs/mini.py:cache=runs/latents --workdir runs/mini --config.optim.lr=3e-4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--help-config", nargs="?", choices=("text", "markdown"), action=_HelpConfig, help=_HELP_CONFIG)
    parser.add_argument("--config", required=True, help="config file, optionally with arguments: FILE.py:key=value,…")
    parser.add_argument("--workdir", default="", help="folder of this run; an interrupted run in it is resumed")
    parser.add_argument("--dry-run", action="store_true", help="only print sizes, memory, compute and chip-hours")
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
    from scaling_perception.parallel import mesh as meshes
    from scaling_perception.support.field_checks import check_config
    from scaling_perception.training.checkpoints import newest_meta
    from scaling_perception.training.goodput import Clock
    from scaling_perception.training.identity import refuse_foreign
    from scaling_perception.training.profile import parse_steps
    from scaling_perception.training.setup import check_batch, make_run

    check_config(config)
    clock, traced = Clock(), parse_steps(profile) if profile else (1, 0)
    mesh = meshes.make_mesh(**config.mesh.to_dict())
    check_batch(config.train, mesh)
    objective = _objective(config, mesh, newest_meta(workdir / "checkpoints"))
    run = make_run(config, workdir, command, objective, mesh)
    refuse_foreign(workdir)  # before anything is written, for it would overwrite what is there
    return _start(run, clock, traced)


def _start(run: "Run", clock: "Clock", traced: tuple[int, int]) -> Path:
    """Start or resume ``run``, train it to its end and export it."""
    import jax

    from scaling_perception.parallel.processes import is_first
    from scaling_perception.support.files import write_json
    from scaling_perception.training.checkpoints import Checkpoints
    from scaling_perception.training.export import damage_of, export_models
    from scaling_perception.training.identity import keep_table, only_run_in, refuse_other_model
    from scaling_perception.training.record import Attempt, open_record
    from scaling_perception.training.reporting import announce, run_facts, say

    train, workdir, model = run.config.train, run.workdir, run.workdir / "model"
    checkpoints = Checkpoints(workdir / "checkpoints", train.keep, train.keep_every, train.keep_best, run.best)
    with contextlib.ExitStack() as closing:
        closing.enter_context(only_run_in(workdir))
        closing.callback(checkpoints.close)
        if train.matmul_precision != "default":  # of everything that is traced from here on
            closing.enter_context(jax.default_matmul_precision(train.matmul_precision))
        state, story = _first_state(run, checkpoints, clock)
        step = int(state.step)
        exported = step == run.total and model.exists()
        damage = damage_of(model) if exported else ""
        finished = exported and not damage
        # what would change the exported model is refused before the folder's description is overwritten
        ignored = refuse_other_model(workdir, run.identity["config"]) if finished else []
        if is_first():
            write_json(workdir / "config.json", run.identity["config"])
            keep_table(workdir, run.files)
        record = open_record(workdir, run_facts(run), is_first())
        announce(run, story)
        if finished:
            changed = f" (of no effect on it: {'; '.join(ignored)})" if ignored else ""
            say(f"already finished: {model}{changed}")
            return model
        if damage:
            say(f"{damage}; the model is exported anew")
        attempt = closing.enter_context(Attempt(record, step, clock))
        if step < run.total:
            state = _loop(run, state, checkpoints, attempt, clock, traced, closing)
        checkpoints.wait()  # a model is exported only from a run whose last checkpoint is whole
        export_models(run, state.ema, checkpoints, model)
        return model


def _first_state(run: "Run", checkpoints: "Checkpoints", clock: "Clock") -> tuple["TrainState", str]:
    """The state before the first step, and where it comes from: the cases in the order in which they are tried.

    Raises:
        UserError: the folder holds another run, or no checkpoint of it can be read.
    """
    import jax

    from scaling_perception.parallel.processes import put_tree
    from scaling_perception.training.identity import same_run
    from scaling_perception.training.reporting import say
    from scaling_perception.training.setup import first_of, with_guard
    from scaling_perception.training.streams import stream_key

    objective, begin = run.objective, first_of(run)
    # 1. This run's own newest checkpoint that is whole; one of another run, data or model is refused.
    with clock.spend("restore"):
        state = checkpoints.restore(
            run.abstract, lambda saved: same_run(saved, run.identity, run.workdir, run.files), say
        )
    if state is not None:
        return with_guard(run, state), f"resuming from step {int(state.step)}"
    # 2. Another model's weights, fitted to this network: config.init.
    if objective.starting_params is not None:
        params = put_tree(objective.starting_params, run.shardings.params)
        return jax.jit(begin, out_shardings=run.shardings)(params), f"starting from the weights of {run.config.init}"
    # 3. From scratch, compiled, so that no device ever holds the whole of what is split over several.
    draw = jax.jit(lambda key: begin(objective.init(stream_key(key, "init"))), out_shardings=run.shardings)
    return draw(run.key), "starting from scratch"


def _loop(
    run: "Run",
    state: "TrainState",
    checkpoints: "Checkpoints",
    attempt: "Attempt",
    clock: "Clock",
    traced: tuple[int, int],
    closing: contextlib.ExitStack,
) -> "TrainState":
    """Train from ``state`` to the last step; returns the state after it.

    Args:
        traced: first step of a trace and how many. closing: closes what is opened here when the run ends.

    Raises:
        UserError, Stopped: see `train`.
    """
    import jax

    from scaling_perception.training.feed import Feed
    from scaling_perception.training.guards import Guard, Pending
    from scaling_perception.training.hooks import Save, Validate, asked_to_stop
    from scaling_perception.training.profile import trace_steps
    from scaling_perception.training.reporting import Reporter, say
    from scaling_perception.training.setup import compile_step

    step, total = attempt.step, run.total
    feed = Feed(run, step, clock)
    closing.callback(feed.close)
    reporter = Reporter(run, step, feed, clock)
    closing.callback(reporter.writer.close)
    stop = closing.enter_context(asked_to_stop())
    guard, validate = Guard(run, step, checkpoints), Validate(run, reporter, clock)
    save = Save(run, checkpoints, guard, reporter, attempt, clock)
    trace = closing.enter_context(trace_steps(run.workdir, *traced, say))
    closing.enter_context(clock.spend("step"))  # but for what the hooks spend otherwise
    pending: Pending | None = None
    advance = None

    def log_step() -> None:
        """Check and log the pending step."""
        nonlocal pending
        if pending is not None:
            reporter.log(pending, guard.check(pending))
        pending = None

    while step < total and not stop.asked():
        batch = feed.next()
        input_sums = guard.input_sums(batch.arrays)
        if advance is None:  # at the first batch, whose shapes are part of the program
            before = time.monotonic()
            with clock.spend("compile"):
                advance = compile_step(run, state, batch.arrays)
            reporter.compiled(time.monotonic() - before)
        # Copies that nobody asked for, between host and device, would make every step wait: they raise.
        with trace(step + 1, state), jax.transfer_guard("disallow"):
            state, metrics = advance(step + 1, state, batch.arrays, run.key, run.constants)
        step = attempt.step = step + 1
        checkpoints.poll()  # a save that failed in the background is raised here, not at the next save
        log_step()  # the step before this one: the host must not wait for the device, which is busy with this one
        state_sums = guard.state_sums(step, state)  # before the next step takes the state's memory
        eval_metrics = validate(step, state, metrics)
        pending = Pending(step, metrics, batch.keys, input_sums, state_sums, eval_metrics)
        stop.agree(step)  # or one process would wait for ever for those that stopped at another step
        if save.due(step) or stop.asked():
            log_step()  # what is saved must have been checked: a run never resumes from weights that are not finite
            save(step, state, eval_metrics)  # before the next batch, so that it is the one that a resumed run reads
    log_step()  # a signal may have come after the last save
    reporter.writer.close()
    if stop.asked() and step < total:
        save(step, state, {}, wait=True)  # whoever asked the run to stop may end the machine next
        say(f"stopped at step {step} of {total}; to resume run: {run.command}")
        raise Stopped(128 + stop.signals[0])
    return state


def _objective(config: Any, mesh: Any, resumed: Mapping[str, Any] | None) -> Any:
    if config.objective != "autoencoder":
        from scaling_perception.training.diffusion import diffusion_objective

        return diffusion_objective(config, mesh=mesh, resumed=resumed)
    from scaling_perception.training.autoencoder import autoencoder_objective

    return autoencoder_objective(config, mesh)
