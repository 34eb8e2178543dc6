"""What is object in a mask: the same by file, by Pillow and by array; what is no mask is refused."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from scaling_perception.data.masks import read_mask, to_mask
from scaling_perception.support.errors import UserError

TRUTH = np.zeros((24, 30), bool)
TRUTH[4:15, 6:22] = True


def levels(value, rest=0, kind=np.uint8):
    return np.where(TRUTH, value, rest).astype(kind)


TAKEN = {
    "bool": TRUTH,
    "zero and one": levels(1),
    "zero and one of int64": levels(1, kind=np.int64),
    "zero and 255": levels(255),
    "255 in 16 bits": levels(255, kind=np.uint16),
    "16 bits": levels(65535, kind=np.uint16),
    "probabilities in bytes": levels(200, 40),
    "probabilities": levels(0.8, 0.2, np.float32),
    "half precision": levels(0.8, 0.2, np.float16),
    "a hair beyond one": levels(1.0000001, -1e-7, np.float64),
    "floats of 0 and 255": levels(255, kind=np.float32),
    "a red object": np.stack([levels(255), levels(0), levels(0)], axis=-1),
    "opaque": np.stack([levels(255)] * 3 + [np.full(TRUTH.shape, 255, np.uint8)], axis=-1),
}

REFUSED = {
    "a class": (levels(3), "0, 3 and nothing from 128 up"),
    "instances in 16 bits": (levels(24001, kind=np.uint16), "0, 24001 and nothing from 32768 up"),
    "a class beside the void": (np.where(TRUTH, 7, np.roll(levels(255), 15, 0)).astype(np.uint8), "areas of 0, 7, 255"),
    "beyond 16 bits": (levels(70000, kind=np.int64), "beyond 16 bits"),
    "no object is minus one": (levels(1, -1, np.int32), "integers from -1 to 1"),
    "logits": (levels(4.2, -3.1, np.float32), "logits"),
    "NaN": (levels(1, np.nan, np.float32), "NaN"),
    "infinity": (levels(np.inf, 0, np.float32), "NaN or infinity"),
    "a dark colour": (np.stack([levels(64), levels(0), levels(0)], axis=-1), "nothing from 128 up"),
    "two objects in two colours": (
        np.stack([levels(255), np.roll(levels(200), 15, 0), levels(0)], axis=-1),
        "areas of 2 colours beside black",
    ),
    "transparent": (np.stack([levels(255)] * 4, axis=-1), "transparency"),
    "complex": (TRUTH.astype(np.complex64), "complex64"),
    "two channels": (np.zeros((4, 4, 2)), "one channel"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_one_meaning_by_every_way(tmp_path, name):
    array = TAKEN[name]
    np.testing.assert_array_equal(to_mask(array), TRUTH)
    if array.ndim == 2:
        np.save(tmp_path / "m.npy", array)
        np.testing.assert_array_equal(read_mask(tmp_path / "m.npy"), TRUTH)
    if array.dtype in (bool, np.uint8, np.uint16, np.float32):
        picture = Image.fromarray(array)
        np.testing.assert_array_equal(to_mask(picture), TRUTH)
        path = tmp_path / ("m.tif" if array.dtype == np.float32 else "m.png")
        picture.save(path)
        np.testing.assert_array_equal(to_mask(path), TRUTH)


@pytest.mark.parametrize("name", REFUSED)
def test_no_mask_is_one_line(tmp_path, name):
    array, words = REFUSED[name]
    with pytest.raises(UserError, match=words):
        to_mask(array)
    if array.dtype in (np.uint8, np.uint16, np.float32):
        path = tmp_path / ("m.tif" if array.dtype == np.float32 else "m.png")
        Image.fromarray(array).save(path)
        for way in (path, Image.open(path)):
            with pytest.raises(UserError, match=words):
                to_mask(way)


def test_palettes_and_soft_edges(tmp_path):
    coloured = Image.fromarray(levels(2))
    coloured.putpalette([0, 0, 0, 9, 9, 9, 0, 64, 0])  # dark green, whose brightness is 38
    grey = Image.fromarray(levels(200, 3)).convert("P", palette=Image.Palette.ADAPTIVE)
    for name, picture in (("coloured", coloured), ("grey", grey)):
        picture.save(tmp_path / f"{name}.png")
        for way in (picture, tmp_path / f"{name}.png"):
            np.testing.assert_array_equal(to_mask(way), TRUTH, err_msg=name)
    soft = Image.fromarray(levels(255)).filter(ImageFilter.GaussianBlur(2))
    soft.save(tmp_path / "soft.jpg", quality=50)
    inside = np.zeros_like(TRUTH)
    inside[8:11, 10:18] = True
    for way in (soft, tmp_path / "soft.jpg"):
        out = to_mask(way)
        assert out[inside].all() and (out & ~TRUTH).sum() < 10 and 100 < out.sum() <= TRUTH.sum()


def test_what_files_do_to_masks(tmp_path):
    Image.fromarray(levels(1)).save(tmp_path / "classes.jpg")  # most of its ones are kept, and some are not
    with pytest.raises(UserError, match="0 and 1, which JPEG does not keep"):
        to_mask(tmp_path / "classes.jpg")
    objects = np.where(TRUTH, 1, np.roll(levels(2), 15, 0)).astype(np.uint8)
    two = Image.fromarray(objects)
    two.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])  # as PASCAL VOC colours instances
    two.save(tmp_path / "two.png")
    for way in (two, tmp_path / "two.png"):
        with pytest.raises(UserError, match="areas of 2 colours beside black"):
            to_mask(way)
    red = np.stack([levels(255), levels(0), levels(0)], axis=-1)
    Image.fromarray(red).save(tmp_path / "red.jpg", quality=60)
    assert (to_mask(tmp_path / "red.jpg") ^ TRUTH).mean() < 0.02


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_mask_is_turned_as_its_picture_is(tmp_path, turn):
    from scaling_perception.data.images import orientation, read_image, turned

    exif = Image.Exif()
    exif[0x0112] = turn
    stored = levels(255)
    Image.fromarray(np.repeat(stored[..., None], 3, -1)).save(tmp_path / "p.png", exif=exif)
    Image.fromarray(stored).save(tmp_path / "m.png", exif=exif)
    picture, mask = read_image(tmp_path / "p.png"), read_mask(tmp_path / "m.png")
    np.testing.assert_array_equal(picture[..., 0] > 0, mask)
    np.testing.assert_array_equal(to_mask(Image.open(tmp_path / "m.png")), mask)
    np.testing.assert_array_equal(turned(TRUTH, orientation(tmp_path / "m.png")), mask)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", upright=False), TRUTH)
