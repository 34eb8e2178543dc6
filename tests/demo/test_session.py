"""The demo without its page: the dial, what is refused, and downloads that are the files of `predict`."""

import shlex
import socket
import struct

import numpy as np
import pytest
from PIL import Image

from scaling_perception import Predictor
from scaling_perception.cli import main
from scaling_perception.demo import dial, drawing, masks, server, text
from scaling_perception.demo.session import Asked, Limits, Session
from scaling_perception.inference.budgets import load_budgets
from scaling_perception.inference.settings import Settings
from scaling_perception.interop.find import find_model
from scaling_perception.support.errors import UserError

pytest_plugins = ("nano",)

MARKED = np.zeros((40, 56), bool)
MARKED[5:20, 8:30] = True


@pytest.fixture(scope="module")
def session(nano_folder, tmp_path_factory):
    return Session(str(nano_folder), tmp_path_factory.mktemp("demo"), limits=Limits(megapixels=0.01, megabytes=0.15))


@pytest.fixture
def picture(tmp_path, make_image):
    def make(name="a photo.png", height=40, width=56, seed=0):
        path = tmp_path / name
        Image.fromarray(make_image(height, width, seed)).save(path)
        return str(path)

    return make


def few(**more):
    return {"steps": "2", "ensemble": "2", **more}


# The dial


def test_every_stop_of_the_shipped_dial_has_less_error_than_all_cheaper_settings():
    table = load_budgets(find_model("mini"))
    for task, entry in table["tasks"].items():
        stops = dial.stops(table, task)
        errors, spent = [s.choice.error for s in stops], [s.choice.compute for s in stops]
        assert errors == sorted(errors, reverse=True) and spent == sorted(spent) and stops
        assert errors[-1] == min(cell["error"] for cell in entry["cells"])
        assert {name for stop in stops for name in stop.names} == {"fast", "balanced", "best"}
        for stop in stops:
            assert stop.interval[0] <= stop.choice.error <= stop.interval[1]
            given = stop.choice.settings
            found = dial.stop_of(table, task, Settings(**given))
            assert found is not None and found.choice == stop.choice and found.interval == stop.interval
            assert dial.stop_of(table, task, Settings(**given, aspect="tile")) is None
        drawn = dial.curve(stops, stops[-1], task)
        assert drawn.count("<circle") == len(stops) and drawn.count('class="on"') == 1


def test_no_table_is_said_and_predicts_nothing(session):
    assert session.stops("depth") == []
    said = text.promise(session, "depth", Settings(steps=3, ensemble=2), [])
    assert "ships no table of budgets" in said and "3 steps × 2 members" in said and "not measured yet" in said


def test_seconds_are_measured_and_then_those_of_the_last_run(session, picture):
    plain = Settings(steps=2, ensemble=2)
    session.costs["depth"] = dial.Cost(1.0, 0.5, 0.25)
    try:
        assert session.seconds("depth", plain) == (1.0 + 2 * (0.5 + 2 * 0.25), "measured at start")
        (*_, run) = session.stream(Asked("depth", (picture(),), settings=few(), camera={"fov": "60"}))
        seconds, how = session.seconds("depth", run.settings)
        assert how == "the last run with these settings" and 0 < seconds < 60
    finally:
        session.costs.clear()
        session.seen.clear()


@pytest.mark.parametrize("seconds, words", [(0.0, "0.01 s"), (0.412, "0.41 s"), (11.6, "12 s"), (150, "2 min")])
def test_an_amount_of_time(seconds, words):
    assert dial.amount(seconds) == words


# A run


@pytest.mark.parametrize("task", ["depth", "flow", "amodal"])
def test_members_come_in_and_the_files_are_those_of_the_command(session, picture, task, tmp_path, capsys, monkeypatch):
    one = picture()
    given = {
        "depth": Asked(task, (one,), settings=few(), camera={"fov": "60", "range": "1,4"}),
        "flow": Asked(task, (one, picture("next.png", seed=1)), settings=few(seed="3")),
        "amodal": Asked(task, (one,), MARKED, few(solver="ddpm")),
    }[task]
    seen = [(run.members, run.done) for run in session.stream(given)]
    assert seen == [(1, False), (2, False), (2, True)]
    run = session.runs[max(session.runs)]
    words = shlex.split(run.command)
    assert words[:2] == ["scaling-perception", "predict"]
    monkeypatch.chdir(tmp_path)
    if task != "depth":  # once is enough to load and compile everything anew
        monkeypatch.setattr(Predictor, "from_pretrained", lambda *names, **options: session.predictor)
    assert main(words[1:]) == 0, capsys.readouterr().err
    assert len(run.files) >= 4
    for file in run.files[:-1]:  # the last is the record, which names its folder
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
    assert "Uncertainty" in text.numbers(run, session) and run.task in str(run.files[-1])


def test_an_early_exit_shows_the_picture_at_every_look(session, picture):
    """A tolerance of 0 stops nothing early: the picture sharpens, and is the one that it would be."""
    one = picture()
    given = {"steps": "6", "ensemble": "2", "step_tolerance": "0"}
    seen, pictures = [], []
    for run in session.stream(Asked("depth", (one,), settings=given, camera={"fov": "60"})):
        seen.append(run.done)
        pictures.append(run.estimate.prediction)
    assert seen == [False, False, False, True]  # after 2 and 4 steps, the result, its files
    assert (pictures[0] != pictures[1]).any() and (pictures[2] == pictures[3]).all()
    assert "--step-tolerance 0" in run.command and "--batch-size" not in run.command


def test_flow_of_a_clip_is_that_of_the_two_chosen_frames(session, make_image, tmp_path):
    av = pytest.importorskip("av", reason="needs PyAV: pip install 'scaling-perception[video]'")
    clip = tmp_path / "clip.avi"
    frames = [make_image(40, 56, seed) for seed in range(4)]
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("png", rate=5)
        stream.width, stream.height, stream.pix_fmt = 56, 40, "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    (*_, run) = session.stream(Asked("flow", (str(clip),), settings=few(), frames=(1, 2)))
    assert (run.image == frames[1]).all() and "--start 1 --end 4 --every 2" in run.command
    pair = [str(tmp_path / f"{i}.png") for i in (1, 3)]
    for path, i in zip(pair, (1, 3), strict=True):
        Image.fromarray(frames[i]).save(path)
    (*_, same) = session.stream(Asked("flow", tuple(pair), settings=few()))
    assert (run.estimate.prediction == same.estimate.prediction).all()
    with pytest.raises(UserError, match=r"^clip.avi ends before frame 4 \(it has 4\)"):
        list(session.stream(Asked("flow", (str(clip),), settings=few(), frames=(3, 2))))


def test_views_members_and_points(session, picture, tmp_path):
    (*_, run) = session.stream(Asked("depth", (picture(),), settings=few(), camera={"fov": "60", "range": "1,4"}))
    first, grey = drawing.answer(run, "Spectral"), drawing.answer(run, "gray")
    assert first.shape == (40, 56, 3) and (grey[..., 0] == grey[..., 1]).all() and (first != grey).any()
    laid = drawing.answer(run, "gray", 1.0)
    worst = np.unravel_index(run.estimate.uncertainty.argmax(), (40, 56))
    assert (laid[worst] != grey[worst]).any()
    assert [caption for _, caption in drawing.members(run, session.predictor.options)] == ["member 1", "member 2"]
    data = drawing.write_cloud(tmp_path / "cloud.glb", run, 1, 4).read_bytes()
    magic, version, length = struct.unpack("<III", data[:12])
    assert (magic, version, length) == (0x46546C67, 2, len(data))


def test_arrows_point_where_the_flow_goes():
    from scaling_perception.tasks.colours import flow_arrows

    ground = np.zeros((64, 64, 3), np.uint8)
    flow = np.zeros((64, 64, 2), np.float32)
    assert (flow_arrows(flow, ground) == ground).all()
    flow[31, 31] = 0
    flow[..., 0] = 5  # to the right: as many columns as rows are touched by a head, but lines are flat
    drawn = flow_arrows(flow, ground)[..., 0] > 60
    flow[...] = flow[..., ::-1].copy()
    turned = flow_arrows(flow, ground)[..., 0] > 60
    assert drawn.any() and (drawn == turned.T).mean() > 0.98


# What is refused


def test_a_bad_request_is_one_line_with_the_persons_own_name(session, picture, tmp_path):
    bad = tmp_path / "notes.png"
    bad.write_text("no picture")
    large = picture("large.png", 200, 200)
    heavy = tmp_path / "heavy.png"
    heavy.write_bytes(b"0" * 200_000)
    one = picture()
    cases = [
        (Asked("depth", (None,)), "no picture was given"),
        (Asked("depth", (str(bad),)), "notes.png is no image"),
        (Asked("depth", (large,)), "large.png has 0.04 megapixels (200x200): this page takes 0.01"),
        (Asked("depth", (str(heavy),)), "heavy.png has 0.2 MB: this page takes 0.15 MB"),
        (Asked("depth", (one,), settings={"steps": "many"}), "--steps"),
        (Asked("depth", (one,), settings={"solver": "ddmi"}), "unknown --solver 'ddmi'; did you mean"),
        (Asked("depth", (one,), settings=few(), camera={"fov": "200"}), "--fov 200"),
        (Asked("flow", (one, None)), "needs the second frame too"),
        (Asked("flow", (one, picture("small.png", 20, 20))), "give both the same size"),
        (Asked("amodal", (one,)), "is missing: paint it"),
        (Asked("amodal", (one,), np.zeros((40, 56), bool)), "is missing: paint it"),
    ]
    for asked, words in cases:
        if "fov" not in asked.camera:
            asked = asked._replace(camera={"fov": "60"} if asked.task == "depth" else {})
        before = set(session.folder.iterdir())
        with pytest.raises(UserError) as caught:
            list(session.stream(asked))
        said = str(caught.value)
        assert words in said and "\n" not in said and str(session.folder) not in said, said
        assert set(session.folder.iterdir()) == before  # nothing stays of it


def test_only_the_last_runs_are_kept(session, picture, monkeypatch):
    monkeypatch.setattr("scaling_perception.demo.session._KEPT", 2)
    one = picture()
    for _ in range(4):
        (*_, run) = session.stream(Asked("depth", (one,), settings=few(ensemble="1"), camera={"fov": "60"}))
    assert len(session.runs) == 2 and run.number in session.runs
    assert sum(folder.is_dir() for folder in session.folder.iterdir()) == 2


def test_a_run_that_is_left_stops_between_members(session, picture):
    asked = Asked("depth", (picture(),), settings={"steps": "1", "ensemble": "40"}, camera={"fov": "60"})
    stream = session.stream(asked)
    assert next(stream).members == 1
    stream.close()
    (*_, run) = session.stream(asked._replace(settings=few()))  # waits for the other to stop
    assert run.done and run.members == 2


# The server's flags


def test_a_taken_port_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(server, "require_gradio", lambda: None)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        port = one.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--port {port} is taken" in error
    assert main(["demo", "--host", "203.0.113.9"]) == 2
    assert "--host 203.0.113.9 is no address of this machine" in capsys.readouterr().err


def test_without_gradio_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install 'scaling-perception[demo]'" in error


# Masks


def scene():
    """A red disc on blue ground."""
    y, x = np.mgrid[:60, :80]
    disc = (y - 30) ** 2 + (x - 40) ** 2 <= 12**2
    noise = np.random.default_rng(0).integers(-6, 7, (60, 80, 3))
    return (np.where(disc[..., None], (200, 40, 30), (30, 60, 160)) + noise).clip(0, 255).astype(np.uint8), disc


def overlap(mask, truth):
    return (mask & truth).sum() / (mask | truth).sum()


def test_a_box_and_a_point_find_the_object():
    image, disc = scene()
    assert overlap(masks.of_box("24,14 56,46", image), disc) > 0.9
    assert overlap(masks.of_box("56,46, 24,14", image), disc) > 0.9  # any two corners
    assert overlap(masks.of_points("40,30", image, 60), disc) > 0.9
    assert masks.of_box("", image) is None and masks.of_points(" ", image, 40) is None
    flat = np.full((60, 80, 3), 90, np.uint8)
    assert masks.of_box("24,14 55,45", flat).sum() == 32 * 32  # nothing stands out: the whole box


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda image: masks.of_box("1,2 3", image), "two corners"),
        (lambda image: masks.of_box("1,2 x,4", image), "two corners"),
        (lambda image: masks.of_box("100,2 200,9", image), "no part of the picture of 80x60"),
        (lambda image: masks.of_points("90,5", image, 30), "outside of the picture of 80x60"),
        (lambda image: masks.of_points("nan,5", image, 30), "points x,y"),
    ],
)
def test_places_that_cannot_be_meant(make, words):
    with pytest.raises(UserError, match=words):
        make(scene()[0])


def test_painting_is_brought_to_the_pictures_size():
    layer = np.zeros((30, 40, 4), np.uint8)
    layer[10:20, 10:30, 3] = 255
    mask = masks.of_painting({"layers": [layer]}, (60, 80))
    assert mask.shape == (60, 80) and mask.sum() == 20 * 40 and mask[25, 30]
    assert masks.of_painting({"layers": [layer * 0]}, (60, 80)) is None and masks.of_painting(None, (6, 8)) is None


def test_the_field_of_view_comes_from_exif(tmp_path, make_image):
    path = tmp_path / "photo.jpg"
    image, exif = Image.fromarray(make_image()), Image.Exif()
    exif.get_ifd(0x8769)[0xA405] = 26
    image.save(path, exif=exif)
    degrees, how = drawing.guess_fov(path)
    assert degrees == pytest.approx(69.4, abs=0.1) and "26 mm" in how
    image.save(path)
    assert drawing.guess_fov(path)[0] == drawing.USUAL_FOV
