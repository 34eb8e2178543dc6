"""Pictures of every bit depth, and what is said of files that are none."""

import struct

import numpy as np
import pytest
from PIL import Image

from scaling_perception.data.formats import read_depth, write_png16
from scaling_perception.data.images import MAX_PIXELS_VARIABLE, from_array, from_pil, read_image, suffixes, turned
from scaling_perception.support.errors import UserError

RAMP = np.linspace(0, 1, 24 * 30).reshape(24, 30)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["grey.png", "rgb.png", "grey.tif", "rgb.tif", "grey.pgm", "rgb.ppm", "array"])
def test_deep_pictures_use_the_whole_range(tmp_path, bits, kind):
    stored = np.round(RAMP * (2**bits - 1)).astype(np.uint16)
    stored = np.stack([stored, stored[::-1], stored], -1) if kind.startswith("rgb") else stored
    path = tmp_path / kind
    if kind == "array":
        out = from_array(stored)
    elif kind.endswith(".png"):
        write_png16(path, stored)
        out = read_image(path)
    elif kind == "rgb.tif":
        path.write_bytes(tiff_of_16_bits(stored))
        out = read_image(path)
    elif kind == "rgb.ppm":
        path.write_bytes(b"P6\n30 24\n65535\n" + stored.astype(">u2").tobytes())
        out = read_image(path)
    elif kind.endswith(".tif"):
        Image.fromarray(stored).save(path)
        out = read_image(path)
        np.testing.assert_array_equal(from_pil(Image.open(path)), out)
    else:
        path.write_bytes(b"P5\n30 24\n%d\n" % (65535 if bits == 8 else 2**bits - 1) + stored.astype(">u2").tobytes())
        out = read_image(path)
    wanted = np.round(RAMP * 255)
    assert out.shape == (24, 30, 3) and out.dtype == np.uint8
    assert np.abs(out[..., 0].astype(int) - wanted).max() <= 1
    if kind.startswith("rgb"):
        assert np.abs(out[::-1, :, 1].astype(int) - wanted).max() <= 1


def tiff_of_16_bits(stored):
    """RGB without compression, little-endian; Pillow cannot write it."""
    height, width = stored.shape[:2]
    data = stored.astype("<u2").tobytes()
    end = 8 + len(data)
    fields = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, end), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 8)]
    fields += [(277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(data))]
    entries = b"".join(struct.pack("<HHII", *field) for field in fields)
    bits = struct.pack("<HHH", 16, 16, 16)
    return b"II*\0" + struct.pack("<I", end + 6) + data + bits + struct.pack("<H", len(fields)) + entries + b"\0" * 4


def test_floats_leave_their_range_by_rounding_alone():
    picture = np.full((4, 4, 3), 0.5, np.float32)
    for value, level in ((1.0000001, 255), (-1e-8, 0), (1.0009, 255)):
        picture[0] = value
        assert (from_array(picture)[0] == level).all()
    for value, words in ((1.004, "1.00399"), (255.0, "divide by 255"), (-1.0, r"\(x \+ 1\) / 2"), (np.nan, "NaN")):
        picture[0] = value
        with pytest.raises(UserError, match=words):
            from_array(picture)


BROKEN = {
    "e.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 99, "is a HEIC picture: pip install pillow-heif"),
    "web.jpg": (b"<!doctype html><html>", "is a web page"),
    "lfs.png": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "x.exr": (b"v/1\x01" + b"\0" * 40, "is an OpenEXR picture"),
    "clip.png": (b"\0\0\0\x20ftypisom\0\0\2\0", "is a video"),
    "clip.jpg": (b"RIFF\x24\0\0\0AVI LIST" + b"\0" * 50, "is a video"),
    "page.png": (b"\xef\xbb\xbf\n <HTML>", "is a web page"),
    "x.eps": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "of the kind EPS, which is not read",
    ),
    "small.NEF": (b"MM\0*\0\0\0\x08" + b"\0" * 40, "camera's raw picture"),
    "words.png": (b"not at all a picture", "is no image"),
    "none.jpg": (b"", "0 bytes"),
    "cut.png": (b"\x89PNG\r\n\x1a\n\0\0", "damaged"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_fault_has_its_line(tmp_path, name):
    content, words = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read_image(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_the_small_picture_of_a_raw_file_is_not_taken_for_it(tmp_path):
    Image.new("RGB", (16, 12)).save(tmp_path / "x.tif")
    for name in ("x.dng", "x.ARW"):
        (tmp_path / name).write_bytes((tmp_path / "x.tif").read_bytes())
        with pytest.raises(UserError, match="camera's raw picture"):
            read_image(tmp_path / name)


def test_too_large_says_how_to_lift_the_limit(tmp_path, monkeypatch):
    path = tmp_path / "big.png"
    Image.new("1", (200, 100)).save(path)
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "19999")
    with pytest.raises(UserError, match=f"20000 pixels .200x100., more than 19999: .*{MAX_PIXELS_VARIABLE}"):
        read_image(path)
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "20000")
    assert read_image(path).shape == (100, 200, 3)
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "many")
    with pytest.raises(UserError, match=MAX_PIXELS_VARIABLE):
        read_image(path)


def test_pictures_beyond_pillows_own_limit_raise_no_warning(tmp_path):
    Image.new("1", (9500, 9500)).save(tmp_path / "wide.png")  # Pillow warns from 89 million pixels on
    from scaling_perception.data.images import image_size, open_image

    assert image_size(tmp_path / "wide.png") == (9500, 9500)
    with open_image(tmp_path / "wide.png") as image:
        assert image.size == (9500, 9500)


def test_what_pillow_opens_is_a_picture():
    assert {".jfif", ".jpe", ".avif", ".apng", ".jp2", ".heic", ".tga", ".pbm"} <= set(suffixes())
    assert not {".pfm", ".mpg", ".npy", ".eps", ".h5"} & set(suffixes())


def test_depth_in_eight_bits_must_be_asked_for(tmp_path):
    Image.fromarray((RAMP * 255).astype(np.uint8)).save(tmp_path / "d.png")
    with pytest.raises(UserError, match="8 bits.*depth_scale"):
        read_depth(tmp_path / "d.png")
    assert read_depth(tmp_path / "d.png", scale=51.0).max() == 5.0


def test_arrays_turn_as_pictures_do():
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for turn in range(1, 9):
        picture = Image.fromarray(array)
        picture.getexif()[0x0112] = turn
        np.testing.assert_array_equal(turned(array, turn), from_pil(picture)[..., 0], err_msg=str(turn))
