"""Checkpoints: Orbax folders that are whole or absent, checked leaf by leaf when read back.

Each step holds two items: ``state`` (the TrainState) and ``meta`` (JSON: the run's identity and, for every leaf, dtype,
shape and a hash). The hashes are ours because Orbax restores a file with one flipped byte without a word.

Saving is synchronous on purpose: the state's buffers are given away to the next step, and a full disk has to be
known at the step where it happened.
"""

import contextlib
import gc
import hashlib
import json
import logging
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from scaling_perception.support.errors import UserError
from scaling_perception.training.state import TrainState, named_leaves

_SPARE = 1.05  # room for the metadata around the arrays
_FULL = ("no space left", "resource_exhausted", "disk quota", "errno 28", "os_error_code='28'")


class Checkpoints:
    """The checkpoints of one run, in ``folder`` (made if absent); the newest ``keep`` stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        if keep < 1:
            raise UserError(f"train.keep is {keep}: keep at least one checkpoint")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}; choose another --workdir") from error
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_names=("state", "meta"))

    def steps(self) -> list[int]:
        """Finished checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, identity: Mapping[str, Any]) -> bool:
        """Save ``state`` under its own step; False if that step is saved already.

        Raises:
            UserError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
        """
        step = int(state.step)
        if step in self.steps():
            return False
        need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < need * _SPARE:
            raise self._no_room(step, f"it needs {need / 1e6:.0f} MB and {free / 1e6:.0f} MB are free")
        meta = {"identity": dict(identity), "leaves": describe_leaves(state)}
        meta["digest"] = _digest(meta)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        try:
            with _quiet():
                self._manager.save(step, args=args, force=True)
                self._manager.wait_until_finished()
        except Exception as error:
            for half in self.folder.glob(f"{step}*tmp*"):  # what was half written keeps the disk full
                shutil.rmtree(half, ignore_errors=True)
            if isinstance(error, OSError) or any(sign in str(error).lower() for sign in _FULL):
                raise self._no_room(step, str(error).splitlines()[0][-160:]) from error
            raise
        return True

    def _no_room(self, step: int, why: str) -> UserError:
        good = self.steps()
        kept = f"checkpoint {good[-1]} is kept" if good else "no earlier checkpoint exists"
        return UserError(
            f"cannot save step {step} in {self.folder} ({why}): free space and run the same command again ({kept})"
        )

    def restore(
        self, abstract: TrainState, check: Callable[[Mapping[str, Any]], None], warn: Callable[[str], None]
    ) -> TrainState | None:
        """The newest checkpoint that is whole, or None if there is none at all.

        Args:
            abstract: shapes, dtypes and shardings to restore to.
            check: called with the saved identity before any array is read; raises UserError to refuse.
            warn: called with one line for each damaged checkpoint; that one is moved to ``damaged/`` beside the folder.

        Raises:
            UserError: the checkpoint is of other shapes, or all checkpoints are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                meta = self._read_meta(step)
            except Exception as error:
                self._set_aside(step, error, warn)
                continue
            check(meta["identity"])
            _same_shapes(abstract, meta["leaves"], self.folder / str(step))
            try:
                with _quiet():
                    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
                    state = self._manager.restore(step, args=args)["state"]
                _same_hashes(state, meta["leaves"])
            except Exception as error:
                self._set_aside(step, error, warn)
                continue
            return state
        if steps:
            raise UserError(f"every checkpoint in {self.folder} is damaged: remove the folder to start from scratch")
        return None

    def _read_meta(self, step: int) -> dict[str, Any]:
        with _quiet():
            meta = dict(self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"])
        digest = meta.pop("digest", None)
        if digest != _digest(meta):
            raise ValueError("its description does not match its own hash")
        return meta

    def _set_aside(self, step: int, error: Exception, warn: Callable[[str], None]) -> None:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        place = self.folder.parent / "damaged" / str(step)
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(exist_ok=True)
        shutil.move(str(self.folder / str(step)), place)  # the same step will be saved again
        self._manager.reload()
        left = self.steps()
        then = f"going back to step {left[-1]}" if left else "no other checkpoint is left"
        warn(f"checkpoint {step} is damaged ({reason}); moved to {place}; {then}")

    def close(self) -> None:
        """Let go of Orbax's threads."""
        self._manager.close()


def describe_leaves(tree: Any) -> dict[str, list[Any]]:
    """Leaf name -> [dtype, shape, hash of the bytes]; hashes in parallel, since hashing releases the interpreter."""
    leaves = named_leaves(tree)

    def describe(leaf: Any) -> list[Any]:
        array = np.asarray(jax.device_get(leaf))
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        code = hashlib.blake2b(data.data, digest_size=16).hexdigest() if array.size else ""
        return [str(array.dtype), list(array.shape), code]

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(leaves, pool.map(describe, leaves.values()), strict=True))


def _same_shapes(abstract: Any, saved: Mapping[str, Any], place: Path) -> None:
    wanted = {name: [str(np.dtype(leaf.dtype)), list(leaf.shape)] for name, leaf in named_leaves(abstract).items()}
    found = {name: list(row[:2]) for name, row in saved.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{place}: {name} is {found.get(name, 'absent')} in the checkpoint and {wanted.get(name, 'absent')} in"
                " this run: use the config it was made with, or another --workdir"
            )


def _same_hashes(state: TrainState, saved: Mapping[str, Any]) -> None:
    for name, row in describe_leaves(state).items():
        if list(row) != list(saved[name]):
            raise ValueError(f"{name} does not match the hash it was saved with")


def _digest(meta: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(meta, sort_keys=True).encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs long tracebacks of what it also raises; one line from us says the same.

    After an error its other reads and writes finish behind its back, and complain that nobody waits for them any more.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    failed = False

    def unless_ours(told: Any) -> None:
        if not failed and "Event loop is closed" not in str(told.exc_value):
            hook(told)

    logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = unless_ours
    try:
        yield
    except Exception as error:
        failed = True
        one: BaseException | None = error
        while one is not None:
            traceback.clear_frames(one.__traceback__)  # they hold the unfinished work alive
            one = one.__context__
        time.sleep(0.5)
        gc.collect()
        raise
    finally:
        sys.unraisablehook = hook
        logger.setLevel(level)
