"""Pictures of every bit depth, and what is said of files that are none."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from scaling_perception.data.formats import read_depth
from scaling_perception.data.images import MAX_PIXELS_VARIABLE, from_array, from_pil, read_image, suffixes, turned
from scaling_perception.support.errors import UserError

RAMP = np.linspace(0, 1, 24 * 30).reshape(24, 30)


def tiff(stored, planar=1, extra=(), order="<"):
    """A TIFF of 16 bits a channel without compression; Pillow cannot write it."""
    height, width, count = stored.shape
    data = (np.moveaxis(stored, -1, 0) if planar == 2 else stored).astype(f"{order}u2").tobytes()
    parts = count if planar == 2 else 1
    places = [8 + i * (len(data) // parts) for i in range(parts)]
    fields = [(256, "H", [width]), (257, "H", [height]), (258, "H", [16] * count), (259, "H", [1]), (262, "H", [2])]
    fields += [(273, "I", places), (277, "H", [count]), (278, "H", [height]), (279, "I", [len(data) // parts] * parts)]
    fields += [(284, "H", [planar])] + ([(338, "H", list(extra))] if extra else [])
    end = 8 + len(data)
    entries, rest, after = b"", b"", end + 6 + 12 * len(fields)
    for tag, kind, values in fields:
        value = struct.pack(f"{order}{len(values)}{kind}", *values).ljust(4, b"\0")
        if len(value) > 4:
            value, rest = struct.pack(f"{order}I", after + len(rest)), rest + value
        entries += struct.pack(f"{order}HHI", tag, 3 if kind == "H" else 4, len(values)) + value
    begin = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", end)
    return begin + data + struct.pack(f"{order}H", len(fields)) + entries + bytes(4) + rest


def png(stored):
    """A PNG of 16 bits a channel, with one to four channels."""
    height, width, count = stored.shape

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[count], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in stored)
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, (b"IHDR", b"IDAT", b"IEND"), (head, zlib.compress(rows), b"")))


def ppm_of_text(stored):
    words = [" ".join(map(str, row.ravel())) for row in stored]
    return b"P3\n# 16 bits\n30 24 65535\n" + "  # a row\r\n".join(words).encode()


def sgi(stored):
    head = struct.pack(">hBBHHHHll", 474, 0, 2, 3, stored.shape[1], stored.shape[0], stored.shape[2], 0, 65535)
    return head.ljust(512, b"\0") + np.moveaxis(stored[::-1], -1, 0).astype(">u2").tobytes()


def opaque(stored):
    """With alpha, as many bits."""
    return np.concatenate([stored, np.full_like(stored[..., :1], (1 << int(stored.max()).bit_length()) - 1)], -1)


DEEP = {
    "grey.png": lambda stored, bits: png(stored[..., :1]),
    "rgb.png": lambda stored, bits: png(stored),
    "grey_alpha.png": lambda stored, bits: png(opaque(stored[..., :1])),
    "rgba.png": lambda stored, bits: png(opaque(stored)),
    "rgb.tif": lambda stored, bits: tiff(stored),
    "rgb_motorola.tif": lambda stored, bits: tiff(stored, order=">"),
    "rgb_planes.tif": lambda stored, bits: tiff(stored, planar=2),
    "rgba_planes.tif": lambda stored, bits: tiff(opaque(stored), planar=2, extra=[2], order=">"),
    "rgbx.tif": lambda stored, bits: tiff(np.concatenate([stored, stored[..., :1] // 2], -1), extra=[0]),
    "multiplied.tif": lambda stored, bits: tiff(opaque(stored), extra=[1]),
    "grey.pgm": lambda stored, bits: (
        b"P5\n30 24\n%d\n" % (65535 if bits == 8 else 2**bits - 1) + stored[..., 0].astype(">u2").tobytes()
    ),
    "rgb.ppm": lambda stored, bits: b"P6\n30 24\n65535\n" + stored.astype(">u2").tobytes(),
    "text.ppm": lambda stored, bits: ppm_of_text(stored),
    "rgb.sgi": lambda stored, bits: sgi(stored),
}


@pytest.mark.parametrize("kind", [*DEEP, "grey.tif", "array"])
def test_deep_pictures_use_the_whole_range(tmp_path, kind):
    for bits in (8, 10, 12, 14, 16):
        wanted, path = np.round(RAMP * 255), tmp_path / kind
        stored = np.round(RAMP * (2**bits - 1)).astype(np.uint16)
        if kind == "array":
            out = from_array(stored)
        elif kind == "grey.tif":
            Image.fromarray(stored).save(path)
            out = read_image(path)
            np.testing.assert_array_equal(from_pil(Image.open(path)), out)
        else:
            path.write_bytes(DEEP[kind](np.stack([stored, stored[::-1], stored], -1), bits))
            out = read_image(path)
        assert out.shape == (24, 30, 3) and out.dtype == np.uint8
        assert np.abs(out[..., 0].astype(int) - wanted).max() <= 1, bits
        flipped = out[::-1, :, 1] if not kind.startswith(("grey", "array")) else out[..., 1]
        assert np.abs(flipped.astype(int) - wanted).max() <= 1, bits


@pytest.mark.parametrize("kind", ["grey_alpha.png", "rgba.png", "rgba_planes.tif", "multiplied.tif"])
def test_deep_transparency_is_laid_on_white(tmp_path, kind):
    alpha, colour = RAMP * 0.5, np.stack([RAMP, RAMP, RAMP], -1)
    shown = colour * alpha[..., None] if kind == "multiplied.tif" else colour
    stored = np.round(np.concatenate([shown, alpha[..., None]], -1) * 65535).astype(np.uint16)
    stored = stored[..., 2:] if kind == "grey_alpha.png" else stored
    extra = [1] if kind == "multiplied.tif" else [2]
    data = png(stored) if kind.endswith("png") else tiff(stored, 2 if "planes" in kind else 1, extra)
    (tmp_path / kind).write_bytes(data)
    wanted = 255 * (colour * alpha[..., None] + 1 - alpha[..., None])
    assert np.abs(read_image(tmp_path / kind) - wanted).max() <= 2


def test_few_bits_of_16_that_cannot_be_read_are_refused(tmp_path):
    stored = np.round(np.stack([RAMP] * 3, -1) * 4095).astype(np.uint16)
    rows = np.moveaxis(stored[::-1], -1, 0).reshape(-1, 30).astype(">u2")  # of SGI, each a run of its own
    packed = [struct.pack(">H", 0x80 | 30) + row.tobytes() + b"\0\0" for row in rows]
    places = np.cumsum([512 + 8 * len(rows)] + [len(row) for row in packed])
    head = struct.pack(">hBBHHHHll", 474, 1, 2, 3, 30, 24, 3, 0, 65535).ljust(512, b"\0")
    tables = places[:-1].astype(">u4").tobytes() + np.diff(places).astype(">u4").tobytes()
    (tmp_path / "x.sgi").write_bytes(head + tables + b"".join(packed))
    with pytest.raises(UserError, match="x.sgi uses few of its 16 bits a channel, a kind of SGI"):
        read_image(tmp_path / "x.sgi")


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
