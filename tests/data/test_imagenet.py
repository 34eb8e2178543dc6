"""ImageNet: folders of classes, and files that tensorflow-datasets' own builder of imagenet2012 wrote."""

import io
import json
import pickle

import numpy as np
import pytest
import stand_ins
from PIL import Image

from scaling_perception.data.pipeline import open_batches
from scaling_perception.data.sources import open_source
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import run_verb
from scaling_perception.tasks import TaskOptions, generation

CLASSES = ("n01443537", "n01440764")  # not in the order of their labels


def jpeg(seed, width=40, height=50, mode="RGB"):
    channels = len(mode)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode if mode == "CMYK" else None).save(file, "JPEG")
    return file.getvalue()


def pictures():
    """(class, file name, bytes), among them a grey and a CMYK one, as ImageNet has."""
    modes = ["RGB", "RGB", "L"], ["RGB", "CMYK", "RGB"]
    for kind, name in enumerate(CLASSES):
        for number in range(3):
            data = jpeg(10 * kind + number, 40 + 10 * number, 50, modes[kind][number])
            yield name, f"{name}_{number}.JPEG", data


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    for name, file, data in pictures():
        for split in ("train", "val"):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            (root / split / name / file).write_bytes(data)
    (root / "train" / CLASSES[0] / "notes.txt").write_text("no picture")
    return root


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """imagenet2012 as its own builder writes it; only where it looks for the archives needs TensorFlow, so not that."""
    import tensorflow_datasets as tfds

    def examples(self):
        for name, file, data in pictures():
            yield file, {"file_name": file, "image": io.BytesIO(data), "label": name}

    root = tmp_path_factory.mktemp("tfds")
    builder = tfds.builder_cls("imagenet2012")
    builder.code_path, builder.url_infos = None, {}  # there is nothing to download, so no checksums to find
    builder._split_generators = lambda self, _: {"train": examples(self)}
    builder(data_dir=root, file_format="array_record").download_and_prepare()
    return root


def test_classes_are_numbered_as_their_names_sort(folders):
    source = open_source("imagenet", folders, "train", "generation")
    assert len(source) == 6 and source.fingerprint()["classes"] == 2
    assert [source[i]["label"] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    want = {file: data for _, file, data in pictures()}
    for i in range(6):
        raw = source[i]
        name = raw["key"].split("/")[1]
        assert raw["key"] == f"{CLASSES[1 - raw['label']]}/{name}"
        with Image.open(io.BytesIO(want[name])) as image:
            np.testing.assert_array_equal(raw["image"], np.asarray(image.convert("RGB")))
    one = open_source("imagenet", folders / "val", "train", "generation", count=4)  # class folders alone
    assert len(one) == 4 and one[3]["label"] == 1
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint() == source.fingerprint() and again[5]["key"] == source[5]["key"]


def test_what_tensorflow_datasets_wrote_gives_the_same_samples(folders, prepared):
    source = open_source("imagenet", folders, "train", "generation")
    plain = {source[i]["key"].split("/")[1]: source[i] for i in range(6)}
    for root in (prepared, prepared / "imagenet2012", next((prepared / "imagenet2012").iterdir())):
        found = open_source("imagenet", root, "train", "generation")
        assert len(found) == 6 and found.fingerprint()["classes"] == 1000
    for raw in (pickle.loads(pickle.dumps(found))[i] for i in range(6)):
        np.testing.assert_array_equal(raw["image"], plain.pop(raw["key"])["image"])
        assert raw["label"] == sorted(CLASSES).index(raw["key"].split("_")[0])
    assert not plain
    with pytest.raises(UserError, match="has no split validation, it has train"):
        open_source("imagenet", prepared, "val", "generation")
    with pytest.raises(UserError, match="has labels of its own"):
        open_source("imagenet", prepared, "train", "generation", labels="x.txt")
    json.dumps(found.fingerprint())


def test_a_damaged_picture_is_named(folders, prepared, tmp_path, monkeypatch):
    whole = jpeg(1)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cat" / "text.png").write_bytes(b"no picture at all")
    source = open_source("imagenet", tmp_path, "train", "generation")
    with pytest.raises(UserError, match=r"cat/half\.jpg is damaged or no picture \(.*\): copy or download it again"):
        source[0]
    with pytest.raises(UserError, match=r"cat/text\.png is damaged or no picture \(cannot identify image file\)"):
        source[1]
    (tmp_path / "cat" / "half.jpg").unlink()
    with pytest.raises(UserError, match="half.jpg cannot be read"):
        source[0]
    (tmp_path / "cat" / "none.jpg").touch()
    with pytest.raises(UserError, match="none.jpg is empty"):
        open_source("imagenet", tmp_path, "train", "generation")

    found = open_source("imagenet", prepared, "train", "generation")
    record = dict(found._held._open()[2])
    monkeypatch.setattr(found._held, "_source", {2: {**record, "image": record["image"][:300]}})
    with pytest.raises(UserError, match=rf"5\.1\.0: record 2 of train, {record['file_name'].decode()}, is damaged"):
        found[2]


def test_a_list_of_labels(folders, tmp_path):
    (tmp_path / "list.txt").write_text(f"{CLASSES[0]}\nother 7\n{CLASSES[1]} 5\n")
    source = open_source("imagenet", folders, "train", "generation", labels=str(tmp_path / "list.txt"))
    assert [source[i]["label"] for i in (0, 5)] == [5, 0] and source.fingerprint()["classes"] == 8
    for text, words in [
        ("a\na\n", "a comes twice"),
        ("a x\n", "has the label 'x'"),
        ("a\n", "does not name the folder"),
    ]:
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(UserError, match=words):
            open_source("imagenet", folders, "train", "generation", labels=str(tmp_path / "list.txt"))


def class_folders(root, *names, split="train"):
    for name in names:
        (root / split / name).mkdir(parents=True)
        (root / split / name / "a.jpg").write_bytes(jpeg(1))
    return root


def labels_of(root, split="train"):
    source = open_source("imagenet", root, split, "generation")
    found = {source[i]["key"].split("/")[0]: source[i]["label"] for i in range(len(source))}
    assert all(source.class_names[label] == name for name, label in found.items())
    return found


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (("0", "1", "10", "11", "2"), ("0", "1", "2", "10", "11")),
        (("007", "08", "9", "100"), ("007", "08", "9", "100")),
        (("b2", "b10", "x", "12", "3"), ("3", "12", "b10", "b2", "x")),
        (("golden retriever", "Cat", "²"), ("Cat", "golden retriever", "²")),
    ],
)
def test_names_that_are_numbers_are_ordered_as_numbers(tmp_path, names, order):
    class_folders(tmp_path, *names, ".hidden")
    (tmp_path / "train" / "0empty").mkdir()
    assert labels_of(tmp_path) == {name: i for i, name in enumerate(order)}
    class_folders(tmp_path, *order[1:], split="val")  # one is absent: the others keep their labels
    assert labels_of(tmp_path, "val") == {name: i for i, name in enumerate(order) if i}
    assert open_source("imagenet", tmp_path, "val", "generation").fingerprint()["classes"] == len(order)


def test_classes_in_the_names_of_the_pictures(folders, tmp_path):
    flat = tmp_path / "train"
    flat.mkdir()
    for path in (folders / "train").glob("*/*.*"):
        if path.suffix != ".txt":
            (flat / f"{path.parent.name}_{path.name.split('_')[-1]}").write_bytes(path.read_bytes())
    for root, split in ((tmp_path, "train"), (flat, "train")):
        source = open_source("imagenet", root, split, "generation")
        wanted = open_source("imagenet", folders, "train", "generation")
        assert len(source) == len(wanted) and source.class_names == wanted.class_names
        assert [source[i]["label"] for i in range(len(source))] == [wanted[i]["label"] for i in range(len(wanted))]
    (flat / "tench.JPEG").write_bytes(b"x")
    with pytest.raises(UserError, match="tench.JPEG has no class in its name, .*1 have none"):
        open_source("imagenet", flat, "train", "generation")


def test_the_real_pictures_are_checked(shared_dir, tmp_path):
    root = shared_dir / "data" / "imagenet_sample"
    words = ["imagenet", "--raw", str(root), "--check", "--out", str(tmp_path), "--workers", "0", "--count", "20"]
    assert run_verb("prepare", words) == 0
    assert len(open_source("imagenet", root, "train", "generation").class_names) == 205


def test_classes_that_do_not_fit_are_refused(tmp_path):
    class_folders(tmp_path / "one", "7", "07")
    with pytest.raises(UserError, match="holds 07 and 7, one number: rename one"):
        labels_of(tmp_path / "one")
    class_folders(class_folders(tmp_path / "two", "cat", "dog"), "cat", "cow", "gnu", split="val")
    with pytest.raises(UserError, match=r"val/cow is no class of .*train \(2 are not\)"):
        labels_of(tmp_path / "two", "val")
    (tmp_path / "two" / "labels.txt").write_text("gnu\ncow\ndog\ncat\n")
    assert labels_of(tmp_path / "two", "val") == {"gnu": 0, "cow": 1, "cat": 3}
    class_folders(tmp_path / "three", "cat dog", "gnu", split="val")
    with pytest.raises(UserError, match="has val and no train, .*: write labels.txt"):
        labels_of(tmp_path / "three", "val")
    (tmp_path / "three" / "labels.txt").write_text("gnu 4\ncat dog\n")
    assert labels_of(tmp_path / "three", "val") == {"gnu": 4, "cat dog": 1}


@pytest.mark.parametrize(
    ("root", "split", "words"),
    [
        ("", "train", "needs a root"),
        ("nowhere", "train", "is no folder: give the one that holds"),
        (".", "test", "no split 'test'"),
        ("train", "val", "has no folder val"),
        ("train/n01443537", "train", "holds no class folders"),
    ],
)
def test_mistakes_are_told(folders, root, split, words):
    with pytest.raises(UserError, match=words):
        open_source("imagenet", folders / root if root else "", split, "generation")


def test_centre_crop_halves_then_resizes_then_cuts():
    # 600 x 500 to 64: halved twice (150 x 125 is less than 2 x 64), then to 77 x 64, then columns 6..69
    x = np.broadcast_to(np.linspace(0, 250, 600), (500, 600))
    y = np.broadcast_to(np.linspace(0, 250, 500)[:, None], (500, 600))
    pixels = np.stack([x, y, x], axis=-1).astype(np.uint8)
    cropped = generation.centre_crop(pixels, 64)
    columns = (np.arange(6, 70) + 0.5) / 77 * 250
    rows = (np.arange(64) + 0.5) / 64 * 250
    assert cropped.shape == (64, 64, 3) and cropped.dtype == np.uint8
    np.testing.assert_allclose(cropped[20, :, 0], columns, atol=1.5)
    np.testing.assert_allclose(cropped[:, 20, 1], rows, atol=1.5)

    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (128, 200, 3), np.uint8)  # exactly twice: 2 x 2 means, and no further resizing
    means = noise.reshape(64, 2, 100, 2, 3).mean((1, 3))
    np.testing.assert_allclose(generation.centre_crop(noise, 64), means[:, 18:82], atol=1)  # rounded twice
    same = rng.integers(0, 256, (64, 67, 3), np.uint8)
    np.testing.assert_array_equal(generation.centre_crop(same, 64), same[:, 1:65])
    for size in ((31, 64), (64, 31), (7, 5)):  # smaller ones grow
        assert generation.centre_crop(rng.integers(0, 256, (*size, 3), np.uint8), 32).shape == (32, 32, 3)
    raw = {"key": "k", "image": same, "label": 3}
    (sample,) = generation.encode(raw, 64, TaskOptions())
    np.testing.assert_allclose(sample["target"], same[:, 1:65] / 127.5 - 1.0, atol=1e-6)
    assert sample["label"] == 3 and sample["valid"].all() and "image" not in sample


def test_batches_hold_the_target_alone_online_and_cached(folders, tmp_path, monkeypatch):
    import stand_ins

    monkeypatch.setattr(
        "scaling_perception.models.autoencoders.load_autoencoder", lambda name: stand_ins.make_autoencoder(True)
    )
    words = ["--latents", "--vae", "logvar", "--resolution", "32", "--workers", "0", "--batch", "4"]
    run_verb("prepare", ["imagenet", "--raw", str(folders), "--out", str(tmp_path / "cache"), *words])
    entry = {"source": "imagenet", "root": str(folders), "split": "train", "task": "generation"}
    online = open_batches({"mixture": {"g": entry}, "flip": True, "resolution": 32}, 8, seed=1)
    cached = open_batches({"cache": str(tmp_path / "cache"), "mixture": {"g": entry}, "flip": True}, 8, seed=1)
    encode, params = stand_ins.make_autoencoder(True).encode, stand_ins.make_autoencoder(True).params
    for step in range(3):
        pixels, latents = online.at(step), cached.at(step)
        assert sorted(pixels) == ["key", "label", "pass_id", "target", "valid"]
        assert sorted(latents) == ["key", "label", "pass_id", "target", "target_logvar", "valid"]
        mean, logvar = encode(params, pixels["target"])
        np.testing.assert_allclose(latents["target"], mean, atol=1e-3)
        np.testing.assert_allclose(latents["target_logvar"], logvar, atol=4e-3)
        for name in ("label", "pass_id"):
            np.testing.assert_array_equal(pixels[name], latents[name])
        assert pixels["key"] == latents["key"] and set(pixels["pass_id"]) == {4}
    mixed = {"g": entry, "d": {"source": "scenes", "task": "depth", "count": 4}}
    with pytest.raises(UserError, match="generation has no conditions, so train it alone"):
        open_batches({"mixture": mixed, "resolution": 32}, 8, seed=1)


def test_a_manifest_of_classes(folders, prepared, tmp_path):
    for root in (folders, prepared):
        out = tmp_path / root.name
        assert (
            run_verb("prepare", ["imagenet", "--raw", str(root), "--check", "--out", str(out), "--workers", "0"]) == 0
        )
        summary = json.loads((out / "summary.json").read_text())
        assert summary["good"] == 6 and summary["ranges"]["label"][0] == 0.0
        assert summary["published"] == {"samples": [1281167], "found": 6}


def test_the_order_of_the_classes_travels_with_the_cache(tmp_path, monkeypatch):
    stand_ins.install(monkeypatch.setattr)
    class_folders(tmp_path / "raw", "2", "10", "9")
    words = ["--latents", "--resolution", "32", "--workers", "0", "--flips", "none", "--vae", "logvar"]
    assert run_verb("prepare", ["imagenet", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "c"), *words]) == 0
    data = {"cache": str(tmp_path / "c"), "flip": False}
    found = open_batches(data, 3, 0)
    assert found.class_names == ["2", "9", "10"]
    batch = found.at(0)
    assert {key.split("/")[0]: int(label) for key, label in zip(batch["key"], batch["label"], strict=True)} == {
        "2": 0, "9": 1, "10": 2
    }  # fmt: skip
    class_folders(tmp_path / "raw", "3")
    assert run_verb("prepare", ["imagenet", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "d"), *words]) == 0
    with pytest.raises(UserError, match="other classes: prepare them with one labels.txt"):
        open_batches({**data, "cache": f"{tmp_path / 'c'}:{tmp_path / 'd'}"}, 3, 0).class_names  # noqa: B018
