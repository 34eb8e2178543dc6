"""`bench data`: that the pipeline and the plain loops read the same, what is told, and what is refused."""

import json
import time
from itertools import islice

import pytest

from scaling_perception.cli import main
from scaling_perception.data.latents import CacheReader
from scaling_perception.data.pipeline import Batches
from scaling_perception.timing import data

QUICK = "bench data --quick --model nano --resolution 32 --samples 40 --pictures 3 --batch 8".split()


class Step:
    """In place of a training step, which takes half a minute to compile: it looks at its batch and takes a moment."""

    def __init__(self, case, dtype, remat):
        self.shapes = {name: value.shape for name, value in case.batch.items()}

    def __call__(self, batch):
        assert {name: value.shape for name, value in batch.items()} == self.shapes
        time.sleep(0.05)


def test_every_way_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data.train, "Ours", Step)
    assert main([*QUICK, "--json", str(tmp_path / "data.json")]) == 0
    found, told = json.loads((tmp_path / "data.json").read_text()), capsys.readouterr().out
    for name, row in found["ways"].items():
        assert row["samples_per_second"] == row["rounds"][0] > 0 and row["processor_microseconds"] > 0
        assert name in told
    rates = {name: row["samples_per_second"] for name, row in found["ways"].items()}
    assert found["ratios"]["pictures"] == pytest.approx(rates["pictures"] / rates["pictures, plain loop"])
    assert set(found["ratios"]) == {"latents in memory", "latents from files", "pictures"}
    assert 0 <= found["waiting"] < 1 and found["step_seconds"] >= 0.05 and found["model"] == "nano"


def test_both_read_the_same_samples(tmp_path):
    cache, pictures = data.draw_cache(tmp_path / "cache", 9, 4), data.draw_pictures(tmp_path / "pictures", 3)
    CacheReader(cache).verify()
    entry = {"source": "folder", "root": str(pictures), "task": "depth", "split": "all"}
    pairs = [
        (data.plain_latents(cache, 3), Batches({"cache": str(cache)}, 3, 0, in_memory=False)),
        (data.plain_pictures(pictures, 3, 32), Batches({"mixture": {"own": entry}, "resolution": 32}, 3, 0)),
    ]
    for plain, batches in pairs:  # one epoch of each, in another order
        epoch = batches.streams[0].length // 3
        made = [list(islice(plain, epoch)), [batches.at(step) for step in range(epoch)]]
        for name in ("image", "prompt", "target", "valid"):
            rows = [sorted(row.tobytes() for batch in side for row in batch[name]) for side in made]
            assert rows[0] == rows[1], name


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--batch", "0"], "--batch 0: give 1 or more"),
        (["--workers", "-1"], "--workers -1: give 0 or more"),
        (["--resolution", "40"], "--resolution 40: give a multiple of 16"),
        (["--cache", "nowhere"], "nowhere is no latent cache"),
        (["--model", "nanno"], "did you mean"),
    ],
)
def test_mistakes_are_one_line(words, told, capsys):
    assert main([*QUICK, *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error
