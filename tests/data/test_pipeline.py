import collections
import contextlib
import itertools
import json
import os
import threading

import numpy as np
import pytest
import stand_ins
from ml_collections import ConfigDict

from scaling_perception.data import pipeline
from scaling_perception.data.pipeline import Batches, open_batches
from scaling_perception.data.selection import samples_taken
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import RELEASED

ARRAYS = ("image", "prompt", "target", "valid", "pass_id", "label")
DEPTH = {"source": "scenes", "task": "depth", "count": 8}
FLOW = {"source": "scenes", "task": "flow", "count": 8}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        stand_ins.install(patch.setattr)
        stand_ins.prepare(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    stand_ins.install(monkeypatch.setattr)


def online(**changes):
    return {"mixture": {"d": DEPTH, "f": FLOW}, "flip": True, "resolution": stand_ins.SIZE, **changes}


def cached(cache, **changes):
    return {"cache": cache, "flip": True, **changes}


def open_(data, batch_size=8, seed=1, **more):
    return Batches(data, batch_size, seed, **more)


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert a["key"] == b["key"]
    for name in ARRAYS:
        np.testing.assert_array_equal(a[name], b[name])
        assert a[name].dtype == b[name].dtype


def is_same(a, b):
    return a["key"] == b["key"] and all(np.array_equal(a[name], b[name]) for name in ARRAYS)


@pytest.mark.parametrize("kind", ["cached", "online"])
def test_a_batch_is_a_function_of_the_step(cache, kind):
    data = cached(cache) if kind == "cached" else online()
    batches = open_(data)
    seventh = batches.at(7)
    assert_same(seventh, batches.at(7))
    assert_same(seventh, open_(data).at(7))
    assert not is_same(seventh, batches.at(8))
    assert not is_same(seventh, open_(data, seed=2).at(7))
    for start, batch in zip((5, 6, 7), batches.iterate(5), strict=False):
        assert_same(batch, batches.at(start))
    with pytest.raises(ValueError):
        batches.at(-1)


def test_shapes_and_types(cache):
    batch = open_(cached(cache)).at(0)
    for name in ("image", "prompt", "target"):
        assert batch[name].shape == (8, 4, 4, 4) and batch[name].dtype == np.float32
    assert batch["valid"].shape == (8, 4, 4) and batch["valid"].dtype == bool
    assert batch["pass_id"].dtype == batch["label"].dtype == np.int32
    assert len(batch["key"]) == 8 and isinstance(batch["key"][0], str)
    batch = open_(online()).at(0)
    assert batch["target"].shape == (8, 32, 32, 3) and batch["target"].dtype == np.float32
    assert batch["valid"].shape == (8, 32, 32) and batch["valid"].dtype == bool


@pytest.mark.parametrize("kind", ["cached", "online"])
def test_some_places_of_the_global_batch(cache, kind):
    whole = open_(cached(cache) if kind == "cached" else online())
    for places in ([0, 1, 2, 3], [6, 7], [0, 3, 4, 7], [5]):  # a run, the end, interleaved, one
        held = whole.holding(places)
        assert held.fingerprint == whole.fingerprint and len(whole.at(0)["key"]) == 8
        for step, batch in zip((3, 4), held.iterate(3), strict=False):
            wanted = whole.at(step)
            assert batch["key"] == held.at(step)["key"] == [wanted["key"][place] for place in places]
            for name in ARRAYS:
                np.testing.assert_array_equal(batch[name], wanted[name][places])
    for places in ([], [8], [-1]):
        with pytest.raises(ValueError):
            whole.holding(places)


def test_every_sample_comes_once_an_epoch_and_in_a_new_order(cache):
    batches = open_(cached(cache, mixture={"a": {"task": "depth"}}))
    keys = [batches.at(step)["key"] for step in range(4)]  # an epoch is one batch of 8
    everything = sorted(f"stand-in/{i}" for i in range(8))
    assert all(sorted(one) == everything for one in keys)
    assert len({tuple(one) for one in keys}) > 1
    flow = open_(cached(cache, mixture={"a": {"task": "flow"}})).elements
    per_pass = collections.Counter((one.stream, one.index) for step in range(2) for one in flow(step))
    assert set(per_pass.values()) == {1} and len(per_pass) == 16


def test_mixture_follows_the_weights(cache):
    mixture = {"x": {"task": "depth", "weight": 3}, "y": {"task": "flow", "weight": 1}}
    tasks = np.concatenate([open_(cached(cache, mixture=mixture)).at(step)["pass_id"] for step in range(10)])
    counts = {name: int((tasks == number).sum()) for number, name in enumerate(RELEASED)}
    assert counts == {"depth": 60, "amodal": 0, "flow_x": 10, "flow_y": 10}
    equal = np.concatenate([open_(cached(cache), 12).at(step)["pass_id"] for step in range(10)])
    assert [int((equal == number).sum()) for number in range(4)] == [40, 40, 20, 20]
    off = open_(cached(cache, mixture={"x": {"task": "depth", "weight": 0}, "y": {"task": "amodal"}}))
    assert set(off.at(0)["pass_id"]) == {RELEASED.index("amodal")}


def test_the_order_does_not_depend_on_how_the_mixture_was_written(cache):
    pairs = list(online()["mixture"].items())
    assert_same(open_(online(mixture=dict(pairs))).at(2), open_(online(mixture=dict(reversed(pairs)))).at(2))


def test_what_is_taken_is_said(cache, tmp_path):
    whole = samples_taken(open_(online()))
    assert whole == ["8 samples of scenes (train)"] * 2
    for split, number in (("train", 5), ("val", 2)):
        for name in (f"{split}/{field}/{i}.png" for field in ("image", "depth") for i in range(number)):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"not read here")
    some = {"source": "folder", "root": str(tmp_path), "task": "depth", "count": 3, "start": 2}
    (line,) = samples_taken(open_(online(mixture={"d": some})))
    assert line == "5 of 7 samples of folder (train; data.mixture.d.split=all for all); 3 of them, from 2"
    held = samples_taken(open_(cached(cache, mixture={"d": {"task": "depth", "count": 5}})))
    assert held == [f"5 of 8 records of depth: scenes (train) in {cache}"]
    assert samples_taken(object()) == []  # batches of another kind


def test_flips_are_drawn_from_seed_and_position_alone(cache):
    one = [e for step in range(30) for e in open_(cached(cache)).elements(step)]
    assert 0.35 < np.mean([e.flip for e in one]) < 0.65
    other = [e for step in range(60) for e in open_(cached(cache), 4).elements(step)]
    assert one == other  # another batch size cuts the same stream elsewhere
    plain = open_(cached(cache, flip=False))
    assert not any(e.flip for step in range(5) for e in plain.elements(step))
    assert [e[:2] for e in one[:40]] == [e[:2] for step in range(5) for e in plain.elements(step)]


def test_cached_equals_online_then_encoded(cache):
    mixture = {"a": DEPTH, "b": FLOW, "c": {**DEPTH, "task": "amodal"}}
    latents, pixels = open_(cached(cache, mixture=mixture)), open_(online(mixture=mixture))
    autoencoder = stand_ins.make_autoencoder()
    flips = set()
    for step in range(3):
        a, b = latents.at(step), pixels.at(step)
        assert a["key"] == b["key"]
        for name in ("pass_id", "label"):
            np.testing.assert_array_equal(a[name], b[name])
        for name in ("image", "prompt", "target"):
            wanted = autoencoder.encode(autoencoder.params, b[name])[0]
            np.testing.assert_allclose(a[name], wanted, atol=2e-3)  # float16
        np.testing.assert_array_equal(a["valid"], b["valid"].reshape(8, 4, 8, 4, 8).all((2, 4)))
        flips |= {(int(t), e.flip) for t, e in zip(a["pass_id"], latents.elements(step), strict=True)}
    assert {(RELEASED.index("flow_x"), True), (RELEASED.index("flow_x"), False)} <= flips


def test_in_memory_or_not_and_several_folders(cache):
    assert_same(open_(cached(cache), in_memory=True).at(3), open_(cached(cache), in_memory=False).at(3))
    twice = open_(cached([cache, cache]))
    assert [stream.length for stream in twice.streams] == [16] * 4
    assert_same(twice.at(1), open_(cached([cache, cache]), in_memory=False).at(1))
    assert_same(twice.at(1), open_(cached(f"{cache}{os.pathsep}{cache}")).at(1))


def test_worker_processes_make_the_same_batches(tmp_path, cache):
    root = tmp_path / "pairs"
    make_folder(root)
    entry = {"source": "pix2gestalt", "root": str(root), "split": "all", "task": "amodal"}
    data = {"mixture": {"a": entry}, "flip": True, "resolution": 32}
    alone, spread = open_(data), open_({**data, "workers": 2})
    assert alone.fingerprint == spread.fingerprint
    held = spread.holding([1, 2, 6])
    assert_streams(held, lambda step: held.at(step))
    latents = open_(cached(cache))
    assert_streams(open_(cached(cache, workers=2), in_memory=False), latents.at)


def assert_streams(batches, at):
    with contextlib.closing(batches.iterate(3)) as stream:
        for step, batch in zip((3, 4, 5), stream, strict=False):
            assert_same(batch, at(step))


def make_folder(root):
    from PIL import Image

    rng = np.random.default_rng(0)
    for folder, name, channels in (
        ("occlusion", "occlusion", 3),
        ("visible_object_mask", "visible_mask", 0),
        ("whole", "whole", 3),
        ("whole_mask", "whole_mask", 0),
    ):
        (root / folder).mkdir(parents=True)
        for i in range(6):
            values = rng.integers(0, 256, (32, 32, 3)) if channels else rng.integers(0, 2, (32, 32)) * 255
            Image.fromarray(values.astype(np.uint8)).save(root / folder / f"{i}_{name}.png")


@pytest.mark.parametrize("kind", ["cached", "online"])
def test_iterating_passes_errors_on_and_ends_its_threads(cache, monkeypatch, kind):
    batches = open_(cached(cache) if kind == "cached" else online())
    before = set(threading.enumerate())
    stream = batches.iterate(0)
    next(stream)
    own = [thread for thread in threading.enumerate() if thread not in before and "prefetch" in thread.name]
    assert own
    stream.close()
    for thread in own:
        thread.join(5)
        assert not thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        next(stream)
    monkeypatch.setattr(*((batches.cached, "batch") if kind == "cached" else (stand_ins.StandIn, "__getitem__")), fail)
    with pytest.raises(ZeroDivisionError):
        next(batches.iterate(0))


def fail(*_):
    return 1 / 0


def test_fingerprint_says_what_matters(cache):
    base = open_(cached(cache)).fingerprint
    assert json.loads(json.dumps(base)) == base
    assert open_(cached(cache, workers=3)).fingerprint == base
    changed = [
        open_(cached(cache), seed=2),
        open_(cached(cache), batch_size=4),
        open_(cached(cache, flip=False)),
        open_(cached(cache, mixture={"depth": {"task": "depth"}})),
        open_(cached([cache, cache])),
        open_(online()),
        open_(online(task_options={"flow_divisor": 50.0})),
        open_(online(mixture={"d": {**DEPTH, "count": 7}, "f": FLOW})),
    ]
    texts = {json.dumps(one.fingerprint, sort_keys=True) for one in changed}
    assert len(texts) == len(changed) and json.dumps(base, sort_keys=True) not in texts


def test_config_dict_and_jax_process(cache):
    data = ConfigDict({"cache": cache, "mixture": {}, "flip": True, "workers": 0, "resolution": stand_ins.SIZE})
    assert_same(open_batches(data, 8, 1).at(0), open_(cached(cache)).at(0))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"chache": ""}, "data.chache; did you mean 'cache'"),
        ({"mixture": {"a": {"tsk": "depth"}}}, "data.mixture.a.tsk"),
        ({"mixture": {"a": {"source": "scenes"}}}, "has no task"),
        ({"mixture": {"a": {"task": "dept"}}}, "did you mean 'depth'"),
        ({"mixture": {"a": {"task": "depth", "weight": -1}}}, "weight"),
        ({"mixture": {"a": {"task": "depth", "weight": 0}}}, "every weight"),
        ({"resolution": 64}, "resolution=32"),
        ({"task_options": {"flow_divisor": 50.0}}, "task_options.flow_divisor=75.0, not 50.0"),
    ],
)
def test_mistakes_are_told(cache, change, named):
    with pytest.raises(UserError) as caught:
        open_(cached(cache, **change))
    assert named in str(caught.value)


def test_what_does_not_fit_is_refused(cache, tmp_path):
    with pytest.raises(UserError, match="neither cache nor mixture"):
        open_({"resolution": 32})
    with pytest.raises(UserError, match="data.resolution"):
        open_(online(resolution=0))
    with pytest.raises(UserError, match="batch size 0"):
        open_(cached(cache), 0)
    with pytest.raises(UserError, match="seed"):
        open_(cached(cache), seed=-1)
    stand_ins.prepare(tmp_path / "plain", "--flips", "none", "--tasks", "depth")
    with pytest.raises(UserError, match="no flipped copies"):
        open_(cached(str(tmp_path / "plain")))
    with pytest.raises(UserError, match="asks for flow"):
        open_({"cache": str(tmp_path / "plain"), "mixture": {"f": {"task": "flow"}}})
    stand_ins.prepare(tmp_path / "other", "--vae", "other")
    with pytest.raises(UserError, match="differ in autoencoder"):
        open_(cached([cache, str(tmp_path / "other")]))


def test_mixing_needs_no_look_at_what_came_before(cache):
    """Far into training a batch costs what the first one costs, and is still exact."""
    batches = open_(cached(cache))
    far = batches.at(10**9)
    assert_same(far, next(itertools.islice(batches.iterate(10**9), 1)))


def test_what_is_known_of_the_data_does_not_depend_on_how_much_is_recorded(cache, tmp_path, monkeypatch):
    for name in ("a", "b"):
        stand_ins.prepare(tmp_path / name, "--tasks", "depth")
    both = f"{tmp_path / 'a'}:{tmp_path / 'b'}"
    whole = open_(cached(both))
    monkeypatch.setattr(pipeline, "_LONGEST", 100)
    short = open_(cached(both))
    assert isinstance(whole.fingerprint["caches"], list) and "sha256" in short.fingerprint["caches"]
    assert short.autoencoders == whole.autoencoders == {stand_ins.make_autoencoder().id}
    assert open_(online()).autoencoders == set()
    classes = {"mixture": {"c": {"source": "textures", "task": "generation", "count": 4}}, "resolution": 32}
    assert open_(classes, 2).class_count > 1 == 1 + short.class_count
