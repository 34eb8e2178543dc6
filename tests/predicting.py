"""Fixtures of the predict verb: pictures in a folder, and runs of the command line with the nano model."""

import pytest
from PIL import Image

from scaling_perception.cli import main


@pytest.fixture
def pictures(tmp_path, make_image):
    """A folder of three frames of one size; beside it small.png of another."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i, name in enumerate(("frame_1.png", "frame_2.jpg", "frame_10.png")):
        Image.fromarray(make_image(40, 56, i)).save(folder / name)
    Image.fromarray(make_image(24, 30, 9)).save(tmp_path / "small.png")
    return folder


@pytest.fixture
def command(tmp_path, capsys):
    """Run the verb with exactly these words and check its exit code; returns what it printed."""

    def run(*words, code=0, out="out"):
        done = main(["predict", "--out", str(tmp_path / out), *map(str, words)])
        text = capsys.readouterr()
        assert done == code, text.err
        return text

    return run


@pytest.fixture
def predict(command, nano_folder):
    """As ``command``, of one task with the nano model, two steps and two members."""

    def run(task, *words, code=0, out="out", ensemble=2):
        options = ["--task", task, "--model", nano_folder, "--steps", 2, "--ensemble", ensemble, "--batch-size", 4]
        return command(*options, *words, code=code, out=out)

    return run


@pytest.fixture(scope="session")
def loaded():
    return {}


@pytest.fixture
def loaded_once(loaded, monkeypatch):
    """Runs of the command share their model: loading and tracing it again each time would take most of the time."""
    from scaling_perception import Predictor

    load = Predictor.from_pretrained

    def from_pretrained(name, **options):
        key = (str(name), *options.items())
        if key not in loaded:
            loaded[key] = load(name, **options)
        return loaded[key]

    monkeypatch.setattr(Predictor, "from_pretrained", from_pretrained)
