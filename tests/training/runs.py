"""Training commands in processes of their own: a small cache of scenes, what starts them, what they leave.

This file is also the program ``python runs.py LOG VERB ...``: the command itself, which notes in LOG what each step is
given, on devices in the order that ORDER gives.
"""

import contextlib
import functools
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from scaling_perception import cli
from scaling_perception import train as verb
from scaling_perception.models import tiny_vae
from scaling_perception.models.autoencoders import save_part
from scaling_perception.parallel import mesh as meshes
from scaling_perception.parallel.processes import COORDINATOR, PROCESS, PROCESSES
from scaling_perception.support.verbs import run_verb
from scaling_perception.training.state import named_leaves

ORDER = "RUNS_ORDER"
ROOT = Path(__file__).parent.parent.parent


def scenes_command(folder, steps, batch, *changes):
    """The words of a training command of the nano model on a small cache of 32-pixel scenes, less its --workdir."""
    thin = {"encoder_widths": (4, 4, 4), "encoder_blocks": (1, 1, 1), "decoder_widths": (4, 4, 4)}
    config = tiny_vae.TinyVAEConfig(**thin, decoder_blocks=(1, 1, 1), patch=2)
    for part in ("encoder", "decoder"):  # any weights do: they make latents, no pictures
        save_part(folder / "vae", part, config, tiny_vae.init_part(part, config, jax.random.key(0)), {})
    prepare_scenes(folder, "cache", "6")
    spec = (
        f"configs/mini.py:model=nano,res=32,cache={folder / 'cache'},vae={folder / 'vae'},batch={batch},steps={steps}"
    )
    changes = ["train.log_every=1", "latent_norm=none", *changes]
    return ["--config", spec, *(f"--config.{change}" for change in changes)]


def prepare_scenes(folder, name, count, *words):
    """Latents of scenes in ``folder/name``."""
    where = ["--out", str(folder / name), "--latents", "--vae", str(folder / "vae"), "--resolution", "32"]
    assert run_verb("prepare", ["scenes", *where, "--count", count, "--batch", "8", "--workers", "0", *words]) == 0


def start(command, workdir, processes=1, devices=4, noted=False, others=(), **environment):
    """One run: its processes, their words in ``WORKDIR.INDEX.log``; with ``noted`` steps in ``WORKDIR.INDEX.steps``.

    ``others``: words for all processes but the first.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for index in range(processes):
        own = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **environment}
        own["PYTHONPATH"] = str(ROOT)
        own["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"  # the last one counts
        if processes > 1:
            own |= {COORDINATOR: f"127.0.0.1:{port}", PROCESSES: str(processes), PROCESS: str(index)}
        program = [__file__, f"{workdir}.{index}.steps"] if noted else ["-m", "scaling_perception"]
        words = [sys.executable, *program, "train", *command, "--workdir", str(workdir), *(others if index else ())]
        with open(f"{workdir}.{index}.log", "a") as log:
            running.append(subprocess.Popen(words, stderr=log, stdout=log, cwd=ROOT, env=own))
    return running


def finish(running, code, workdir, seconds=500):
    """Wait for all; returns the words of the first process."""
    try:
        codes = [process.wait(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    told = Path(f"{workdir}.0.log").read_text()
    assert codes == [code] * len(running), told[-3000:]
    return told


def losses(workdir):
    """The loss of each step; none is told twice or left out."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def leaf_hashes(workdir, step):
    """Leaf of weights, moments, counters and average in a checkpoint, as plain Orbax reads it -> SHA-256."""
    found = {}
    for item in ("state", "ema"):
        place = workdir / "checkpoints" / str(step) / item
        with contextlib.closing(ocp.PyTreeCheckpointer()) as reader:
            tree = reader.metadata(place).item_metadata
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), dict(tree))
            leaves = named_leaves(reader.restore(place, restore_args=args))
        for name, leaf in leaves.items():
            told = f"{leaf.dtype}{leaf.shape}".encode() + np.ascontiguousarray(leaf).tobytes()
            found[f"{item}/{name}"] = hashlib.sha256(told).hexdigest()
    return found


def steps_noted(workdir, index=0):
    """What each step was given in a process, over all attempts: (step, keys of its samples, hashes of their arrays)."""
    rows = [json.loads(line) for line in Path(f"{workdir}.{index}.steps").read_text().splitlines()]
    return [(row["step"], tuple(row["keys"]), tuple(row["rows"])) for row in rows]


def main(log, *words):
    make = verb._objective

    def noting(*arguments):
        objective = make(*arguments)
        objective.batches.iterate = functools.partial(noted, objective.batches.iterate)
        return objective

    def noted(iterate, start):
        with contextlib.closing(iterate(start)) as batches, open(log, "a", buffering=1) as file:
            for step, batch in enumerate(batches, start):
                rows = []
                for place in range(len(batch["key"])):
                    digest = hashlib.sha256()
                    for name in sorted(batch.keys() - {"key"}):
                        digest.update(name.encode() + np.ascontiguousarray(batch[name][place]).tobytes())
                    rows.append(digest.hexdigest())
                file.write(json.dumps({"step": step, "keys": list(batch["key"]), "rows": rows}) + "\n")
                yield batch

    if ORDER in os.environ:  # of the devices: as on a torus, where a host's need not follow each other
        arrange, order = meshes._arrange, [int(place) for place in os.environ[ORDER].split(",")]
        meshes._arrange = lambda shape, devices: arrange(shape, [devices[place] for place in order])
    verb._objective = noting
    return cli.main(words)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
