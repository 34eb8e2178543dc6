"""Out of memory in a training run: what helps, in the numbers of the dry run."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from scaling_perception.scaling.dry_run import describe_run
from scaling_perception.support.configs import Config
from scaling_perception.support.errors import UserError
from scaling_perception.support.failures import memory_cause


@contextlib.contextmanager
def explaining_memory(config: Config) -> Iterator[None]:
    """Raise a UserError that says what helps where the block runs out of memory, compiling or running ``config``."""
    try:
        yield
    except Exception as error:
        why = memory_cause(error)
        if why is None:
            raise
        raise UserError(f"out of memory ({why}): {advice(config, jax.device_count())}") from error


def advice(config: Config, devices: int) -> str:
    """What takes less memory than ``config`` on so many devices: each change with the bytes a device then needs."""
    now = _total(config, {}, devices)
    if now is None:
        return "give a smaller train.batch_size, or a larger train.accumulate"
    found = []
    for change in _changes(config, devices):
        total = _total(config, change, devices)
        if total is not None and total < now:
            words = " and ".join(f"{name}={str(value).lower()}" for name, value in change.items())
            found.append(f"{words} needs {_gigabytes(total)}")
    helps = "; ".join(found) or "a smaller model or resolution"
    return f"by the dry run a device needs {_gigabytes(now)} for this config; {helps} (`--dry-run` shows the parts)"


def _changes(config: Config, devices: int) -> Iterator[Mapping[str, Any]]:
    parts, batch = int(config.train.accumulate), int(config.train.batch_size)
    for factor in (2, 8):
        yield {"train.accumulate": parts * factor}
    if not config.train.remat:
        yield {"train.remat": True}
    if devices > 1 and config.mesh.fsdp == 1:
        yield {"mesh.fsdp": devices, "mesh.data": 1}
    if batch > 1:
        yield {"train.batch_size": batch // 2}


def _total(config: Config, change: Mapping[str, Any], devices: int) -> int | None:
    """Bytes of a device; None where there is no such run."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        for name, value in change.items():
            table, field = name.split(".")
            changed[table][field] = value
    try:
        return describe_run(changed, devices)["memory"]["total"]
    except UserError:
        return None


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
