"""Checkpoints: folders that are whole or absent, written while the run goes on, checked leaf by leaf when read back.

The folder of a step holds five items: ``state`` (step, params, opt_state) and ``ema``, arrays as Orbax writes them
(and ``guard``, what the policy for loss spikes remembers, where there is one);
``config`` and ``data`` (JSON: the run's settings, the fingerprint of its data); ``meta`` (JSON: the model, metrics, for
every leaf dtype, shape and checksum, and a digest of all that is JSON). The checksums are ours because Orbax restores a
file with one flipped byte without a word.

``save`` returns when the arrays are copied to the host; a thread of each process writes its own part of them. When all
processes have told that theirs is written, the first gives the folder its final name. They tell each other in ``poll``
and ``wait``, and nowhere in between does one wait for another that may have failed: so where several processes run, all
of them must call the methods here in the same order.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from scaling_perception.support.errors import UserError
from scaling_perception.support.failures import not_damage
from scaling_perception.support.files import write_json
from scaling_perception.training.checksums import describe_leaves
from scaling_perception.training.saving import FAILED, RUNNING, Saving, failure, from_first, gather, quiet
from scaling_perception.training.state import TrainState, named_leaves

_FORMAT = 2
_HALF = ".orbax-checkpoint-tmp"  # ends the name of a folder that is being written or deleted
_SPARE = 1.05  # room for the metadata around the arrays
_FULL = ("no space left", "disk quota", "file too large", "errno 28")
_LINE_END = re.compile(r"( \[os_error_code=|;).*")


class Checkpoints:
    """The checkpoints of one run, in ``folder`` (made if absent).

    After each save all go but the newest ``keep``, those of steps divisible by ``keep_every`` (0: none), and the
    ``keep_best`` with the smallest ``metric`` among those saved with it.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0, keep_best: int = 0, metric: str = "loss") -> None:
        self.folder = folder.absolute()  # Orbax takes no other
        self._keep, self._keep_every, self._keep_best, self._metric = keep, keep_every, keep_best, metric
        self._saving: Saving | None = None
        if keep < 1:
            raise UserError(f"train.keep is {keep}: keep at least one checkpoint")
        for name, value in (("keep_every", keep_every), ("keep_best", keep_best)):
            if value < 0:
                raise UserError(f"train.{name} is {value}: give a whole number, 0 for none")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}; choose another --workdir") from error

    def steps(self) -> list[int]:
        """Finished checkpoints, oldest first."""
        return finished_steps(self.folder)

    # ---- Saving ------------------------------------------------------------------------------------------------------

    def save(
        self,
        state: TrainState,
        identity: Mapping[str, Any],
        wait: bool = False,
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Start to save ``state`` under its own step; False if that step is saved already.

        On return the arrays are copied, and their buffers may be given away. A save that is still being written is
        finished first.

        Args:
            identity: what the run is: JSON values "config", "data" and "meta".
            wait: return only when the checkpoint is finished.
            metrics: kept with the checkpoint; what ``keep_best`` compares.

        Raises:
            UserError: this save or the one before it failed: the disk is full or the folder cannot be written. Finished
                checkpoints are untouched.
        """
        self.wait()
        step = int(state.step)
        if from_first(step in self.steps()):
            return False
        items = {"state": {"step": state.step, "params": state.params, "opt_state": state.opt_state}, "ema": state.ema}
        items["guard"] = state.guard
        items = {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}
        finite = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
        meta = {"format": _FORMAT, "step": step, "model": identity.get("meta"), "metrics": finite}
        documents = {"config": identity.get("config"), "data": identity.get("data"), "meta": meta}
        meta["leaves"] = describe_leaves(state)
        meta["digest"] = _digest(documents)
        saving = Saving(step, self.folder / f"{step}{_HALF}")
        if jax.process_index() == 0:
            with saving.catching():
                self._make_room(saving, sum(leaf.nbytes for leaf in jax.tree.leaves(state)), [*items, *documents])
        if failure(saving.error) is None:  # every process goes on together
            with saving.catching():
                saving.copy(items)
        saving.run(lambda: self._write(saving, documents))
        self._saving = saving
        if wait:
            self.wait()
        else:
            self.poll()
        return True

    def poll(self) -> None:
        """Look after the save under way; cheap, and to be called at every step.

        Raises:
            UserError: it failed, in this process or in another. Finished checkpoints are untouched.
        """
        saving = self._saving
        if saving is None:
            return
        codes = gather(saving.status())
        if FAILED in codes:
            self._give_up(saving)
        elif RUNNING not in codes:
            if saving.named:
                self._saving = None
            else:  # the parts of all processes are written
                saving.named = True
                if jax.process_index() == 0:
                    saving.run(lambda: self._finish(saving))

    def wait(self) -> None:
        """Return when the save under way, if any, is finished; raises as ``poll`` does."""
        while self._saving is not None:
            self._saving.join()
            self.poll()

    def close(self) -> None:
        """Finish the save under way.

        Where several processes run, only ``wait`` can finish it, for the others may be gone: here it is given up.

        Raises:
            UserError: it failed or was given up; if another error is on its way, that one is left to go on, and this
                one is printed.
        """
        leaving = sys.exc_info()[0] is not None
        try:
            if self._saving is not None and jax.process_count() > 1:
                saving, self._saving = self._saving, None
                saving.join()
                raise self._cannot(saving.step, saving.error or OSError("the run ended first"))
            self.wait()
        except UserError as error:
            if not leaving:
                raise
            _tell(str(error))

    def _make_room(self, saving: Saving, need: int, items: list[str]) -> None:
        for half in self.folder.glob(f"*{_HALF}"):  # what was half written or half deleted keeps the disk full
            shutil.rmtree(half, ignore_errors=True)
        free = shutil.disk_usage(self.folder).free
        if free < need * _SPARE:
            raise OSError(f"no space left: it needs {need / 1e6:.0f} MB and {free / 1e6:.0f} MB are free")
        for item in items:
            (saving.place / item).mkdir(parents=True)

    def _write(self, saving: Saving, documents: Mapping[str, Any]) -> None:
        """In a thread: this process's part of a checkpoint, and the rest too if there is no other process."""
        saving.written()
        if jax.process_index() == 0:
            for name, document in documents.items():
                write_json(saving.place / name / "metadata", document)
        if jax.process_count() == 1:
            saving.named = True
            self._finish(saving)

    def _finish(self, saving: Saving) -> None:
        """In a thread of the first process: from parts to a checkpoint, and farewell to old ones."""
        for name in ("state", "ema", "guard"):
            if (saving.place / name).exists():
                ocp.StandardCheckpointHandler().finalize(epath.Path(saving.place / name))  # joins the processes' parts
        for path in (saving.place, self.folder):
            _flush(path)
        os.rename(saving.place, self.folder / str(saving.step))
        _flush(self.folder)
        for step in self._superfluous():
            gone = self.folder / f"{step}.deleted{_HALF}"
            with contextlib.suppress(OSError):
                os.rename(self.folder / str(step), gone)  # a folder half deleted must not look like a checkpoint
                shutil.rmtree(gone, ignore_errors=True)

    def best(self) -> list[tuple[float, int]]:
        """(metric, step) of the checkpoints that were saved with it, the smallest first; of equals, the newest."""
        marks = []
        for step in self.steps():
            with contextlib.suppress(Exception):  # a damaged one is the best of nothing
                marks.append((_read_documents(self.folder / str(step))["meta"]["metrics"][self._metric], step))
        return sorted(marks, key=lambda mark: (mark[0], -mark[1]))

    def _superfluous(self) -> list[int]:
        steps = self.steps()
        kept = set(steps[-self._keep :])
        if self._keep_every:
            kept |= {step for step in steps if step % self._keep_every == 0}
        if self._keep_best:
            kept |= {step for _, step in self.best()[: self._keep_best]}
        return [step for step in steps if step not in kept]

    def _give_up(self, saving: Saving) -> None:
        self._saving = None
        saving.join()
        error = failure(saving.error) or OSError("a process failed")
        if jax.process_index() == 0:
            shutil.rmtree(saving.place, ignore_errors=True)  # it keeps the disk full
        gather(0)  # and is gone for all
        raise self._cannot(saving.step, error) from error

    def _cannot(self, step: int, error: BaseException) -> UserError:
        mend = "free space" if any(sign in str(error).lower() for sign in _FULL) else "look after that folder"
        good = self.steps()
        kept = f"checkpoint {good[-1]} is kept" if good else "no earlier checkpoint exists"
        what = f"cannot save step {step} in {self.folder} ({_last_words(error)})"
        return UserError(f"{what}: {mend} and run the same command again ({kept})")

    # ---- Restoring ---------------------------------------------------------------------------------------------------

    def restore(
        self,
        abstract: TrainState,
        check: Callable[[Mapping[str, Any]], None],
        warn: Callable[[str], None],
        cast: bool = False,
    ) -> TrainState | None:
        """The newest checkpoint that is whole, or None if there is none at all.

        Its ``guard`` is () where ``abstract`` has one and the checkpoint none of the same size: what a policy remembers
        may begin anew, and the policy may change.

        Args:
            abstract: shapes, dtypes and shardings to restore to: any mesh of any number of processes.
            check: called with the saved identity before any array is read; raises UserError to refuse.
            warn: called (by the first process) with one line for each damaged checkpoint; that one is moved to
                ``damaged/`` beside the folder.
            cast: floating-point leaves may be of another precision in ``abstract`` than they were saved in; they are
                checked, then converted.

        Raises:
            UserError: the checkpoint is of other shapes or dtypes, or of another version's format, or all are damaged.
        """
        self.wait()

        def prepare(identity: Mapping[str, Any], leaves: Mapping[str, Any], place: Path) -> dict[str, Any]:
            check(identity)
            wanted, leaves = _with_same_guard(abstract, leaves)
            stored = _as_stored(wanted, leaves, place, cast)
            tree = {"step": stored.step, "params": stored.params, "opt_state": stored.opt_state}
            return {"state": tree, "ema": stored.ema, "guard": stored.guard}

        seen = False
        while (step := from_first(max(self.steps(), default=-1))) >= 0:
            seen = True
            items, error = _read(self.folder / str(step), prepare)
            if error is None:
                state = TrainState(**items["state"], ema=items.get("ema", abstract.ema), guard=items.get("guard", ()))
                wanted = abstract._replace(guard=abstract.guard if "guard" in items else ())
                return jax.tree.map(lambda leaf, to: leaf.astype(to.dtype), state, wanted) if cast else state
            del items  # makes room for the next one
            self._set_aside(step, error, warn)
        if seen:
            raise UserError(f"every checkpoint in {self.folder} is damaged: remove the folder to start from scratch")
        return None

    def _set_aside(self, step: int, error: BaseException, warn: Callable[[str], None]) -> None:
        place = self.folder.parent / "damaged" / str(step)
        failed = None
        if jax.process_index() == 0:
            try:
                shutil.rmtree(place, ignore_errors=True)
                place.parent.mkdir(exist_ok=True)
                shutil.move(str(self.folder / str(step)), place)  # the same step will be saved again
                left = self.steps()
                then = f"going back to step {left[-1]}" if left else "no other checkpoint is left"
                warn(f"checkpoint {step} is damaged ({_reason(error)}); moved to {place}; {then}")
            except OSError as caught:
                failed = caught
        if failure(failed) is not None:
            raise UserError(f"cannot move the damaged {self.folder / str(step)} to {place}: move or remove it")


def load_ema(
    folder: Path, abstract: Any = None, warn: Callable[[str], None] | None = None, step: int | None = None
) -> tuple[Any, int]:
    """The averaged weights alone of the newest checkpoint that is whole, or of ``step``, and its step. Moves nothing.

    Args:
        folder: where ``Checkpoints`` saved.
        abstract: tree of shapes, dtypes and shardings; None = nested dicts, as saved, on this process's first device.
        warn: called with one line for each damaged checkpoint that is passed over; None = printed to stderr.

    Raises:
        UserError: there is no whole checkpoint, or it is of other shapes or dtypes.
    """

    def prepare(_: Mapping[str, Any], leaves: Mapping[str, Any], place: Path) -> dict[str, Any]:
        saved = {name: row for name, row in leaves.items() if name.startswith("ema/")}
        wanted = {"ema": _tree_of(saved)["ema"] if abstract is None else abstract}
        return _as_stored(wanted, saved, place, cast=False)

    for one in reversed(finished_steps(folder) if step is None else [step]):
        items, error = _read(folder.absolute() / str(one), prepare)
        if error is None:
            return items["ema"], one
        (warn or _tell)(f"checkpoint {one} in {folder} is damaged ({_reason(error)}); passed over")
    what = "whole checkpoint" if step is None else f"whole checkpoint {step}"
    raise UserError(f"{folder} holds no {what}: give the checkpoints folder of a run that has saved")


def finished_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in ``folder``, oldest first; none if it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def newest_meta(folder: Path) -> dict[str, Any] | None:
    """The "meta" that the newest readable checkpoint in ``folder`` was saved with; None if there is no checkpoint."""
    for step in reversed(finished_steps(folder)):
        with contextlib.suppress(Exception):  # what is wrong with it, ``restore`` says
            return _read_documents(folder / str(step))["meta"]["model"]
    return None


# ---- Reading back ----------------------------------------------------------------------------------------------------


def _read(
    place: Path, prepare: Callable[[Mapping[str, Any], Mapping[str, Any], Path], dict[str, Any]]
) -> tuple[dict[str, Any], BaseException | None]:
    """Items of one checkpoint as ``prepare(identity, leaves, place)`` wants them, or what is wrong with it.

    All processes come to the same answer: what one cannot read, none can.
    """
    documents, error = {}, None
    try:
        documents = _read_documents(place)
    except UserError:
        raise
    except Exception as caught:
        error = caught
    error = _damage(error, place)
    if error is not None:
        return {}, error
    meta = documents["meta"]
    identity = {"config": documents["config"], "data": documents["data"], "meta": meta["model"]}
    wanted = prepare(identity, meta["leaves"], place)
    items = {}
    try:
        with quiet():
            for name, tree in wanted.items():
                if jax.tree.leaves(tree):
                    args = ocp.args.StandardRestore(tree)
                    items[name] = ocp.StandardCheckpointHandler().restore(epath.Path(place / name), args=args)
    except Exception as caught:
        error = caught
    error = _damage(error, place)
    if error is None:
        found = describe_leaves({**items.get("state", {}), **{name: items[name] for name in items if name != "state"}})
        bad = [name for name, row in found.items() if row != list(meta["leaves"][name])]
        error = ValueError(f"{bad[0]} does not match the checksum it was saved with") if bad else None
    return items, error


def _damage(error: BaseException | None, place: Path) -> BaseException | None:
    """``failure(error)``; an error that says nothing about the files is raised in every process instead."""
    why = None if error is None else not_damage(error)
    if any(gather(why is not None)):
        raise UserError(f"cannot read {place}: {why or 'another process cannot, and says why'}") from error
    return failure(error)


def _read_documents(place: Path) -> dict[str, Any]:
    documents = {"meta": json.loads((place / "meta" / "metadata").read_text(encoding="utf-8"))}
    meta = documents["meta"]
    old = "identity" in meta and "format" not in meta
    if not old:
        for name in ("config", "data"):
            documents[name] = json.loads((place / name / "metadata").read_text(encoding="utf-8"))
        if meta.pop("digest", None) != _digest(documents):
            raise ValueError("its description does not match its own hash")
    if old or meta["format"] != _FORMAT:
        raise UserError(f"{place} is of another version's format: go on with that version, or in another --workdir")
    return documents


def _with_same_guard(abstract: TrainState, saved: Mapping[str, Any]) -> tuple[TrainState, Mapping[str, Any]]:
    """State and saved leaves without a guard, unless both have one of the same size."""
    has = {name: tuple(row[1]) for name, row in saved.items() if name.startswith("guard/")}
    if has == {name: tuple(leaf.shape) for name, leaf in named_leaves({"guard": abstract.guard}).items()}:
        return abstract, saved
    return abstract._replace(guard=()), {name: row for name, row in saved.items() if name not in has}


def _as_stored(abstract: Any, saved: Mapping[str, Any], place: Path, cast: bool) -> Any:
    """``abstract`` with the dtypes that were saved; refuses what is not the same, but for precision if ``cast``."""
    wanted = {name: [str(np.dtype(leaf.dtype)), list(leaf.shape)] for name, leaf in named_leaves(abstract).items()}
    found = {name: list(row[:2]) for name, row in saved.items()}
    for name in sorted(wanted.keys() | found.keys()):
        want, have = wanted.get(name, []), found.get(name, [])
        floats = all(jnp.issubdtype(dtype, jnp.floating) for dtype in (*want[:1], *have[:1]))
        if want != have and not (cast and floats and want[1:] == have[1:]):
            raise UserError(
                f"{place}: {name} is {have or 'absent'} in the checkpoint and {want or 'absent'} in this run: use the"
                " config it was made with, or another --workdir"
            )
    dtypes = iter([np.dtype(found[name][0]) for name in named_leaves(abstract)])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, next(dtypes), sharding=leaf.sharding), abstract)


def _tree_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of abstract leaves from names such as ``ema/blocks/kernel``, on one device."""
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    tree: dict[str, Any] = {}
    for name, (dtype, shape, _) in saved.items():
        *above, last = name.split("/")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype), sharding=place)
    return tree


def _digest(documents: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(documents, sort_keys=True).encode(), digest_size=16).hexdigest()


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _last_words(error: BaseException) -> str:
    """What the system said, of a line such as ``… writing "x": Failed … file 4: No space left on device [code]``."""
    line = _LINE_END.sub("", (str(error).splitlines() or [""])[0]).rsplit(": ", 1)[-1]
    return (getattr(error, "strerror", None) or line)[-160:] or type(error).__name__


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
