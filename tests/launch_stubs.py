"""What the tests of launch scripts share: the scripts, and stubs in the place of clouds and clusters."""

import os
import shlex
import subprocess
import time
from pathlib import Path

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
TRAIN = ["--config", "configs/depth.py:model=a1,res=256", "--workdir", 'bucket/runs/it\'s & "mine"']
TPU = ["mine", "--type", "v5litepod-16", "--zone", "us-west4-a", "--bucket", "data"]
GKE = ["mine", "--accelerator", "tpu-v6e-slice", "--topology", "8x8", "--image", "registry/me/x:1", "--bucket", "data"]
EVALUATE = ["evaluate", "--task", "depth", "--model", "bucket/m", "--json", 'bucket/it\'s & "mine".json']
PARTS = [*GKE[:4], "2x4", *GKE[5:], "--parts", "16"]
DRY = {
    "with_failures.sh": ["--dry-run", "--kills", "2", "--", "scaling-perception", "train", *TRAIN],
    "local_multiprocess.sh": ["--devices", "4", "--dry-run", "2", "--", *TRAIN],
    "slurm.sbatch": ["--dry-run", *TRAIN],
    "tpu_vm.sh": [*TPU, "--spot", "--dry-run", "--", *TRAIN],
    "tpu_queued.sh": [*TPU, "--spot", "--slices", "2", "--dry-run", "--", *TRAIN],
    "tpu_worker.sh": ["--dry-run", "run", *TRAIN],
    "gke.sh": [*GKE, "--slices", "2", "--dry-run", "--", *TRAIN],
    "slurm_parts.sbatch": ["--dry-run", "prepare", *TRAIN],
    "gke_parts.sh": [*PARTS, "--dry-run", "--", "prepare", "--out", "bucket/p", *TRAIN],
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


def make_stubs(tmp_path):
    made = Stubs(tmp_path)
    for name in ("gcloud", "kubectl", "srun", "scancel", "scontrol", "squeue", "python3", "sudo", "gcsfuse", "curl"):
        made.add(name, "exit 99")
    made.add("tar")
    return made


# ---- All of them -----------------------------------------------------------------------------------------------------


def wait_for(path, seconds=20.0):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} never came"
        time.sleep(0.02)
