"""Which run a work folder holds: what may change when it is resumed, and what the model's card says of it."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from scaling_perception.data.contents import changes
from scaling_perception.support.again import differing, differing_names, shown
from scaling_perception.support.configs import flatten
from scaling_perception.support.errors import UserError
from scaling_perception.support.fields import FIELDS
from scaling_perception.support.files import read_json, write_text
from scaling_perception.support.locks import hold
from scaling_perception.training.saving import failure, gather

# Fields that change neither the numbers of a run nor its data: they may differ when it is resumed. Where the data lies
# may change as well, for its content has a fingerprint of its own; and what is done at a step that went wrong: whoever
# was stopped by one may choose to go on, and no step before it differs.
FREE = tuple(name for name, field in FIELDS.items() if field.free and "NAME" not in name)

FILES = "files.json"  # in the work folder: what the data's files held
_HASHES = (".source.contents", ".source.entries")

# What a held-out loss is measured on: free while nothing is measured; later numbers must compare with earlier ones.
_MEASURED = ("train.validate_samples", "held_out.")

# Fields that came later, with the value by which a run behaves as runs did before them: a checkpoint may lack them.
LATER = {"optim.ema_every": 1, "optim.ema_dtype": "float32", "optim.ema_place": "device"}
LATER |= {"held_out.shared": False, "optim.ema_warmup": False}
LATER |= {"train.stream_dtype": "compute", "train.matmul_precision": "default"}
LATER |= {name: field.default for name, field in FIELDS.items() if name.startswith("data.augment.")}
_LATER_OF_MODEL = {"model.features": 0}
_LATER_ANYWHERE = {"task_options.flow_frame": "native", "task_options.flow_refine": 0}  # in whatever table
_FREE_ANYWHERE = "task_options.mask_opening"  # of finished predictions alone; runs before it had none
# With a cache these say which of its samples are used, which the data's own fingerprint holds.
_OF_CACHE = ("source", "split", "count", "start")


def as_json(value: Any) -> Any:
    """``value`` as JSON reads it back (tuples become lists), so that it compares equal to what was saved."""
    return json.loads(json.dumps(value))


def without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` for a model's card, its folders by name alone: where they lay says something about a machine only."""
    told = as_json(config)
    places = [told["data"], told.get("held_out", {})]
    for table in (told, *places, *(entry for place in places for entry in place.get("mixture", {}).values())):
        for field in ("cache", "root", "init", "autoencoder", "teacher"):
            if isinstance(table.get(field), str) and Path(table[field]).is_absolute():
                table[field] = Path(table[field]).name
    return told


@contextlib.contextmanager
def only_run_in(workdir: Path) -> Iterator[None]:
    """Within the block no other run writes in ``workdir``: its first process holds a lock.

    Raises:
        UserError: another run holds it, in every process of this one, or the folder cannot be written.
    """
    mend = "wait for it, or choose another --workdir"
    with contextlib.ExitStack() as held:
        error: UserError | None = None
        if jax.process_index() == 0:
            try:
                held.enter_context(hold(workdir / ".lock", f"another run is training in {workdir}", mend))
            except UserError as caught:
                error = caught
        if (found := failure(error)) is not None:
            raise UserError(str(found))
        yield


def refuse_foreign(workdir: Path) -> None:
    """Raise a UserError where a run in ``workdir`` would overwrite what is none."""
    if (workdir / "model.safetensors").exists():
        raise UserError(f"{workdir} is a model, not a work folder: start from it with --config.init and choose another")
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file: choose another --workdir")
    if (workdir / "model").exists() and not (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} holds a finished model without checkpoints: choose another --workdir, or move it")


def same_everywhere(identity: Mapping[str, Any]) -> None:
    """Raise a UserError in every process unless all of them were started alike. All must call this."""
    for part, what in (("config", "config"), ("data", "data"), ("meta", "model")):
        digest = hashlib.sha256(json.dumps(identity[part], sort_keys=True).encode()).digest()
        found = gather(int.from_bytes(digest[:4], "big") >> 1)
        other = next((process for process, one in enumerate(found) if one != found[0]), None)
        if other is not None:
            raise UserError(
                f"process {other} has another {what} than process 0: start all with the same command, code and data"
            )


def keep_table(workdir: Path, files: Mapping[str, str]) -> None:
    """Write the hashes of the run's files, by which a later start names those that have changed."""
    if files and _table(workdir) != files:
        write_text(workdir / FILES, json.dumps(dict(files)))


def _table(workdir: Path) -> dict[str, str]:
    with contextlib.suppress(UserError):  # absent or damaged: nothing but names in a message depends on it
        found = read_json(workdir / FILES)
        return found if isinstance(found, dict) else {}
    return {}


def _by_name(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fingerprint of data with its lists of sources and caches as tables, so that a difference can be named."""
    lists = {part: rows for part in ("sources", "caches") if isinstance(rows := data.get(part), list)}
    return {**data, **{part: {str(r.get("name", i)): r for i, r in enumerate(rows)} for part, rows in lists.items()}}


_EXPORTED = ("train.export_dtype", "train.export_from", "train.keep_best", "train.best_metric")


def refuse_other_model(workdir: Path, config: Mapping[str, Any]) -> list[str]:
    """What differs in ``config`` from that of the finished run in ``workdir`` and has no effect on its model.

    Raises:
        UserError: a field of how the model was exported differs.
    """
    path = workdir / "config.json"
    if not path.is_file():
        return []
    old, new = flatten(read_json(path)), flatten(config)
    both = old.keys() & new.keys()  # fields that came later are no difference
    changed = differing({name: old[name] for name in both}, {name: new[name] for name in both})
    best = "best" in (old.get("train.export_from"), new.get("train.export_from"))
    exported = _EXPORTED if best else _EXPORTED[:2]
    other = [line for line in changed if line.partition(":")[0] in exported]
    if other:
        raise UserError(
            f"{workdir} is finished with other settings ({'; '.join(other)}): restore them, or move "
            f"{workdir / 'model'} away, and the last checkpoint is exported anew"
        )
    return changed


def same_run(
    saved: Mapping[str, Any], now: Mapping[str, Any], workdir: Path, files: Mapping[str, str] | None = None
) -> None:
    """Raise a UserError that says what changed, unless ``saved`` and ``now`` describe the same run.

    Args:
        files: path -> hash of the content of every file that the run reads, to name those that have changed.
    """
    for part, what in (("config", "config"), ("data", "data"), ("meta", "model")):
        both = [flatten(saved.get(part, {})), flatten(now[part])]
        if part == "config":
            both[0] = {**LATER, **both[0]}
        if part == "meta" and both[0]:
            both[0] = {**_LATER_OF_MODEL, **both[0]}
        if part == "meta" and "passes" not in both[0]:  # what was saved before they were listed has the same rows
            both[1].pop("passes", None)
        if part == "data":
            both = [flatten(_by_name(side)) for side in (saved.get(part, {}), now[part])]
            # what was saved before contents were hashed has names and sizes alone
            both[1] = {name: v for name, v in both[1].items() if not name.endswith(_HASHES) or name in both[0]}
            before = _table(workdir) if files and both[0] != both[1] else {}
            if before and (found := changes(before, files or {})):
                raise UserError(
                    f"cannot resume in {workdir}: the data's files are others: {found}; restore them, or choose "
                    "another --workdir"
                )
        for end, was in _LATER_ANYWHERE.items():
            both[0] |= dict.fromkeys((name for name in both[1] if name.endswith(end) and name not in both[0]), was)
        old, new = ({name: value for name, value in side.items() if value != {}} for side in both)
        cached = bool(old.get("data.cache")) and bool(new.get("data.cache"))
        measured = bool(old.get("train.validate_every")) and bool(new.get("train.validate_every"))
        for name in differing_names(old, new):
            free = part == "config" and (name in FREE or (name.startswith("data.") and name.endswith(".root")))
            free |= part == "config" and name.startswith(_MEASURED) and not measured
            free |= name.endswith(_FREE_ANYWHERE)
            free |= part == "config" and cached and name.startswith("data.mixture.") and name.endswith(_OF_CACHE)
            if not free:
                was, is_now = shown(old, name), shown(new, name)
                how = f"restore it (--config.{name}={was})" if part == "config" and name in LATER else "restore it"
                raise UserError(
                    f"cannot resume in {workdir}: {what} {name} was {was} and is now {is_now}; "
                    f"{how}, or choose another --workdir"
                )
