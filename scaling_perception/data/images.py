"""Pictures as uint8 RGB, from files, Pillow and arrays; one line on what is wrong with those that cannot be read."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from scaling_perception.support.errors import UserError
from scaling_perception.support.files import atomic_path

AGAIN = "copy or download it again"
FilePath = str | os.PathLike[str]

MAX_PIXELS_VARIABLE = "SCALING_PERCEPTION_MAX_PIXELS"
_MAX_PIXELS = 2 * 89_478_485  # where Pillow, too, stops taking a small file for a picture (decompression bombs)
_ORIENTATION = 0x0112  # EXIF
_BITS, _PLANAR = 258, 284  # TIFF: bits of each channel; 2: channels one after the other
_TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")
_ROUNDING = 1e-3  # how far beyond [0, 1] resizing brings a float of a picture: less than a step of 8 bits

# Pillow opens these only to say what they are, or with programs that are not there.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

# Pillow opens some of these as TIFF, and finds the small picture that the camera put in for its screen.
_RAW = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mrw", ".nef", ".nrw", ".orf"),
    *(".pef", ".raf", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
)

# Modes of 16 bits a channel of which Pillow keeps the upper 8.
_DEEP = {f"{mode};16{order}" for mode in ("RGB", "RGBA", "RGBX", "RGBa", *"RGBA") for order in "BLN"} | {"LA;16B"}

# First bytes of what people take for a picture that can be read here: (offset, bytes, name, what to do).
_SAVE = "save it as PNG or JPEG"
_KINDS = (
    (0, b"\xff\x0a", "a JPEG XL picture", _SAVE),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL picture", _SAVE),
    (0, b"v/1\x01", "an OpenEXR picture", "save it as PNG, or depth as .npy"),
    (0, b"#?RADIANCE", "a Radiance HDR picture", _SAVE),
    (0, b"%PDF", "a PDF", "save its pages as PNG or JPEG"),
    (0, b"<svg", "an SVG drawing", _SAVE),
    (0, b"<?xml", "an XML file (SVG?)", _SAVE),
    (0, b"<!DOCTYPE", "a web page, not a picture", "download the picture itself"),
    (0, b"<html", "a web page, not a picture", "download the picture itself"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the picture", "run git lfs pull"),
    (0, b"\x1aE\xdf\xa3", "a video", "give it the suffix of a video (.mkv, .webm)"),
    (0, b"\x93NUMPY", "a numpy array", "save the picture as PNG"),
    (0, b"\x89HDF", "an HDF5 file", _SAVE),
    (0, b"8BPS", "a Photoshop document", _SAVE),
    (128, b"DICM", "a DICOM file", _SAVE),
    (8, b"AVI ", "a video", "give it the suffix of a video (.avi)"),
    (8, b"WAVE", "a sound", "give a picture"),
    (0, b"Rar!", "a RAR archive", "unpack it"),
    (0, b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (0, b"PK\x03\x04", "a zip archive", "unpack it"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it"),
)
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@functools.cache
def suffixes() -> tuple[str, ...]:
    """Suffixes (lower case, with the dot) of the pictures that Pillow decodes here, the usual ones first.

    ``.heic`` is among them, because it is a picture to the person who names it. ``.pfm`` is not: those are maps.
    """
    Image.init()
    opened = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in _NOT_DECODED}
    usual = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
    more = (opened | {".heic", ".heif", ".avif"}) - {".pfm", *usual}
    return (*usual, *sorted(more))


@contextlib.contextmanager
def file_errors(path: FilePath) -> Iterator[None]:
    """Turn what the operating system says of a file that cannot be read into a ``UserError``."""
    if "\0" in os.fsdecode(path):
        raise UserError(f"{os.fsdecode(path)!r} holds a zero byte, which no path can: check the path")
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a file: check the path") from None
    except PermissionError:
        raise UserError(f"{path} cannot be read: give yourself permission to read it") from None
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EINVAL):
            raise
        raise UserError(f"{path} does not exist and cannot ({error.strerror}): check the path") from None


# Opening

_opening = threading.Lock()


def _open_header(path: FilePath) -> Image.Image:
    """``Image.open`` without Pillow's own limit, which is a warning first and names no file."""
    with _opening:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _max_pixels() -> int:
    text = os.environ.get(MAX_PIXELS_VARIABLE, "")
    if not text:
        return _MAX_PIXELS
    if not text.isdecimal() or not int(text):
        raise UserError(f"{MAX_PIXELS_VARIABLE} is '{text}': give a number of pixels above 0")
    return int(text)


@contextlib.contextmanager
def open_image(path: FilePath, prepare: Any = None) -> Iterator[Image.Image]:
    """A loaded Pillow image; whatever Pillow raises becomes one ``UserError`` that says which kind of fault it is.

    Args:
        prepare: called with the image before its pixels are decoded.
    """
    with file_errors(path):
        _register_heif(path)
        try:
            image = _open_header(path)
        except OSError as error:
            if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
                raise
            raise _not_opened(path, error) from None
        except Exception as error:
            raise UserError(f"{path} is a damaged image ({error}): {AGAIN}") from None
        with image:
            if image.format in _NOT_DECODED:
                raise UserError(f"{path} is of the kind {image.format}, which is not read here: {_SAVE}")
            if Path(path).suffix.lower() in _RAW:
                raise UserError(f"{path} is a camera's raw picture, which is not read here: {_SAVE}")
            if image.width * image.height > (most := _max_pixels()):
                size = f"{image.width * image.height} pixels ({image.width}x{image.height})"
                raise UserError(
                    f"{path} is too large: {size}, more than {most}: make it smaller, or set {MAX_PIXELS_VARIABLE}"
                )
            try:
                if prepare is not None:
                    prepare(image)
                image.load()
            except MemoryError:
                raise UserError(
                    f"{path} ({image.width}x{image.height}) does not fit the memory: make it smaller"
                ) from None
            except Exception as error:
                raise UserError(f"{path} is cut short or damaged ({error}): {AGAIN}") from None
            yield image


def _first_bytes(path: FilePath) -> bytes:
    with open(path, "rb") as file:
        return file.read(256)


def _is_heif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF


def _register_heif(path: FilePath) -> None:
    """Let Pillow open HEIC where the package pillow-heif is installed."""
    if not _is_heif(_first_bytes(path)) or "HEIF" in Image.OPEN:
        return
    with contextlib.suppress(ImportError):
        import pillow_heif  # pyright: ignore[reportMissingImports]

        pillow_heif.register_heif_opener()


def _not_opened(path: FilePath, error: OSError) -> UserError:
    """What is wrong with a file whose first bytes Pillow does not take for a picture."""
    head = _first_bytes(path)
    if not head:
        return UserError(f"{path} is cut short (it has 0 bytes): {AGAIN}")
    if Path(path).suffix.lower() in _RAW:
        return UserError(f"{path} is a camera's raw picture, which is not read here: {_SAVE}")
    if _is_heif(head):
        return UserError(f"{path} is a HEIC picture: pip install pillow-heif, or save it as JPEG")
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return UserError(f"{path} is an AVIF picture, damaged or more than this Pillow reads: save it as JPEG")
    if head[4:8] == b"ftyp":
        return UserError(f"{path} is a video or audio file: give a video its own suffix (.mp4, .mov)")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    head = text if text[:1] == b"<" else head
    for offset, magic, name, mending in _KINDS:
        if head[offset : offset + len(magic)].lower() == magic.lower():
            return UserError(f"{path} is {name}, which is not read here: {mending}")
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        kind = "of a kind (bit depth, channels or compression) that is not read here"
        return UserError(f"{path} is a TIFF {kind}: save it with 8 bits a channel")
    if head[:4] == b"\x89PNG" or head[:3] == b"\xff\xd8\xff" or head[:4] in (b"GIF8", b"RIFF"):
        return UserError(f"{path} is cut short or damaged: {AGAIN}")
    return UserError(f"{path} is no image, by its first bytes: check the file")


def image_size(path: FilePath) -> tuple[int, int]:
    """(H, W) of a picture as it is stored, from its header alone."""
    with file_errors(path):
        _register_heif(path)
        try:
            with _open_header(path) as image:
                return image.height, image.width
        except (FileNotFoundError, IsADirectoryError, PermissionError):
            raise
        except OSError as error:
            raise _not_opened(path, error) from None
        except Exception as error:
            raise UserError(f"{path} is a damaged image ({error}): {AGAIN}") from None


def orientation(path: FilePath) -> int:
    """A picture's EXIF orientation, 1 to 8; 1 (upright) where it has none, or is no picture at all."""
    try:
        with _open_header(path) as image:
            return _orientation_of(image)
    except Exception:
        return 1


def _orientation_of(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block must not cost a sound picture
        return 1
    return found if found in range(1, 9) else 1


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """An array (H, W, ...) as ``set_upright`` turns a picture of that EXIF orientation (1 to 8)."""
    if orientation in (5, 6, 7, 8):
        array = np.swapaxes(array, 0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return array[::rows, ::columns]


def set_upright(image: Image.Image) -> Image.Image:
    """The picture turned and mirrored as its EXIF orientation says."""
    if _orientation_of(image) == 1:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


# To uint8 RGB


@dataclasses.dataclass
class BitDepth:
    """How many of 16 bits are cut off, so that pictures that are compared can be brought to 8 bits alike.

    Attributes:
        least: cut off at least so many. found: as many as the picture's own values ask for; None where it has 8 bits.
    """

    least: int = 0
    found: int | None = None


def read_image(path: FilePath, upright: bool = True, depth: BitDepth | None = None) -> np.ndarray:
    """Any ordinary picture as uint8 RGB (H, W, 3).

    Grey is repeated, palettes and CMYK are converted, 16 bits are brought to 8 (see ``to_8_bits``), transparency is
    laid on white (as the whole-object pictures are), of an animation the first frame is taken. The EXIF orientation is
    applied, unless ``upright`` is False: pixels as they are stored, which is how the truth of a data set lies on them.
    ``depth``: of pictures of 16 bits, see ``BitDepth``.

    Raises:
        UserError: missing, too large, of a kind that is not read, no picture, damaged, or of 32-bit pixels (whose
            range nobody can know).
    """
    stored_as: list[str] = []
    tiles: list[Any] = []

    def prepare(image: Any) -> None:
        _name_planes_of_16_bits(image)
        stored_as.extend(_raw_modes(image))
        tiles.extend(getattr(image, "tile", ()))

    with open_image(path, prepare) as image:
        turn = _orientation_of(image) if upright else 1
        stored = _stored_bits(path, image, stored_as, tiles)
        if stored is None:
            pixels = _pixels(image, upright, str(path), depth)
            grey = image.mode[:4] in ("I", "I;16")
            if pixels.max(initial=0) < 64 and any(";16" in one for one in stored_as) and not grey:
                raise UserError(
                    f"{path} uses few of its 16 bits a channel, a kind of {image.format} that is not read here: "
                    "save it with 8 bits, or as a 16-bit PNG"
                )
            return pixels
    if stored.shape[-1] in (1, 3):
        out = np.broadcast_to(to_8_bits(stored, depth), (*stored.shape[:2], 3))
        return np.ascontiguousarray(turned(out, turn))
    stored = np.concatenate([to_8_bits(stored[..., :-1], depth), to_8_bits(stored[..., -1:])], axis=-1)
    if stored.shape[-1] == 2:
        stored = stored[..., [0, 0, 0, 1]]
    if stored_as and stored_as[0].startswith("RGBa"):  # the colours are multiplied by the alpha: on white it is a sum
        return np.ascontiguousarray(
            turned(np.minimum(stored[..., :3] + (255 - stored[..., 3:].astype(int)), 255).astype(np.uint8), turn)
        )
    return from_array(turned(stored, turn))


def _stored_bits(path: FilePath, image: Any, stored_as: list[str], tiles: list[Any]) -> np.ndarray | None:
    """uint16 (H, W, 1 to 4) of the pictures of 16 bits a channel of which Pillow gives 8; None of all others."""
    size = (image.height, image.width)
    if image.format == "PPM" and image.mode == "RGB" and tiles[0][3] == ("RGB", 65535):
        count = 3 * image.width * image.height
        if tiles[0][0] == "ppm":
            return np.fromfile(path, ">u2", count, offset=tiles[0][2]).reshape(*size, 3)
        text = re.sub(rb"#[^\r\n]*", b"", Path(path).read_bytes()[tiles[0][2] :])
        return np.array(text.split()[:count], np.uint16).reshape(*size, 3)
    if image.format == "SGI" and tiles[0][0] == "SGI16":
        words = np.fromfile(path, ">u2", len(image.mode) * image.width * image.height, offset=512)
        return np.moveaxis(words.reshape(len(image.mode), *size)[:, ::-1], 0, -1)
    if image.format not in ("PNG", "TIFF") or not stored_as or not _DEEP.issuperset(stored_as):
        return None
    if stored_as[0] == "LA;16B":
        with open_image(path, lambda image: _take_as(image, "RGBA")) as image:  # its four bytes, as they are
            return np.asarray(image).copy().view(">u2")
    if stored_as[0].startswith("RGBa"):
        return _all_bits(path, "RGBA" + stored_as[0][4:])
    if tiles[0][0] == "libtiff" and image.tag_v2.get(_PLANAR) == 2:  # whose byte order is not ours to choose
        return None
    return _all_bits(path)


def from_pil(image: Image.Image, name: str = "the picture", depth: BitDepth | None = None) -> np.ndarray:
    """A Pillow picture of any mode as uint8 RGB (H, W, 3), by the rules of ``read_image``."""
    return _pixels(image, True, name, depth)


def _pixels(image: Image.Image, upright: bool, name: str, depth: BitDepth | None) -> np.ndarray:
    deep = (image.mode == "I" and image.format == "PPM") or image.mode.startswith("I;16")  # PGM is scaled to 16 bits
    image = set_upright(image) if upright else image
    if deep:
        stored = np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
        return np.repeat(to_8_bits(stored, depth)[..., None], 3, axis=-1)
    if image.mode in ("I", "F"):
        raise UserError(f"{name} has 32-bit pixels ({image.mode}): save it as an 8-bit or 16-bit picture")
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def to_8_bits(stored: np.ndarray, depth: BitDepth | None = None) -> np.ndarray:
    """uint16 of any shape to uint8: the upper 8 of the bits that the picture uses.

    Cameras and microscopes write 8, 10, 12 or 14 bits into files of 16 without saying so. A picture whose largest value
    is below 256, 1024, 4096 or 16384 is taken for one of these; as one of 16 bits it would be nearly black.
    """
    top = int(stored.max(initial=0))
    shift = next((bits - 8 for bits in (8, 10, 12, 14) if top < 1 << bits), 8)
    if depth is not None:
        depth.found, shift = shift, max(shift, depth.least)
    return (stored >> shift).astype(np.uint8)


def from_array(array: np.ndarray, depth: BitDepth | None = None) -> np.ndarray:
    """A picture in an array as uint8 RGB (H, W, 3).

    Args:
        array: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16 (see ``to_8_bits``), bool, or float in
            [0, 1], which rounding may leave by a thousandth. Transparency is laid on white.

    Raises:
        UserError: another shape, type or range.
    """
    shape = array.shape
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise UserError(f"image array has shape {shape}: give (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    array = _bytes_of(array, depth)
    if array.shape[-1] == 4:
        alpha = array[..., 3:].astype(np.float32) / 255
        array = np.round(array[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def _bytes_of(array: np.ndarray, depth: BitDepth | None) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return to_8_bits(array, depth)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"image array has type {array.dtype}: give uint8, uint16, or float in [0, 1]")
    low, high = float(array.min()), float(array.max())
    if not np.isfinite(array).all():
        raise UserError(f"image array of type {array.dtype} holds NaN or infinity: floats must be in [0, 1]")
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        hint = "divide by 255" if 0 <= low and 1.5 < high <= 255 else "scale it"
        hint = "take (x + 1) / 2" if -1 - _ROUNDING <= low < -0.5 and high <= 1 + _ROUNDING else hint
        raise UserError(
            f"image array of type {array.dtype} spans {low!r} to {high!r}: floats must be in [0, 1] ({hint})"
        )
    return np.round(np.clip(array, 0, 1) * 255).astype(np.uint8)


def write_image(path: FilePath, pixels: np.ndarray) -> None:
    """Write uint8 (H, W) or (H, W, 3) in the format of the suffix."""
    with atomic_path(path) as temporary:
        Image.fromarray(np.ascontiguousarray(pixels, np.uint8)).save(temporary)


# PNG of 16 bits


def read_png16(path: FilePath, eight_bits: bool = False) -> np.ndarray:
    """All 16 bits of a grey or RGB PNG.

    Args:
        eight_bits: take 8-bit grey too, as its numbers.

    Returns:
        uint16 (H, W) or (H, W, 3), pixels as they are stored.

    Raises:
        UserError: missing, damaged, or another kind of picture.
    """
    stored_as: list[str] = []
    with open_image(path, lambda image: stored_as.extend(_raw_modes(image))) as image:
        if image.format == "PNG" and (image.mode == "I;16" or (image.mode == "L" and eight_bits)):
            return np.asarray(image).astype(np.uint16)
        if image.format != "PNG" or stored_as != ["RGB;16B"]:
            kind = f"a {image.format} picture of {'8 bits' if image.mode == 'L' else image.mode}"
            grey = ", or depth_scale if it is depth in 8 bits" if image.mode == "L" else ""
            raise UserError(f"{path} is {kind}: give a 16-bit grey PNG for depth (16-bit RGB for KITTI flow){grey}")
        return _all_bits(path)


def _all_bits(path: FilePath, kind: str = "") -> np.ndarray:
    """uint16 of a picture of which Pillow gives the upper 8 bits; asked for the other byte order it gives the others.

    Args:
        kind: the raw mode to take it as, where not its own.
    """

    def prepare(image: Any) -> None:
        _name_planes_of_16_bits(image)
        if kind:
            _take_as(image, kind)

    def swapped(image: Any) -> None:
        prepare(image)
        other = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
        _set_raw_modes(image, lambda mode: mode[:-1] + other[mode[-1]])

    with open_image(path, prepare) as image:
        upper = np.asarray(image).astype(np.uint16)
    with open_image(path, swapped) as image:
        return (upper << 8) | np.asarray(image)


def _name_planes_of_16_bits(image: Any) -> None:
    """Of a TIFF whose channels lie one after the other Pillow forgets that they have 16 bits."""
    if image.format == "TIFF" and image.tag_v2.get(_PLANAR) == 2 and set(image.tag_v2.get(_BITS, ())) == {16}:
        order = "B" if image.tag_v2.prefix == b"MM" else "L"
        _set_raw_modes(image, lambda mode: f"{mode};16{order}" if len(mode) == 1 else mode)


def _take_as(image: Any, kind: str) -> None:
    _set_raw_modes(image, lambda mode: kind)


def _set_raw_modes(image: Any, change: Callable[[str], str]) -> None:
    image.tile = [
        tile._replace(args=change(tile.args) if isinstance(tile.args, str) else (change(tile.args[0]), *tile.args[1:]))
        for tile in image.tile
    ]


def _raw_modes(image: Any) -> list[str]:
    """How each tile of an image that is not loaded yet is stored; an interlaced one has further arguments."""
    args = [tile.args for tile in getattr(image, "tile", ()) if tile.args]
    return [one if isinstance(one, str) else str(one[0]) for one in args]
