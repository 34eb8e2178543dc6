"""Slurm jobs and processes on one machine, with stubs in the place of the cluster and of training."""

import re
import shlex
import signal
import time

import pytest
from launch_stubs import EVALUATE, LAUNCH, TRAIN, make_stubs, wait_for


@pytest.fixture
def stubs(tmp_path):
    return make_stubs(tmp_path)


SBATCH = {
    "job-name": r"\S+",
    "nodes": r"\d+(-\d+)?",
    "ntasks": r"\d+",
    "ntasks-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "gpus-per-node": r"([a-z0-9_]+:)?\d+",
    "mem": r"\d+[KMGT]?",
    "time": r"(\d+-)?\d+(:\d\d){0,2}",
    "signal": r"([RB]+:)?(\d+|[A-Z0-9]+)(@\d+)?",
    "requeue": None,
    "open-mode": r"append|truncate",
    "output": r"\S+",
    "error": r"\S+",
    "partition": r"\S+",
    "account": r"\S+",
    "exclusive": r"(user|mcs)?",
}


def sbatch_options(text):
    """The options of a batch script as sbatch reads them: until the first line that is no comment.

    Raises:
        ValueError: what sbatch would refuse.
    """
    lines = text.splitlines()
    if not lines[0].startswith("#!"):
        raise ValueError("This does not look like a batch script")
    options = {}
    for number, line in enumerate(lines):
        if line.strip() and not line.startswith("#"):
            if any(later.startswith("#SBATCH") for later in lines[number:]):
                raise ValueError("options after the first command are not read")
            return options
        if line.startswith("#SBATCH"):
            for word in shlex.split(line.removeprefix("#SBATCH"), comments=True):
                name, equals, value = word.removeprefix("--").partition("=")
                if not word.startswith("--") or name not in SBATCH:
                    raise ValueError(f"unrecognized option '{word}'")
                pattern = SBATCH[name]
                if (pattern is None) == bool(equals) or not re.fullmatch(pattern or "", value):
                    raise ValueError(f"invalid value of '{word}'")
                options[name] = value
    return options


def test_sbatch_would_take_it():
    for script in ("slurm.sbatch", "slurm_parts.sbatch"):
        options = sbatch_options((LAUNCH / script).read_text())
        assert options["signal"] == "B:TERM@120" and "requeue" in options and options["open-mode"] == "append"
    for wrong in ("--requeu", "--nodes", "--time=1:2:3:4", "--signal=B:term@x", "--requeue=1", "-N"):
        with pytest.raises(ValueError, match=re.escape(wrong)):
            sbatch_options(f"#!/bin/sh\n#SBATCH {wrong}\ntrue")
    with pytest.raises(ValueError, match="after the first command"):
        sbatch_options("#!/bin/sh\ntrue\n#SBATCH --requeue\n")


SRUN = """
echo "ids ${JAX_LOCAL_DEVICE_IDS:-none}"; printf '%s\\n' "$@"
echo $$ >$STUBS/pid
trap 'sleep 0.2; exit ${SAVED:-143}' TERM
[[ -z ${FATE:-} ]] || exit $FATE
while :; do sleep 0.05; done
"""


def submitted(stubs, tmp_path, script, words, ask, state, environment):
    """Exit code, output, and whether the job was requeued."""
    stubs.add("squeue", f"echo {state}")
    stubs.add("scontrol")
    process = stubs.start(script, *words, SLURM_JOB_ID="77", **environment)
    if ask:
        wait_for(tmp_path / "pid")
        process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    return process.returncode, out.splitlines(), ["scontrol", "requeue", "77"] in stubs.calls()


def slurm(stubs, tmp_path, ask=False, state="RUNNING", **environment: str):
    stubs.add("srun", SRUN)
    stubs.add("scancel", '[[ $1 == --signal=TERM && $2 == 77 ]] && kill -TERM "$(cat "$STUBS/pid")"')
    return submitted(stubs, tmp_path, "slurm.sbatch", TRAIN, ask, state, environment)


def test_a_job_that_ends_by_itself_is_not_requeued(stubs, tmp_path):
    code, out, again = slurm(stubs, tmp_path, FATE="0")
    assert (code, again) == (0, False) and out[0] == "ids none"
    words = ["--kill-on-bad-exit=1", "--label", "python3", "-u", "-m", "scaling_perception", "train", *TRAIN]
    assert out[1:] == words
    code, out, again = slurm(stubs, tmp_path, FATE="2", SLURM_CPUS_PER_TASK="12")
    assert (code, again) == (2, False) and "--cpus-per-task=12" in out


def test_a_process_of_a_whole_node_sees_all_its_gpus(stubs, tmp_path):
    for tasks, ids in (("1", "ids 0,1,2,3"), ("4", "ids none")):
        told = slurm(stubs, tmp_path, FATE="0", SLURM_GPUS_ON_NODE="4", SLURM_NTASKS_PER_NODE=tasks)[1]
        assert told[0] == ids


@pytest.mark.parametrize(
    "state, saved, code, requeued",
    [("RUNNING", "143", 0, True), ("RUNNING", "0", 0, False), ("COMPLETING", "143", 143, False)],
    ids=["preempted", "finished just then", "cancelled"],
)
def test_a_job_that_is_asked_to_stop(state, saved, code, requeued, stubs, tmp_path):
    got, _, again = slurm(stubs, tmp_path, ask=True, state=state, SAVED=saved)
    assert (got, again) == (code, requeued)


PART = """
printf '%s\\n' "$@"; echo $$ >$STUBS/pid
trap 'sleep 0.2; exit 143' TERM
[[ -z ${FATE:-} ]] || exit $FATE
while :; do sleep 0.05; done
"""


def part(stubs, tmp_path, ask=False, state="RUNNING", **environment: str):
    stubs.add("python3", PART)
    return submitted(stubs, tmp_path, "slurm_parts.sbatch", EVALUATE, ask, state, environment)


def test_a_task_of_an_array_does_its_part_and_a_job_after_it_joins(stubs, tmp_path):
    begin, array = ["-u", "-m", "scaling_perception", "evaluate"], {"SLURM_ARRAY_TASK_ID": "2"}
    assert part(stubs, tmp_path, FATE="0", **array) == (0, [*begin, "--shard", "auto", *EVALUATE[1:]], False)
    assert part(stubs, tmp_path, FATE="2", PARTS="8", **array)[1][4:6] == ["--shard", "auto/8"]
    assert part(stubs, tmp_path, FATE="1") == (1, [*begin, "--merge", *EVALUATE[1:]], False)
    for state, code, again in (("RUNNING", 0, True), ("COMPLETING", 143, False)):
        (tmp_path / "pid").unlink()
        got, _, requeued = part(stubs, tmp_path, ask=True, state=state, **array)
        assert (got, requeued) == (code, again)
        stubs.log.unlink()


# ---- Processes on this machine ---------------------------------------------------------------------------------------

CHILD = """
i=$SCALING_PERCEPTION_PROCESS
echo "process $i of $SCALING_PERCEPTION_PROCESSES at $SCALING_PERCEPTION_COORDINATOR flags ${XLA_FLAGS:-none}: $*"
case $MODE-$i in
  fine-*) exit 0 ;;
  fail-1) exit 7 ;;
  deaf-1) (sleep 60 &) ; exit 9 ;;
  deaf-*) trap '' TERM ;;
  *) trap 'sleep 0.3; echo saved; exit 143' TERM; trap 'sleep 0.3; echo saved; exit 130' INT ;;
esac
touch "$STUBS/up$i"
while :; do sleep 0.05; done
"""


def local(stubs, mode, *words, **environment):
    stubs.add("child", CHILD)
    python = str(stubs.folder / "child")
    return stubs.start("local_multiprocess.sh", *words, "--", *TRAIN, MODE=mode, PYTHON=python, **environment)


def test_processes_that_all_end_well(stubs):
    process = local(stubs, "fine", "--devices", "2", "3", XLA_FLAGS="--xla_a=1")
    out, errors = process.communicate(timeout=30)
    lines = sorted(out.splitlines())
    assert process.returncode == 0 and not errors and len(lines) == 3
    form = r"\[(\d)\] process \1 of 3 at (127.0.0.1:\d+) flags (.*): -u -m .*"
    found = [one.groups() for one in map(re.compile(form).fullmatch, lines) if one]
    assert [process for process, _, _ in found] == ["0", "1", "2"]
    assert {flags for _, _, flags in found} == {"--xla_a=1 --xla_force_host_platform_device_count=2"}
    assert len({coordinator for _, coordinator, _ in found}) == 1
    trained = [call[1:] for call in stubs.calls()]
    assert trained == [["-u", "-m", "scaling_perception", "train", *TRAIN]] * 3


def test_one_failure_stops_all(stubs):
    process = local(stubs, "fail", "3")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 7 and out.count("saved") == 2 and "[0] saved" in out


def test_who_does_not_hear_is_killed(stubs):
    begin = time.monotonic()
    process = local(stubs, "deaf", "--grace", "1", "3")
    process.communicate(timeout=30)  # ends only when nobody holds the pipe: what the first had left is gone, too
    assert process.returncode == 9 and 0.9 < time.monotonic() - begin < 10


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_go_to_all_and_are_waited_for(number, code, stubs, tmp_path):
    process = local(stubs, "wait", "2")
    for index in range(2):
        wait_for(tmp_path / f"up{index}")
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == code and out.count("saved") == 2


# ---- Rehearsed failures ----------------------------------------------------------------------------------------------

PATIENT = """
touch "$STUBS/up"
while ! [ -e "$STUBS/enough" ]; do sleep 0.05; done
exit ${CODE:-0}
"""


@pytest.mark.parametrize("several", [False, True])
def test_killed_and_run_again_until_it_is_left_in_peace(several, stubs, tmp_path):
    stubs.add("scaling-perception", PATIENT)
    trained = str(stubs.folder / "scaling-perception")
    command = [str(LAUNCH / "local_multiprocess.sh"), "2", "--"] if several else [trained, "train"]
    options = ["--kills", "2", "--within", "1", "--seed", "9"]
    process = stubs.start("with_failures.sh", *options, "--", *command, *TRAIN, PYTHON=trained)
    told = ""
    for line in process.stderr:
        told += line
        if "kill 2 of 2" in line:
            (tmp_path / "enough").touch()
    process.communicate(timeout=30)
    assert process.returncode == 0 and told.count("; again") == 2 and "seed 9" in told and told.count("\n") == 3
    assert {tuple(call[-len(TRAIN) :]) for call in stubs.calls()} == {tuple(TRAIN)}


def test_an_end_of_its_own_ends_the_rehearsal(stubs, tmp_path):
    stubs.add("scaling-perception", PATIENT)
    (tmp_path / "enough").touch()
    words = ["--within", "99", "--seed", "4", "--", str(stubs.folder / "scaling-perception"), "train"]
    code, _, errors = stubs.run("with_failures.sh", *words, CODE="5")
    assert code == 5 and "ended before kill 1 of 5" in errors and len(stubs.calls()) == 1


def test_a_rehearsal_that_is_stopped_stops_the_run(stubs, tmp_path):
    stubs.add("scaling-perception", "trap 'exit 143' TERM\n" + PATIENT)
    command = [str(stubs.folder / "scaling-perception"), "train"]
    process = stubs.start("with_failures.sh", "--within", "99", "--seed", "4", "--", *command)
    wait_for(tmp_path / "up")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 143
