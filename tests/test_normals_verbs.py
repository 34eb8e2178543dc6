"""A task that was added last works with every verb: prepare, train, evaluate, predict, report."""

import json

import numpy as np
import pytest
from PIL import Image

from scaling_perception.cli import main
from scaling_perception.data.latents import CacheReader
from scaling_perception.tasks import PERCEPTION


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device):
    """A folder with a cache of normals, and a nano model that was trained on it for two steps."""
    folder = tmp_path_factory.mktemp("normals")
    words = ["scenes", "--tasks", "normals", "--count", "4", "--resolution", "32", "--latents", "--vae", "tiny"]
    words += ["--batch", "2"]  # for each of eight devices
    assert main(["prepare", *words, "--out", str(folder / "cache")]) == 0
    config = f"configs/normals.py:model=nano,res=32,cache={folder}/cache"
    own = [f"--config.train.{word}" for word in ("steps=2", "batch_size=8", "log_every=1", "checkpoint_every=2")]
    assert not main(["train", "--config", config, "--workdir", str(folder / "run"), *own])
    return folder


def test_the_cache_and_the_model_list_their_passes(run):
    reader = CacheReader(run / "cache")
    assert len(reader.indices("normals")) == 4 and not len(reader.indices("depth"))
    record = reader[0]
    assert not np.allclose(record["target"], record["flipped"]["target"]), "both views are encoded"
    ledger = json.loads((run / "cache" / "ledger.json").read_text())
    assert ledger["passes"]["normals"] == 5 and ledger["passes"]["generation"] == 4
    meta = json.loads((run / "run" / "model" / "config.json").read_text())
    assert meta["tasks"] == ["normals"] and meta["passes"] == list(PERCEPTION)
    assert len(meta["latent_norm"]["shift"]) == len(PERCEPTION)


def test_evaluate_and_report(run, capsys):
    words = ["--task", "normals", "--dataset", "scenes", "--split", "val", "--count", "6", "--model", str(run / "run")]
    out = run / "normals.json"
    assert main(["evaluate", *words, "--steps", "1", "--ensemble", "1,2", "--panels", "1", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert 0 < result["cells"][1]["metrics"]["mean_angle"]["mean"] < 180
    assert set(result["baselines"]) == {"constant", "ground_plane", "autoencoder"}
    assert result["baselines"]["ground_plane"]["metrics"]["mean_angle"]["mean"] > 0
    main(["report", str(run)])
    page = (run / "report.html").read_text()
    assert "mean angle (°)" in page and "floor and wall (fitted)" in page and page.count("<figure>") >= 4


def test_predict(run, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    words = ["--task", "normals", "--model", str(run / "run"), "--steps", "1", "--ensemble", "2"]
    assert main(["predict", *words, "--out", str(tmp_path / "out"), str(tmp_path / "a.png")]) == 0
    found = np.load(tmp_path / "out" / "a_normals.npy")
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-5)
    assert found.shape == (20, 30, 3) and (tmp_path / "out" / "a_normals_color.png").is_file()
    spread = np.load(tmp_path / "out" / "a_normals_uncertainty.npy")
    assert spread.shape == (20, 30) and spread.max() > 0


def test_what_does_not_fit_is_one_line(run, tmp_path, capsys):
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    words = ["--model", str(run / "run"), "--out", str(tmp_path / "out"), str(picture)]
    for more, told in (
        (["--task", "depth"], "this model does not know depth: it was trained for normals"),
        (["--task", "normals", "--reduce", "lsq"], "reduce 'lsq' is no way to merge normals members"),
        (["--task", "normals", "--formats", "ply"], "--formats: normals has no 'ply'"),
        (["--task", "normals", "--align", "x.csv"], "--align belongs to depth, not to normals"),
    ):
        assert main(["predict", *more, *words]) == 2
        assert told in capsys.readouterr().err
