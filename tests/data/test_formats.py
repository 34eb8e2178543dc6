"""Readers and writers against independently written files, and every kind of damage."""

import struct
import zlib

import numpy as np
import pytest
from pfm import write_pfm
from PIL import Image
from safetensors.numpy import load_file

from scaling_perception.data import formats
from scaling_perception.data.masks import read_mask
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import colours


@pytest.fixture(scope="module")
def files(golden):
    return golden / "flow_files"


@pytest.fixture(scope="module")
def expected(files):
    return load_file(files / "expected.safetensors")


# Reading what independent code wrote


def test_flo_is_exact_and_unknown_is_invalid(files, expected):
    flow = formats.read_flo(files / "a.flo")
    np.testing.assert_array_equal(flow, expected["out/a_flo"])
    assert flow.dtype == np.float32
    valid = formats.flow_valid(flow)
    assert not valid[0, 0] and valid.sum() == valid.size - 1
    cleaned, known = formats.read_flow(files / "a.flo")
    np.testing.assert_array_equal(known, valid)
    assert not cleaned[0, 0].any()
    np.testing.assert_array_equal(cleaned[known], flow[known])


def test_kitti_flow_is_exact(files, expected):
    flow, valid = formats.read_kitti_flow(files / "kitti.png")
    np.testing.assert_array_equal(flow, expected["out/kitti_flow"])
    np.testing.assert_array_equal(valid, expected["out/kitti_valid"] > 0)
    assert 0 < valid.sum() < valid.size


@pytest.mark.parametrize("order", ["le", "be"])
def test_pfm_is_exact(files, expected, order):
    np.testing.assert_array_equal(formats.read_pfm(files / f"color_{order}.pfm"), expected["out/pfm_color"])
    np.testing.assert_array_equal(formats.read_pfm(files / f"gray_{order}.pfm"), expected["out/pfm_gray"])


def test_depth_png_and_ppm_are_exact(files, expected):
    stored = formats.read_png16(files / "depth16.png")
    np.testing.assert_array_equal(stored, expected["out/depth16_png"])
    assert stored.dtype == np.uint16 and stored.max() > 255
    np.testing.assert_allclose(formats.read_depth(files / "depth16.png"), stored / 1000, rtol=1e-6)
    np.testing.assert_allclose(formats.read_depth(files / "depth16.png", 256), stored / 256, rtol=1e-6)
    np.testing.assert_array_equal(formats.read_image(files / "img.ppm"), expected["out/img_ppm"])


@pytest.mark.parametrize("order", [(2, 1, 0), (0, 2, 1)])
def test_kitti_flow_in_another_order_of_channels_is_refused(tmp_path, order):
    flow = np.stack(np.meshgrid(np.linspace(-3, 3, 6), np.linspace(-1, 1, 4)), axis=-1)
    formats.write_kitti_flow(tmp_path / "x.png", flow)
    stored = formats.read_png16(tmp_path / "x.png")
    formats.write_png16(tmp_path / "x.png", stored[..., order])
    with pytest.raises(UserError, match=r"x.png is no KITTI flow: its third channel must be 0 or 1 .*BGR"):
        formats.read_flow(tmp_path / "x.png")


def test_kitti_fixture_gives_the_published_error(shared_dir):
    folder = shared_dir / "data" / "kitti_devkit"
    truth, known = formats.read_kitti_flow(folder / "flow_gt.png")
    estimate, also = formats.read_kitti_flow(folder / "flow_est.png")
    error = np.linalg.norm(estimate.astype(np.float64) - truth, axis=-1)[known & also]
    assert abs(error.mean() - 12.2007) < 1e-4


# Writing and reading back


def test_flow_round_trips(tmp_path):
    flow = np.random.default_rng(0).normal(scale=40, size=(9, 14, 2)).astype(np.float32)
    formats.write_flo(tmp_path / "x.flo", flow)
    np.testing.assert_array_equal(formats.read_flo(tmp_path / "x.flo"), flow)
    flow[2, 3] = np.nan
    flow[4, 5] = 1e10
    formats.write_kitti_flow(tmp_path / "x.png", flow)
    out, valid = formats.read_kitti_flow(tmp_path / "x.png")
    assert not valid[2, 3] and not valid[4, 5] and valid.sum() == valid.size - 2
    np.testing.assert_allclose(out[valid], flow[valid], atol=1 / 128 + 1e-6)
    np.save(tmp_path / "x.npy", flow)
    for name in ("x.png", "x.npy"):
        cleaned, valid = formats.read_flow(tmp_path / name)
        assert np.isfinite(cleaned).all() and not cleaned[~valid].any() and (~valid).sum() == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.flo", "x.npy", "x.png"]  # no temporary is left


def test_kitti_flow_saturates_instead_of_wrapping(tmp_path):
    formats.write_kitti_flow(tmp_path / "x.png", np.full((2, 2, 2), (900.0, -900.0)))
    flow, valid = formats.read_kitti_flow(tmp_path / "x.png")
    assert valid.all() and (flow[..., 0] == (65535 - 32768) / 64).all() and (flow[..., 1] == -512).all()


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3), (1, 1)])
def test_pfm_round_trips(tmp_path, shape):
    array = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    write_pfm(tmp_path / "x.pfm", array)
    np.testing.assert_array_equal(formats.read_pfm(tmp_path / "x.pfm"), array)


@pytest.mark.parametrize("shape", [(40, 61), (40, 61, 3), (1, 1, 3)])
def test_png16_keeps_all_bits(tmp_path, shape):
    array = np.random.default_rng(2).integers(0, 65536, shape, dtype=np.uint16)
    formats.write_png16(tmp_path / "x.png", array)
    np.testing.assert_array_equal(formats.read_png16(tmp_path / "x.png"), array)


@pytest.mark.parametrize("interlaced", [0, 1])
def test_png16_reads_every_filter(tmp_path, interlaced):
    """A 16-bit RGB PNG with each of the five row filters, and one with Adam7 passes, built by hand."""
    rng = np.random.default_rng(3)
    array = rng.integers(0, 65536, (8, 8, 3), dtype=np.uint16)
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    data = b""
    for y, x, dy, dx in passes:
        part = array[y::dy, x::dx]
        rows = np.ascontiguousarray(part, ">u2").view(np.uint8).reshape(len(part), -1).astype(int)
        for i, row in enumerate(rows):
            kind = i % 5
            left = np.concatenate([np.zeros(6, int), row[:-6]])
            up = rows[i - 1] if i else np.zeros_like(row)
            corner = np.concatenate([np.zeros(6, int), up[:-6]])
            guess = left + up - corner
            away = np.abs(np.stack([guess - left, guess - up, guess - corner]))
            paeth = np.choose(away.argmin(axis=0), [left, up, corner])
            predicted = (np.zeros_like(row), left, up, (left + up) // 2, paeth)[kind]
            data += bytes([kind]) + ((row - predicted) % 256).astype(np.uint8).tobytes()
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, interlaced)
    with open(tmp_path / "x.png", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))
    np.testing.assert_array_equal(formats.read_png16(tmp_path / "x.png"), array)


def test_depth_png_round_trips_and_never_wraps(tmp_path):
    depth = np.array([[0.001, 1.2345, 65.0], [np.nan, np.inf, -3.0], [70.0, 0.0, 2.0]])
    formats.write_depth_png(tmp_path / "d.png", depth)
    out = formats.read_depth(tmp_path / "d.png")
    np.testing.assert_allclose(out, [[0.001, 1.234, 65.0], [0, 0, 0], [65.535, 0, 2.0]], atol=6e-4)


def test_float_depth_is_metres(tmp_path):
    depth = np.random.default_rng(4).uniform(1, 90, (6, 7)).astype(np.float32)
    np.save(tmp_path / "d.npy", depth)
    write_pfm(tmp_path / "d.pfm", depth)
    np.testing.assert_array_equal(formats.read_depth(tmp_path / "d.npy"), depth)
    np.testing.assert_array_equal(formats.read_depth(tmp_path / "d.pfm"), depth)
    np.testing.assert_allclose(formats.read_depth(tmp_path / "d.npy", 10), depth / 10, rtol=1e-6)


@pytest.mark.parametrize(
    ("write", "array"),
    [
        (formats.write_flo, np.zeros((3, 3))),
        (formats.write_png16, np.zeros((3, 3), np.uint8)),
    ],
)
def test_writers_refuse_other_shapes(tmp_path, write, array):
    with pytest.raises(ValueError, match="expected"):
        write(tmp_path / "x", array)
    assert not list(tmp_path.iterdir())


# Damage: one line that names the file


def refuse(read, path, words):
    with pytest.raises(UserError, match=words) as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.flo", "kitti.png", "color_le.pfm", "gray_be.pfm"])
@pytest.mark.parametrize("kept", [0, 3, 11, 60, 500, -1])
def test_truncated_flow_files(files, tmp_path, name, kept):
    data = (files / name).read_bytes()
    (tmp_path / name).write_bytes(data[:kept])
    if kept == -1 and name.endswith("png"):
        return  # the last byte is the checksum of an empty chunk: every pixel is there
    refuse(formats.read_flow, tmp_path / name, "cut short|no .pfm|no image")


@pytest.mark.parametrize("name", ["a.flo", "color_le.pfm"])
def test_files_that_are_too_long(files, tmp_path, name):
    (tmp_path / name).write_bytes((files / name).read_bytes() + b"xy")
    refuse(formats.read_flow, tmp_path / name, "bytes where 17x13 needs")


def test_wrong_magic_and_sizes(files, tmp_path):
    data = (files / "a.flo").read_bytes()
    path = tmp_path / "x.flo"
    path.write_bytes(b"PIEX" + data[4:])
    refuse(formats.read_flo, path, "no .flo file")
    for width, height in ((-17, -13), (0, 13), (17, -1)):  # of the first the product fits the length
        path.write_bytes(data[:4] + struct.pack("<ii", width, height) + data[12:])
        refuse(formats.read_flo, path, f"no .flo file .its header says {width} x {height} pixels")
    path.write_bytes(data[:4] + struct.pack("<ii", 10**9, 10**9) + data[12:])  # must not allocate
    refuse(formats.read_flo, path, "needs")
    (tmp_path / "x.pfm").write_bytes(b"P6\n3 3\n255\n" + bytes(27))
    refuse(formats.read_pfm, tmp_path / "x.pfm", "no .pfm file")
    (tmp_path / "y.pfm").write_bytes(b"Pf\n3 3\n-e\n" + bytes(36))
    refuse(formats.read_pfm, tmp_path / "y.pfm", "no .pfm file")


def test_missing_folders_and_suffixes(tmp_path):
    for read in (formats.read_flo, formats.read_pfm, formats.read_image, read_mask, formats.read_png16):
        refuse(read, tmp_path / "nothing", "does not exist")
        refuse(read, tmp_path, "is a folder")
    refuse(formats.read_flow, tmp_path / "x.jpg", "unknown flow format '.jpg'")
    refuse(formats.read_depth, tmp_path / "x.jpg", "unknown depth format '.jpg'")
    refuse(formats.read_depth, tmp_path / "x.npy", "does not exist")


def test_numpy_files_must_hold_numbers(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], object), allow_pickle=True)
    refuse(formats.read_depth, tmp_path / "x.npy", "no whole .npy file")
    np.save(tmp_path / "y.npy", np.zeros((4, 4, 3)))
    refuse(formats.read_depth, tmp_path / "y.npy", "one channel")
    np.save(tmp_path / "z.npy", np.zeros((4, 4)))
    refuse(formats.read_flow, tmp_path / "z.npy", "flow needs")
    (tmp_path / "w.npy").write_bytes((tmp_path / "z.npy").read_bytes()[:100])
    refuse(formats.read_depth, tmp_path / "w.npy", "no whole .npy file")


@pytest.mark.parametrize("suffix", ["png", "jpg", "ppm"])
def test_damaged_pictures(tmp_path, suffix):
    noise = np.random.default_rng(5).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = tmp_path / f"x.{suffix}"
    formats.write_image(path, noise)
    whole = path.read_bytes()
    assert formats.read_image(path).shape == (40, 40, 3)
    for kept in (0, 5, 20, len(whole) // 2):
        path.write_bytes(whole[:kept])
        refuse(formats.read_image, path, "cut short|damaged|no image")
    if suffix == "png":
        path.write_bytes(whole[:60] + bytes(200) + whole[260:])
        refuse(formats.read_image, path, "damaged")
    path.write_text("hello")
    refuse(formats.read_image, path, "no image")


def test_depth_needs_a_grey_png(tmp_path):
    formats.write_image(tmp_path / "rgb.png", np.zeros((4, 4, 3), np.uint8))
    refuse(formats.read_depth, tmp_path / "rgb.png", "a PNG picture of RGB")
    formats.write_png16(tmp_path / "rgb16.png", np.zeros((4, 4, 3), np.uint16))
    refuse(formats.read_depth, tmp_path / "rgb16.png", "one channel")
    formats.write_png16(tmp_path / "grey.png", np.zeros((4, 4), np.uint16))
    refuse(formats.read_kitti_flow, tmp_path / "grey.png", "one channel")
    Image.new("L", (4, 4), 3).save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").rename(tmp_path / "jpg.png")
    refuse(formats.read_depth, tmp_path / "jpg.png", "a JPEG picture")
    Image.new("L", (4, 4), 200).save(tmp_path / "eight.png")
    assert (formats.read_depth(tmp_path / "eight.png", 100) == 2).all()  # 8-bit grey is taken as its numbers


# Kinds of pictures


def test_every_pixel_kind_becomes_rgb(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "l.png")
    Image.fromarray(grey).convert("1").save(tmp_path / "1.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    formats.write_png16(tmp_path / "rgb16.png", np.repeat((grey.astype(np.uint16) * 257)[..., None], 3, -1))
    for name in ("l", "16", "rgb16"):
        out = formats.read_image(tmp_path / f"{name}.png")
        assert out.dtype == np.uint8
        np.testing.assert_array_equal(out, np.repeat(grey[..., None], 3, -1))
    assert set(np.unique(formats.read_image(tmp_path / "1.png"))) == {0, 255}
    colours = np.random.default_rng(6).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    palette = Image.fromarray(colours // 128 * 255).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(formats.read_image(tmp_path / "p.png"), colours // 128 * 255)
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "cmyk.jpg")
    cyan = formats.read_image(tmp_path / "cmyk.jpg")
    assert cyan.shape == (8, 8, 3) and cyan[..., 0].max() < 40 and cyan[..., 1:].min() > 200


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:2, :, 3] = 255
    rgba[2, :, 3] = 128
    Image.fromarray(rgba).save(tmp_path / "x.png")
    out = formats.read_image(tmp_path / "x.png")
    assert (out[:2] == (200, 0, 0)).all() and (out[3] == 255).all()
    np.testing.assert_allclose(out[2, 0], [227, 127, 127], atol=2)
    Image.fromarray(rgba[..., [0, 3]]).save(tmp_path / "la.png")
    assert (formats.read_image(tmp_path / "la.png")[3] == 255).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert formats.read_image(tmp_path / "p.png")[0].tolist() == [[255, 255, 255], [9, 9, 9]]


def test_orientation_is_applied(tmp_path):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif, quality=95)
    out = formats.read_image(tmp_path / "x.jpg")
    assert out.shape == (24, 8, 3) and out[:6].min() > 200 and out[10:].max() < 60
    stored = formats.read_image(tmp_path / "x.jpg", upright=False)
    assert stored.shape == (8, 24, 3) and stored[:, :6].min() > 200 and stored[:, 10:].max() < 60
    assert formats.image_size(tmp_path / "x.jpg") == (8, 24)
    (tmp_path / "y.jpg").write_bytes(b"none")
    refuse(formats.image_size, tmp_path / "y.jpg", "is no image")
    refuse(formats.image_size, tmp_path / "z.jpg", "does not exist")


def test_raw_depth_is_as_long_as_its_picture(tmp_path):
    depth = np.arange(12, dtype="<f4").reshape(3, 4)
    depth[0, 0] = np.inf
    (tmp_path / "a.JPG").write_bytes(depth.tobytes())
    out = formats.read_raw_depth(tmp_path / "a.JPG", (3, 4))
    np.testing.assert_array_equal(out, depth)
    assert out.dtype == np.float32 and out.flags.writeable
    with pytest.raises(UserError, match="48 bytes where float32 of 3x3 needs 36"):
        formats.read_raw_depth(tmp_path / "a.JPG", (3, 3))


def test_float_pictures_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tiff")
    refuse(formats.read_image, tmp_path / "f.tiff", "32-bit pixels")


def test_masks_of_every_kind(tmp_path):
    truth = np.random.default_rng(7).random((9, 11)) < 0.4
    pictures = {
        "grey": Image.fromarray(truth.astype(np.uint8) * 255),
        "soft": Image.fromarray(np.where(truth, 180, 90).astype(np.uint8)),
        "zero_one": Image.fromarray(truth.astype(np.uint8)),
        "rgb": Image.fromarray(np.where(truth[..., None], (255, 0, 0), (0, 0, 0)).astype(np.uint8)),
        "one_bit": Image.fromarray(truth),
        "sixteen": Image.fromarray(truth.astype(np.uint16) * 65535),
        "opaque": Image.fromarray(truth.astype(np.uint8) * 255).convert("RGBA"),
    }
    palette = Image.fromarray(truth.astype(np.uint8) * 3)
    palette.putpalette([0, 0, 0, 1, 1, 1, 2, 2, 2, 128, 0, 0])  # a dark red class, as in VOC
    pictures["palette"] = palette
    for name, image in pictures.items():
        image.save(tmp_path / f"{name}.png")
        out = read_mask(tmp_path / f"{name}.png")
        assert out.dtype == bool
        np.testing.assert_array_equal(out, truth, err_msg=name)
    Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    refuse(read_mask, tmp_path / "clear.png", "transparency")
    for kind in (bool, np.uint8, np.float64):
        np.save(tmp_path / "m.npy", truth[..., None].astype(kind))
        np.testing.assert_array_equal(read_mask(tmp_path / "m.npy"), truth)
    np.save(tmp_path / "m.npy", np.zeros((4, 4, 2)))
    refuse(read_mask, tmp_path / "m.npy", "one channel")
    Image.new("L", (4, 4), 0).save(tmp_path / "empty.png")
    assert not read_mask(tmp_path / "empty.png").any()


# Colours


def close_levels(ours, theirs):
    assert ours.dtype == np.uint8 and ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_flow_colours_equal_raft(files):
    arrays = load_file(files / "colours.safetensors")
    flow = np.stack([arrays["in/gt_x"], arrays["in/gt_y"]], axis=-1)
    close_levels(formats.flow_to_color(flow), arrays["out/raft_color"])
    close_levels(formats.flow_to_color(flow, max_flow=5), arrays["out/raft_uv_to_colors_raw"])
    assert (np.linalg.norm(flow, axis=-1) > 5).any()  # the darkened branch is covered
    close_levels(colours._colour_wheel().astype(np.uint8), arrays["out/raft_colorwheel"].astype(np.uint8))


def test_flow_colours_of_odd_fields():
    assert (formats.flow_to_color(np.zeros((3, 4, 2))) == 255).all()  # no motion is white
    flow = np.full((3, 4, 2), 2.0)
    flow[0, 0], flow[1, 1] = 1e10, np.nan
    out = formats.flow_to_color(flow)
    assert not out[0, 0].any() and not out[1, 1].any() and out[2, 2].any()
    assert not formats.flow_to_color(flow, valid=np.zeros((3, 4), bool)).any()


def test_depth_colours_equal_the_authors(golden):
    arrays = load_file(golden / "tasks" / "depth_normaliser.safetensors")
    out = formats.depth_to_color(arrays["out/scale_back"][0])
    theirs = np.moveaxis(arrays["out/spectral_uint8"], 0, -1)
    wrong = (np.abs(out.astype(int) - theirs) > 1).any(axis=-1)
    assert wrong.mean() < 0.005  # pixels on the edge of a table entry
    valid = arrays["in/valid_mask"][0]
    assert not formats.depth_to_color(arrays["out/scale_back"][0], valid)[~valid].any()
    assert not formats.depth_to_color(np.array([[np.nan, 0.5]]))[0, 0].any()
