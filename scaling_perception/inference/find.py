"""Which pictures a person means: files, folders, globs, lists and videos, and a name for each of their results."""

import collections
import glob
import hashlib
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scaling_perception.data.images import suffixes
from scaling_perception.inference.video import is_video, require_pyav, survey
from scaling_perception.support.errors import UserError
from scaling_perception.support.tables import decode
from scaling_perception.tasks import get_task

_OF_WHAT = r"(?:(?P<part>visible|modal|whole|amodal)[_\-. ]?)?(?:mask|segmentation|seg|matte)s?"
_MASK_NAME = re.compile(
    rf"(?P<picture>.+?)[_\-. ]{_OF_WHAT}[_\-. ]?\d*|{_OF_WHAT.replace('part', 'which')}[_\-. ](?P<named>.+)",
    re.IGNORECASE,
)


class Picture(NamedTuple):
    """A picture file, or one frame of a video file."""

    path: Path
    frame: int | None = None  # of a video, from 0
    folder: str = ""  # where it was found below the folder that was searched; its results go likewise below --out
    fault: str = ""  # why there is none; said when it is to be read, so that the others go on

    @property
    def stem(self) -> str:
        """The file's name without suffix, with the frame's number."""
        return self.path.stem if self.frame is None else f"{self.path.stem}_{self.frame:06d}"

    @property
    def place(self) -> tuple[str, int | None]:
        """Absolute path and frame: what two pictures differ by."""
        return os.path.abspath(self.path), self.frame

    def __str__(self) -> str:
        return str(self.path) if self.frame is None else f"{self.path} frame {self.frame}"


class Item(NamedTuple):
    """One prediction to make."""

    name: str  # of its files, without suffix; with the folder below --out
    inputs: tuple[Picture, ...]  # image, and for flow the second frame, for amodal the mask


class Search(NamedTuple):
    """How folders, globs and videos are gone through."""

    recursive: bool = False
    every: int = 1  # of the pictures of each folder, glob or video every so many,
    start: int = 0  # from this one,
    end: int | None = None  # up to and without this one
    out: Path | None = None  # results are no inputs

    def check(self) -> "Search":
        """Itself.

        Raises:
            UserError: a number that chooses nothing.
        """
        if self.every < 1:
            raise UserError(f"--every {self.every}: give 1 or more")
        if self.start < 0 or (self.end is not None and self.end <= self.start):
            raise UserError(f"--start {self.start} --end {self.end}: give 0 <= START < END, counted from 0")
        return self


def read_list(file: str, null: bool = False) -> list[str]:
    """Paths of a list file (``-``: standard input), one a line, or with ``null`` each ended by a zero byte.

    Blank lines and those that begin with # are left out; with ``null`` every path is taken as it is.

    Raises:
        UserError: no such file, or it names no path.
    """
    if file == "-":
        data = sys.stdin.buffer.read()
    else:
        try:
            data = Path(file).expanduser().read_bytes()
        except OSError as error:
            raise UserError(f"--list {file} cannot be read ({error.strerror}): check the path") from None
    if b"\0" in data and not null:
        raise UserError(f"{'standard input' if file == '-' else file} ends its paths with zero bytes: give -0 too")
    if null:
        words = [os.fsdecode(word) for word in data.split(b"\0")]
    else:
        lines = _lines(file, data)
        words = [line for line in lines if line.strip() and not line.startswith("#")]
    if not any(words):
        raise UserError(f"{'standard input' if file == '-' else file} names no path: write one a line")
    return [word for word in words if word]


def _lines(file: str, data: bytes) -> list[str]:
    """The lines of a list in any encoding; a name in bytes that are no UTF-8 is kept where there is such a file."""
    lines = [line.removesuffix("\r") for line in decode(file, data).split("\n")]
    raw = [line.removesuffix(b"\r") for line in data.split(b"\n")]
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or len(raw) != len(lines) or b"\0" in data[:4]:
        return lines
    return [os.fsdecode(own) if os.path.exists(own) else line for own, line in zip(raw, lines, strict=True)]


# From words to pictures


class _Found(NamedTuple):
    """What one word stands for."""

    sequences: list[list[Picture]]  # pictures that follow each other
    single: bool  # the word is one picture's own path


def _natural(path: Any) -> list[Any]:
    """Sort key by which frame_2 comes before frame_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _picture_of(stem: str) -> str:
    """The stem, without regard to case, of the picture whose mask is called so; empty where it is no name of a mask."""
    match = _MASK_NAME.fullmatch(stem)
    return (match["picture"] or match["named"]).casefold() if match else ""


def _pictures(paths: Sequence[Path], where: object, note: Callable[[str], None]) -> list[Path]:
    """Of files found together the pictures that are inputs; the others are counted by kind in one line.

    ``cat_mask.png`` beside ``cat.jpg`` is a mask, not a picture to predict from.
    """
    found = [path for path in paths if path.suffix.lower() in suffixes()]
    stems = {(path.parent, path.stem.removesuffix("_occlusion").casefold()) for path in found}
    masks = {path for path in found if (path.parent, _picture_of(path.stem)) in stems}
    others = collections.Counter(path.suffix.lower() or "(no suffix)" for path in paths if path not in set(found))
    left = [f"{len(masks)} mask(s) beside their picture"] if masks else []
    videos = sum(count for suffix, count in others.items() if is_video(Path("x" + suffix)))
    left += [f"{count} {suffix}" for suffix, count in sorted(others.items())]
    if left:
        hint = "; name a video itself, or a glob" if videos else ""
        note(f"{where}: {len(found) - len(masks)} picture(s) taken, left out {', '.join(left)}{hint}")
    return sorted((path for path in found if path not in masks), key=_natural)


def _in_folder(folder: Path, note: Callable[[str], None], below: str = "") -> list[Picture]:
    paths = [path for path in folder.iterdir() if path.is_file() and path.name[0] != "."]
    return [Picture(path, folder=below) for path in _pictures(paths, folder, note)]


def _folder(folder: Path, search: Search, note: Callable[[str], None]) -> list[list[Picture]]:
    out = None if search.out is None else search.out.resolve()
    if folder.resolve() == out:
        raise UserError(f"--out {search.out} is an input folder: its results would become inputs; choose another")
    if not search.recursive:
        found = [_in_folder(folder, note)]
    else:
        found = []
        for place, folders, _ in os.walk(folder):
            inside = [name for name in folders if name[0] != "." and Path(place, name).resolve() != out]
            folders[:] = sorted(inside, key=_natural)
            below = os.path.relpath(place, folder)
            found.append(_in_folder(Path(place), note, "" if below == "." else below))
    found = [sequence for sequence in found if sequence]
    if not found:
        hint = "check the folder" if search.recursive else "check the folder, or give --recursive for those below it"
        raise UserError(f"{folder} holds no picture ({', '.join(suffixes()[:8])} and more): {hint}")
    return found


def _video(path: Path, search: Search) -> list[Picture]:
    require_pyav(f"{path} is a video", ", or give a folder of frames")
    try:
        times, fault = survey(path)
    except UserError:  # damaged: reported when it is read, so that the others go on
        return [Picture(path, search.start)]
    found = [Picture(path, index) for index in range(len(times))[search.start : search.end : search.every]]
    if fault and (search.end is None or search.end > len(times)):  # a frame that is asked for is missing
        found.append(Picture(path, len(times), fault=fault))
    return found


def _matches(word: str, search: Search, note: Callable[[str], None]) -> list[list[Picture]]:
    paths = [Path(p) for p in glob.glob(os.path.expanduser(word), recursive=True)]
    paths = sorted((p for p in paths if p.is_file()), key=_natural)
    if not paths:
        raise UserError(f"'{word}' matches no file: check the pattern")
    if search.out is not None:
        out = search.out.resolve()
        paths = [path for path in paths if out not in path.resolve().parents]
        if not paths:
            raise UserError(f"--out {search.out} holds what '{word}' matches, as it will the results: choose another")
    pictures = [Picture(path) for path in _pictures([path for path in paths if not is_video(path)], f"'{word}'", note)]
    if not pictures and not any(is_video(path) for path in paths):
        raise UserError(f"'{word}' matches no picture and no video: check the pattern")
    sequences = [pictures[search.start : search.end : search.every]] if pictures else []
    return sequences + [_video(path, search) for path in paths if is_video(path)]


def _expand(word: str, search: Search, literal: bool, note: Callable[[str], None]) -> _Found:
    """A file, a folder's pictures, a video's frames, or what a glob matches (unless the word is ``literal``)."""
    path = Path(word).expanduser() if not literal else Path(word)
    if os.path.isdir(path):  # and not path.is_dir(): it raises where a name is too long
        found = [s[search.start : search.end : search.every] for s in _folder(path, search, note)]
    elif os.path.exists(path) and not is_video(path):
        return _Found([[Picture(path)]], True)
    elif os.path.exists(path):
        found = [_video(path, search)]
    elif not literal and glob.has_magic(word):
        found = _matches(word, search, note)
    elif literal:  # one of many: told when it is read, so that the others go on
        return _Found([[Picture(path)]], True)
    else:
        raise UserError(f"{word} does not exist: check the path")
    if not any(found):
        raise UserError(f"--start {search.start} leaves nothing of {word}: give a lower one")
    return _Found(found, False)


def find_inputs(
    words: Sequence[str],
    task: str,
    mask: str | None = None,
    search: Search | None = None,
    listed: Sequence[str] = (),
    note: Callable[[str], None] = lambda line: None,
) -> list[tuple[Picture, ...]]:
    """The inputs of every prediction: (image,), (first frame, second) or (image, mask), as the task's prompt is.

    Where it is another frame, ``A,B`` is a pair; a folder, glob or video is a sequence of frames, and so are the plain
    files together. A mask of a folder that is missing is named by the path it should have.

    Args:
        listed: more words, in which nothing is a glob and ~ is no home; those that do not exist are taken as they are.
        note: gets one line on what was left out of a folder or glob.

    Raises:
        UserError: a word that does not exist, fewer than two frames, a --mask that does not fit, or a picture that is
            its own mask or second frame.
    """
    search = (search or Search()).check()
    marked = [(word, False) for word in words] + [(word, True) for word in listed]
    prompt = get_task(task).prompt
    if prompt is not None and prompt.frame:
        return [_distinct(pair, "second frame") for pair in _find_pairs(marked, search, note)]
    sequences = [s for word, literal in marked for s in _expand(word, search, literal, note).sequences]
    found = [picture for sequence in sequences for picture in sequence]
    images = [image for (image,) in _unique([(picture,) for picture in found])]
    if prompt is None:
        return [(image,) for image in images]
    if mask is None:
        raise UserError(f"{task} needs {prompt.cli}: {prompt.words}, or a folder of masks")
    place = Path(mask).expanduser()
    if os.path.isdir(place):
        listings: dict[Path, list[Path]] = {}
        inputs = {os.path.realpath(image.path) for image in images}
        return [(image, _mask_of(image, place, listings, inputs)) for image in images]
    if not os.path.exists(place):
        raise UserError(f"--mask {mask} does not exist: check the path")
    if len(images) != 1:
        raise UserError(f"--mask {mask} is one file but there are {len(images)} images: give a folder of masks")
    return [_distinct((images[0], Picture(place)), "mask")]


def _distinct(pair: tuple[Picture, ...], what: str) -> tuple[Picture, ...]:
    first, second = pair
    if (
        first.frame == second.frame
        and os.path.exists(first.path)
        and os.path.exists(second.path)
        and first.path.samefile(second.path)
    ):
        raise UserError(f"{first} would be its own {what}: name another file")
    return pair


def _with_second(sequence: list[Picture]) -> list[Picture]:
    """Of a video with one frame (or none that can be read) also the next, so that it is among the failures."""
    first = sequence[0]
    return sequence if len(sequence) > 1 else [first, first._replace(frame=(first.frame or 0) + 1)]


def _unique(inputs: Iterable[tuple[Picture, ...]]) -> list[tuple[Picture, ...]]:
    first: dict[tuple[tuple[str, int | None], ...], tuple[Picture, ...]] = {}
    for pictures in inputs:
        first.setdefault(tuple(picture.place for picture in pictures), pictures)
    return list(first.values())


def _mask_of(image: Picture, folder: Path, listings: dict[Path, list[Path]], inputs: set[str]) -> Picture:
    """The mask of a picture in a folder of masks; ``listings`` keeps what each folder holds.

    Called NAME_mask or like it, or as the picture itself; of several the one that is called so exactly.

    Args:
        inputs: real paths of all pictures, which are nobody's mask.
    """
    short = image.stem.removesuffix("_occlusion")  # pix2gestalt: ID_occlusion.png and ID_visible_mask.png
    own = image.path.suffix.lower() if image.frame is None else ".png"
    exact = (f"{image.stem}_mask", f"{short}_visible_mask", image.stem)
    for place in dict.fromkeys((folder / image.folder, folder)):
        if place not in listings:
            paths = sorted(place.iterdir()) if place.is_dir() else ()
            kinds = (*suffixes(), ".npy")
            listings[place] = [path for path in paths if path.suffix.lower() in kinds and path.is_file()]
        free = [path for path in listings[place] if os.path.realpath(path) not in inputs]
        for stem in exact:
            named = [path for path in free if path.stem == stem]
            if named:
                return Picture(min(named, key=lambda path: path.suffix.lower() != own))
        fitting = [path for path in free if _is_visible_mask(path.stem, (image.stem, short))]
        if len(fitting) > 1:
            shown = ", ".join(path.name for path in fitting[:4]) + (", …" if len(fitting) > 4 else "")
            return Picture(fitting[0], fault=f"{image} has {len(fitting)} masks in {place} ({shown}): keep one")
        if fitting:
            return Picture(fitting[0])
    missing = folder / image.folder / f"{image.stem}_mask.png"
    same = missing.with_name(f"{image.stem}.png")
    return Picture(missing, fault=f"{image} has no mask: {same} does not exist, nor {missing.name}: add one of them")


def _is_visible_mask(stem: str, pictures: Sequence[str]) -> bool:
    match = _MASK_NAME.fullmatch(stem)
    whole = match is not None and (match["part"] or match["which"] or "").lower() in ("whole", "amodal")
    return not whole and _picture_of(stem) in {picture.casefold() for picture in pictures}


def _find_pairs(
    words: Iterable[tuple[str, bool]], search: Search, note: Callable[[str], None]
) -> list[tuple[Picture, ...]]:
    pairs: list[tuple[Picture, ...]] = []
    frames: list[Picture] = []
    for word, literal in words:
        if "," in word and not os.path.exists(word if literal else os.path.expanduser(word)):
            parts = word.split(",")
            if len(parts) != 2 or not all(parts):
                raise UserError(f"'{word}' is no pair of frames: write FIRST.png,SECOND.png")
            paths = [Path(part) if literal else Path(part).expanduser() for part in parts]
            if not literal and (gone := [path for path in paths if not os.path.exists(path)]):
                raise UserError(f"{gone[0]} does not exist: check the path")
            pairs.append(tuple(map(Picture, paths)))
            continue
        found = _expand(word, search, literal, note)
        if found.single:
            frames += found.sequences[0]
            continue
        sequences = [_with_second(s) for s in found.sequences if len(s) > 1 or (s and s[0].frame is not None)]
        if not sequences:
            raise UserError(f"{word} holds one frame: flow needs two or more")
        pairs += [pair for sequence in sequences for pair in zip(sequence[:-1], sequence[1:], strict=True)]
    if len(frames) == 1:
        raise UserError(f"{frames[0]} is one frame: flow needs a pair FIRST.png,SECOND.png or a folder of frames")
    pairs += zip(frames[:-1], frames[1:], strict=True)
    return _unique(pairs)


_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def _portable(name: str) -> str:
    """A name without <>:"|?* and the names of devices, which Windows and the disks of cameras refuse."""
    name = re.sub(r'[<>:"|?*\\]', "_", name)
    head = name.split(".")[0]
    return f"_{name}" if head.rstrip().lower() in _RESERVED and "." in name else name


def _portable_folder(folder: str) -> str:
    """A folder below --out of which the same is true; none of its names ends with a dot or a space."""
    names = []
    for name in Path(folder).parts:
        name = re.sub(r"[. ]+$", "_", _portable(name))
        names.append(f"_{name}" if name.lower() in _RESERVED else name)
    return os.path.join(*names) if names else ""


_LONGEST = 180  # bytes of a result's name: 255 less what follows it, a lock's or a temporary file's ending included


def _cut(name: str) -> str:
    whole = os.fsencode(name)
    if len(whole) <= _LONGEST:
        return name
    begin = whole[: _LONGEST - 9].decode("utf-8", "ignore")  # no half of a character
    return f"{begin}_{hashlib.sha256(whole).hexdigest()[:8]}"


def _one(name: str) -> str:
    """The same for names that a file system may hold for one."""
    return unicodedata.normalize("NFC", name).casefold()


def name_results(inputs: Sequence[tuple[Picture, ...]], task: str) -> list[Item]:
    """A name for every prediction: the image's stem, with its folder and suffix where two would collide.

    Names that differ only by case or by Unicode form collide as well: many file systems hold them for one. What is
    longer than a file system takes, with all that is put behind it, is cut and gets a hash. Characters and names that
    Windows refuses are replaced.
    """

    prompt = get_task(task).prompt
    paired = prompt is not None and prompt.frame

    def candidates(files: tuple[Picture, ...]) -> list[str]:
        first, parent = files[0], Path(os.path.abspath(files[0].path)).parent.name
        number = "" if first.frame is None else f"_{first.frame:06d}"
        whole = first.path.name.replace(".", "_") + number
        names = [first.stem, f"{parent}_{first.stem}", f"{parent}_{whole}"]
        if paired:
            names.insert(1, f"{first.stem}_{files[1].stem}")
        digest = hashlib.sha256(repr([file.place for file in files]).encode()).hexdigest()
        names = [_cut(_portable(name)) for name in (*names, f"{_cut(names[-1])}_{digest[:6]}")]
        return [os.path.join(_portable_folder(first.folder), name) for name in names]

    proposed = [candidates(files) for files in inputs]
    pending = list(range(len(inputs)))
    names = [""] * len(inputs)
    taken: set[str] = set()
    for level in range(len(proposed[0]) if proposed else 0):
        counts = collections.Counter(_one(proposed[i][level]) for i in pending)
        for i in pending:
            name = proposed[i][level]
            if counts[_one(name)] == 1 and _one(name) not in taken:
                names[i] = name
        taken |= {_one(name) for name in names if name}
        pending = [i for i in pending if not names[i]]
    return [Item(name, files) for name, files in zip(names, inputs, strict=True)]
