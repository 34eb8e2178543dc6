"""What an earlier version wrote is read by this one: a latent cache, a checkpoint that goes on, a model folder.

``tests/legacy`` was written by commit cbd80f5, before passes were listed by name:

    export XLA_FLAGS=--xla_force_host_platform_device_count=8
    scaling-perception prepare scenes --count 4 --resolution 64 --latents --vae tiny --flips both --out cache
    scaling-perception train --config configs/mini.py:model=nano,res=64,count=4,cache=cache --workdir run \\
        --config.train.batch_size=8 --config.train.log_every=1 --config.train.checkpoint_every=2 --config.train.steps=4

``run`` is as it was after step 2, and ``losses.json`` has all four. ``model`` is another one, of a batch of 2, and
``expected.npz`` what it predicted.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from scaling_perception import Predictor
from scaling_perception.cli import main
from scaling_perception.data.latents import CacheReader
from scaling_perception.tasks import RELEASED, get_pass

LEGACY = Path(__file__).parent / "legacy"
ROOT = LEGACY.parent.parent


def test_a_cache_is_read_and_counts_as_finished(tmp_path, capsys):
    reader = CacheReader(LEGACY / "cache")
    for name in RELEASED:
        assert [get_pass(int(reader[i]["pass_id"])).name for i in reader.indices(name)] == [name] * 4
    copy = shutil.copytree(LEGACY / "cache", tmp_path / "cache")
    words = ["prepare", "scenes", "--count", "4", "--resolution", "64", "--latents", "--vae", "tiny"]
    assert main([*words, "--flips", "both", "--out", str(copy)]) == 0
    assert "already finished: 16 records" in capsys.readouterr().out


def test_a_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, one_device):
    shutil.copytree(LEGACY / "run", tmp_path / "run")
    shutil.copytree(LEGACY / "cache", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    config = f"{ROOT}/configs/mini.py:model=nano,res=64,count=4,cache=cache"
    own = ["batch_size=8", "log_every=1", "checkpoint_every=2", "steps=4"]
    main(["train", "--config", config, "--workdir", "run", *(f"--config.train.{word}" for word in own)])
    found = {
        str(row["step"]): row["loss"] for row in map(json.loads, Path("run/metrics.jsonl").read_text().split("\n")[:-1])
    }
    assert found == pytest.approx(json.loads((LEGACY / "losses.json").read_text()), rel=1e-5)
    assert json.loads(Path("run/model/config.json").read_text())["passes"] == list(RELEASED)


def test_a_model_folder_predicts_what_it_did():
    predictor, expected = Predictor.from_pretrained(str(LEGACY / "model")), np.load(LEGACY / "expected.npz")
    y, x = np.mgrid[:16, :16]
    image = np.stack([x * 16, y * 16, (x + y) * 8], -1).astype(np.uint8)
    for task, prompt in (("depth", None), ("flow", image[::-1].copy())):
        found = predictor(image, task, steps=2, ensemble=2, key=3, prompt=prompt).prediction
        np.testing.assert_allclose(found, expected[task], atol=2e-4 * np.ptp(expected[task]))
