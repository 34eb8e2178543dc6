"""Who joins: whether this process is one of several, and how it finds the others.

JAX has rules of its own for Slurm, Open MPI, Cloud TPU (by variables or its metadata server) and Kubernetes; they
decide here, too. What looks like one of several processes and is none to JAX is refused: each of them would train, and
write, on its own. JAX itself is imported only when it is asked.
"""

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from scaling_perception.support.errors import UserError

COORDINATOR, PROCESSES, PROCESS = (f"SCALING_PERCEPTION_{name}" for name in ("COORDINATOR", "PROCESSES", "PROCESS"))
JOIN_SECONDS = "SCALING_PERCEPTION_JOIN_SECONDS"

_SECONDS = 300  # to wait for the others, as JAX does
_MESSAGE_AFTER = 10  # seconds of waiting
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "WORLD_SIZE", "MEGASCALE_NUM_SLICES")
_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
_OF_SEVERAL = ("JAX_COORDINATOR_ADDRESS", "JOB_COMPLETION_INDEX")  # name no number of processes
_ALONE = f"set {PROCESSES}=1 if this process runs alone"
_HINT = f"start all of them, let them reach the first one's port, allow more time by {JOIN_SECONDS}, or {_ALONE}"
_BY_HAND = f"set {COORDINATOR} (host:port of the first process), {PROCESSES} and {PROCESS} (0, 1, …)"


class NotJoined(UserError):
    """The processes did not find each other. The command line exits with 1, for starting again may help."""

    code = 1


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of this run, if there are any. Call before any computation.

    ``SCALING_PERCEPTION_COORDINATOR`` (host:port), ``_PROCESSES`` and ``_PROCESS`` name them outright, and
    ``_PROCESSES=1`` alone says that there are none; else JAX finds out (``jax.distributed.initialize``).

    Raises:
        UserError: the three variables are incomplete or no numbers; or the environment speaks of several processes and
            JAX finds no cluster to join.
        NotJoined: JAX cannot start or reach the coordinator.

    Ends the process, with one line and exit code 1, if the others are not there within
    ``SCALING_PERCEPTION_JOIN_SECONDS`` (300).
    """
    given = _given(environment)
    if given is not None:
        count, index = given
        if count > 1:
            _initialize(environment, count, (environment[COORDINATOR], count, index), [f"{PROCESSES}={count}"])
        return
    count, seen = _look(environment)
    if count > 1:
        _initialize(environment, count, (None, count), seen)
    elif seen:
        raise UserError(
            f"this looks like one of several processes ({', '.join(seen)}) and JAX finds no cluster to join: "
            f"{_BY_HAND}, or {_ALONE}"
        )
    elif environment.get("SLURM_NTASKS", "1") != "1" and "SLURM_STEP_NUM_TASKS" not in environment:
        tasks = environment["SLURM_NTASKS"]
        print(f"SLURM_NTASKS={tasks}, but this is no step of srun: running as one process", file=sys.stderr, flush=True)


def other_processes(environment: Mapping[str, str] = os.environ) -> str:
    """What says that this process is one of several, such as ``OMPI_COMM_WORLD_SIZE=2``; "" where it runs alone.

    Raises:
        UserError: the variables of this project are incomplete or no numbers.
    """
    given = _given(environment)
    if given is not None:
        return f"{PROCESSES}={given[0]}" if given[0] > 1 else ""
    if not _signs(environment) and not _may_be_tpu():  # without JAX, whose import takes a second
        return ""
    count, seen = _look(environment)
    return ", ".join(seen) or (f"{count} processes of a TPU slice" if count > 1 else "")


def refuse_several(verb: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raise a UserError if this process is one of several, each of which would do all of ``verb`` and write it."""
    seen = other_processes(environment)
    if seen:
        raise UserError(
            f"{verb} runs in one process, and this looks like one of several ({seen}): start it once, or set "
            f"{PROCESSES}=1 where each process has inputs and outputs of its own"
        )


def _given(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """(number of processes, this one's) as this project's variables name them; None where they are not set."""
    names = (COORDINATOR, PROCESSES, PROCESS)
    given = [name for name in names if environment.get(name)]
    if not given:
        return None
    if given == [PROCESSES] and environment[PROCESSES].strip() == "1":
        return 1, 0
    missing = [name for name in names if name not in given]
    if missing:
        raise UserError(f"{given[0]} is set but {missing[0]} is not: set all three or none ({PROCESSES}=1: no others)")
    if not environment[COORDINATOR].rpartition(":")[2].isdecimal() or ":" not in environment[COORDINATOR]:
        raise UserError(f"{COORDINATOR} is '{environment[COORDINATOR]}': give host:port of the first process")
    try:
        count, index = int(environment[PROCESSES]), int(environment[PROCESS])
    except ValueError:
        raise UserError(f"{PROCESSES} and {PROCESS} must be whole numbers") from None
    if not 0 <= index < count:
        raise UserError(f"{PROCESS}={index} is not in 0..{count - 1} ({PROCESSES}={count})")
    return count, index


def _look(environment: Mapping[str, str]) -> tuple[int, list[str]]:
    """(processes of the cluster that JAX finds, 0 without one; variables that speak of several)."""
    count = _found_by_jax(environment)
    seen = _signs(environment)
    if count == 1:  # a cluster of one, such as the only pod of a TPU job
        seen = [one for one in seen if one.partition("=")[0] not in _OF_SEVERAL]
    return count, seen


def _signs(environment: Mapping[str, str]) -> list[str]:
    """Variables that speak of more than one process, as ``NAME=value``."""
    found = {name: _number(environment.get(name)) for name in _SIZES}
    found |= {name: _hosts(environment, name) for name in _HOSTS}
    found |= {name: 2 for name in _OF_SEVERAL if environment.get(name)}
    if _slurm_tasks(environment) > 1:
        found["SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"] = 2
    return [f"{name}={environment[name]}" for name, count in found.items() if count > 1]


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the Slurm step that this process belongs to.

    A shell of ``salloc`` or the script of ``sbatch`` has the SLURM_NTASKS of the whole allocation and runs once.
    """
    if "SLURM_STEP_NUM_TASKS" in environment:
        return _number(environment["SLURM_STEP_NUM_TASKS"])
    inside = "SLURM_STEP_NODELIST" in environment or "SLURM_STEP_ID" in environment
    return _number(environment.get("SLURM_NTASKS")) if inside else 1


def _hosts(environment: Mapping[str, str], name: str) -> int:
    return len(environment.get(name, "").split(","))


def _number(text: str | None) -> int:
    return int(text) if text and text.strip().isdecimal() else 1


def _may_be_tpu() -> bool:
    return any(os.path.exists(f"/dev/{name}") for name in ("accel0", "vfio/0"))


def _found_by_jax(environment: Mapping[str, str]) -> int:
    """Processes of the cluster that JAX's own detection finds; 0 where it finds none."""
    try:
        from jax._src.clusters import ClusterEnv

        kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
    except (ImportError, AttributeError):  # private names; without them JAX still joins by what the variables say
        hosts = max(_hosts(environment, name) for name in _HOSTS) * _number(environment.get("MEGASCALE_NUM_SLICES"))
        count = max(hosts, _slurm_tasks(environment), _number(environment.get("OMPI_COMM_WORLD_SIZE")))
        return count if count > 1 else 0
    for kind in kinds:
        # every pod has the variable that JAX goes by; asking for the pod's job needs rights that most pods lack
        if kind.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in environment:
            continue
        try:
            with _as_environment(environment), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if kind.is_env_present():
                    # JAX counts by SLURM_NTASKS, which in an interactive step is that of the whole allocation
                    return _slurm_tasks(environment) if kind.name == "slurm" else int(kind.get_process_count())
        except Exception as error:  # requests, kubernetes, ValueError, …
            raise UserError(
                f"cannot find out whether this process is one of several ({kind.__name__}: {_first_line(error)}): "
                f"{_ALONE}, else {_BY_HAND}"
            ) from None
    return 0


def _initialize(environment: Mapping[str, str], count: int, where: tuple[Any, ...], seen: list[str]) -> None:
    import jax

    seconds = environment.get(JOIN_SECONDS, str(_SECONDS))
    if not seconds.isdecimal() or not int(seconds):
        raise UserError(f"{JOIN_SECONDS} is '{seconds}': give a whole number of seconds above 0")
    named = f" ({', '.join(seen)})" if seen else ""
    waiting = (
        threading.Timer(_MESSAGE_AFTER, _tell, [f"waiting for the other processes, {count} in all{named}"]),
        threading.Timer(int(seconds), _give_up, [count, named, seconds]),
    )
    for timer in waiting:
        timer.daemon = True
        timer.start()
    try:
        with _as_environment(environment):  # JAX ends its wait by an abort and a stack trace: ours has to come before
            jax.distributed.initialize(*where, initialization_timeout=2 * int(seconds) + 60)
    except (RuntimeError, OSError) as error:
        raise NotJoined(
            f"the {count} processes of this run{named} cannot join: {_first_line(error)}; {_HINT}"
        ) from None
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"cannot join {count} processes{named} ({_first_line(error)}): {_BY_HAND}, or {_ALONE}"
        ) from None
    finally:
        for timer in waiting:
            timer.cancel()
    if jax.distributed.is_initialized() and jax.process_count() != count:
        raise UserError(
            f"{count} processes joined{named} and the devices belong to {jax.process_count()}: start one process a "
            f"host, or {_ALONE}"
        )


def _give_up(count: int, named: str, seconds: str) -> None:
    _tell(f"scaling-perception: the {count} processes of this run{named} did not all join within {seconds} s; {_HINT}")
    os._exit(NotJoined.code)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


@contextlib.contextmanager
def _as_environment(environment: Mapping[str, str]) -> Iterator[None]:
    """``os.environ`` is ``environment``, for JAX reads no other."""
    real: MutableMapping[str, str] = os.environ
    if environment is real:
        yield
        return
    before = dict(real)
    try:
        real.clear()
        real.update(environment)
        yield
    finally:
        real.clear()
        real.update(before)
