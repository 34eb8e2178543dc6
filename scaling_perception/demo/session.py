"""One model behind the page: it turns what a person chose into a command of `predict`, and runs it as `predict` does.

What is run is the command that the page shows: its words are read by the parser of `predict`, its files are written by
the job of `predict`. So the downloads are the files that the command writes.
"""

import dataclasses
import queue
import re
import shlex
import shutil
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaling_perception import predict
from scaling_perception.data.images import image_size
from scaling_perception.demo import dial
from scaling_perception.inference.budgets import own_budgets
from scaling_perception.inference.inputs import to_rgb
from scaling_perception.inference.job import run_job
from scaling_perception.inference.predictor import Predictor
from scaling_perception.inference.settings import SETTINGS, Settings, flag_of
from scaling_perception.inference.video import VideoReader, is_video
from scaling_perception.support.errors import UserError
from scaling_perception.support.failures import explain
from scaling_perception.support.verbs import in_flags
from scaling_perception.tasks import TASKS, get_task
from scaling_perception.tasks.base import Estimate

_KEPT = 12  # runs whose files and arrays are kept
_NEEDS_POINTS = ("metric",)  # formats that need what the page does not ask for


class Limits(NamedTuple):
    """Of one request."""

    megapixels: float = 16.0
    megabytes: float = 64.0
    waiting: int = 8


class Asked(NamedTuple):
    """What a person chose.

    Attributes:
        pictures: paths: the picture; where the task asks for another frame, that too, or a video alone.
        mask: bool (H, W) at the picture's size, or the path of a file, where the task asks for one.
        settings: texts of flags by the names of ``SETTINGS``, and ``seed``; empty ones are left out.
        camera: texts of ``intrinsics``, ``fov`` and ``range``.
        frames: of a video, the first frame and how many frames later the second is.
    """

    task: str
    pictures: tuple[str | None, ...]
    mask: Any = None
    settings: Mapping[str, str] = {}
    camera: Mapping[str, str] = {}
    frames: tuple[int, int] = (0, 1)


@dataclasses.dataclass
class Run:
    """A prediction, or what there is of it so far.

    Attributes:
        number: of this run, from 1.
        image: uint8 RGB (H, W, 3). estimate: of the members so far. members: how many these are.
        done: whether these are all, and the files written.
        files: of the result. command: that makes them again.
        begin: when its turn came. seconds: from then to now, without ``compiled``, those of compiling.
    """

    number: int
    task: str
    folder: Path
    image: np.ndarray
    settings: Settings
    estimate: Estimate | None = None
    done: bool = False
    files: tuple[Path, ...] = ()
    command: str = ""
    begin: float = 0.0
    seconds: float = 0.0
    compiled: float = 0.0
    macs: float = float("nan")
    notes: tuple[str, ...] = ()
    camera: tuple[str, str] = ("", "")  # texts of intrinsics and fov
    distances: tuple[str, ...] = ("0", "1")

    @property
    def members(self) -> int:
        return 0 if self.estimate is None else len(self.estimate.members)


class _Stopped(Exception):
    """The person who asked has left, or pressed stop."""


class Session:
    """A loaded model, its table of budgets, what was measured on this machine, and the last runs."""

    def __init__(
        self,
        model: str,
        folder: Path,
        autoencoder: str | None = None,
        dtype: str = "float32",
        limits: Limits | None = None,
    ) -> None:
        """Args: ``folder``: of all files that are made.

        Raises:
            UserError: no such model, or one that predicts nothing of pictures.
        """
        self.model, self.folder, self.limits = model, folder, limits or Limits()
        self._flags = {"model": model, "autoencoder": autoencoder, "dtype": dtype}
        self.predictor = Predictor.from_pretrained(model, autoencoder=autoencoder, dtype=dtype)
        self.table = own_budgets(self.predictor)
        self.tasks = tuple(name for name in TASKS if name in self.predictor.tasks and TASKS[name].files)
        self.predictor.check_task(self.tasks[0] if self.tasks else "depth")
        self.costs: dict[str, dial.Cost] = {}
        self.seen: dict[tuple[Any, ...], float] = {}  # seconds of settings that have run
        self.runs: OrderedDict[int, Run] = OrderedDict()
        self._lock, self._count = threading.Lock(), 0
        self._computing = threading.Lock()  # one run at a time: two would each take twice as long

    def stops(self, task: str) -> list[dial.Stop]:
        return dial.stops(self.table, task)

    # Seconds

    def measure(self) -> None:
        """Measure what every task costs here; the shipped dial is usable before."""
        for task in self.tasks:
            with self._computing, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.costs[task] = dial.measure(self.predictor, task)

    def seconds(self, task: str, settings: Settings) -> tuple[float, str] | None:
        """(seconds of a run, how that is known), or None while nothing was measured."""
        if (known := self.seen.get((task, settings))) is not None:
            return known, "the last run with these settings"
        if (cost := self.costs.get(task)) is not None:
            return cost.seconds(self.predictor.evaluations(settings), settings.ensemble), "measured at start"
        return None

    # From choices to a command

    def words(self, asked: Asked, folder: Path) -> list[str]:
        """The words of `predict` for a request whose inputs lie in ``folder``.

        Raises:
            UserError: an input is missing, too large or of another kind.
        """
        what, given = get_task(asked.task), {**asked.settings, **asked.camera}
        given = {name: str(value).strip() for name, value in given.items() if value not in (None, "", False)}
        settings = self.settings(asked.task, given)
        words = ["--task", asked.task, *self._model_words()]
        for name in (*SETTINGS, "seed"):
            if name in given:
                words += (
                    [flag_of(name)]
                    if name in SETTINGS and SETTINGS[name]["kind"] is bool
                    else [
                        flag_of(name),
                        given[name],
                    ]
                )
        if settings.ensemble > 1 and not settings.adaptive:
            words += ["--batch-size", "1"]  # so that members come in one after the other
        formats = [name for name in what.files if name not in _NEEDS_POINTS]
        words += ["--formats", ",".join([*formats, *(["uncertainty"] if settings.ensemble > 1 else [])])]
        if "ply" in formats:
            words += [
                w for name in ("intrinsics", "fov", "range") if name in given for w in (flag_of(name), given[name])
            ]
        pictures = [self._kept(one, folder) for one in asked.pictures if one]
        if not pictures:
            raise UserError("no picture was given: upload one, or take an example")
        prompt = what.prompt
        if prompt is None or not prompt.frame:
            if is_video(pictures[0]):
                raise UserError(f"{pictures[0].name} is a video: {asked.task} takes a picture here")
            if prompt is not None:
                words += [prompt.cli, str(self._mask(asked.mask, pictures[0], folder, prompt.words))]
            return [*words, "--out", str(folder / "out"), "--", str(pictures[0])]
        if is_video(pictures[0]):
            first, apart = asked.frames
            words += ["--start", str(first), "--end", str(first + apart + 1), "--every", str(apart)]
            return [*words, "--out", str(folder / "out"), "--", str(pictures[0])]
        if len(pictures) < 2:
            raise UserError(f"{asked.task} needs {prompt.words} too: upload a second picture, or give a clip")
        return [*words, "--out", str(folder / "out"), "--", f"{pictures[0]},{pictures[1]}"]

    def settings(self, task: str, given: Mapping[str, str]) -> Settings:
        """`Settings` of texts, as the flags of `predict` read them.

        Raises:
            UserError: a text that is no value of its setting.
        """
        from scaling_perception.support.verbs import make_parser

        words = ["--task", task, "--out", "out"]
        for name in SETTINGS:
            value = str(given.get(name, "")).strip()
            if value and value != "False":
                words += [flag_of(name)] if SETTINGS[name]["kind"] is bool else [f"{flag_of(name)}={value}"]
        try:
            args = make_parser("predict").parse_args([*words, "x"])
            chosen = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
            settings = Settings(**chosen)
            settings.reduce_for(task)
            return settings
        except UserError as error:
            refusal = in_flags(str(error), predict.FLAGS)
            raise UserError(refusal.replace(" (see `scaling-perception predict --help`)", "")) from None

    def _model_words(self) -> list[str]:
        usual = {"autoencoder": None, "dtype": "float32"}
        return [w for name, v in self._flags.items() if v != usual.get(name) for w in (f"--{name}", str(v))]

    def _kept(self, path: str, folder: Path) -> Path:
        """A copy of an uploaded file in the run's folder, under a name that needs no quoting."""
        source = Path(path)
        megabytes = source.stat().st_size / 1e6
        if megabytes > self.limits.megabytes:
            raise UserError(
                f"{source.name} has {megabytes:.3g} MB: this page takes {self.limits.megabytes:g} MB at most; make it "
                "smaller, or start the demo with --megabytes"
            )
        name = re.sub(r"[^\w.-]+", "_", source.name).lstrip("-.") or "picture"
        place = folder / name
        for number in range(2, 1000):
            if not place.exists():
                break
            place = folder / f"{Path(name).stem}_{number}{Path(name).suffix}"
        shutil.copyfile(source, place)
        if not is_video(place):
            self.check_size(place)
        return place

    def check_size(self, path: Path) -> None:
        """UserError for a picture of too many pixels, by its header; nothing is decoded."""
        height, width = image_size(path)
        if height * width > self.limits.megapixels * 1e6:
            raise UserError(
                f"{path.name} has {height * width / 1e6:.3g} megapixels ({width}x{height}): this page takes "
                f"{self.limits.megapixels:g} at most; make it smaller, or start the demo with --megapixels"
            )

    def _mask(self, mask: Any, picture: Path, folder: Path, words: str) -> Path:
        from scaling_perception.data.formats import write_image

        if mask is None or isinstance(mask, np.ndarray) and not mask.any():
            raise UserError(f"{words} is missing: paint it, draw a box, set points, or give a file")
        if isinstance(mask, str):
            return self._kept(mask, folder)
        place = folder / f"{picture.stem}_mask.png"
        write_image(place, mask.astype(np.uint8) * 255)
        return place

    # Running

    def stream(self, asked: Asked) -> Iterator[Run]:
        """The run after each member that comes in, and when its files are written.

        Raises:
            UserError: the request or its files are wrong.
        """
        with self._lock:
            self._count += 1
            number = self._count
        folder = self.folder / f"{number:04d}"
        folder.mkdir(parents=True)
        try:
            try:
                yield from self._stream(asked, number, folder)
            except UserError as error:
                raise UserError(plain(str(error), folder)) from None
        finally:
            if number not in self.runs:
                shutil.rmtree(folder, ignore_errors=True)

    def _stream(self, asked: Asked, number: int, folder: Path) -> Iterator[Run]:
        args, request, item = predict.one_request(self.words(asked, folder))
        first = item.inputs[0]
        if first.frame is None:
            image = to_rgb(first.path)
        else:
            reader = VideoReader()
            try:
                image = reader.read(first.path, first.frame)
            finally:
                reader.close()
        if image.shape[0] * image.shape[1] > self.limits.megapixels * 1e6:
            raise UserError(f"{first} has more than {self.limits.megapixels:g} megapixels: make it smaller")
        run = Run(number, asked.task, folder, image, request.settings)
        run.camera = (args.intrinsics or "", str(args.fov or ""))
        run.distances = tuple((args.range or "0,1").split(","))
        words = predict.command_of(args, item)
        words[words.index("--out") + 1] = "out"
        run.command = shlex.join(words)
        news: queue.Queue[Any] = queue.Queue()
        gone = threading.Event()

        def watch(estimate: Estimate) -> None:
            if gone.is_set():
                raise _Stopped
            news.put(estimate)

        def work() -> None:
            try:
                with self._computing, warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", UserWarning)
                    before = self.predictor.compile_seconds
                    run.begin = time.perf_counter()
                    summary = run_job(
                        self.predictor,
                        request,
                        [item],
                        folder / "out",
                        workers=0,
                        watch=watch,
                        command=lambda one: words,
                    )
                    run.compiled = self.predictor.compile_seconds - before
                    notes = [" ".join(str(one.message).split()) for one in caught if one.category is UserWarning]
                run.notes = tuple(dict.fromkeys(notes))
                news.put(summary)
            except BaseException as error:
                news.put(error)

        threading.Thread(target=work, daemon=True, name=f"run {number}").start()
        try:
            while not run.done:
                found = news.get()
                if isinstance(found, Estimate):
                    run.estimate = found
                elif isinstance(found, dict):
                    self._finish(run, found)
                elif isinstance(found, UserError):
                    raise found
                else:
                    raise UserError(explain(found) or f"{type(found).__name__}: see the terminal") from found
                run.seconds = time.perf_counter() - run.begin - run.compiled
                yield run
        finally:
            gone.set()

    def _finish(self, run: Run, summary: Mapping[str, Any]) -> None:
        (result,) = summary["files"]
        if "error" in result:
            raise UserError(result["error"])
        out = run.folder / "out"
        run.files = tuple(out / name for name in result["outputs"].values())
        run.files += (out / f"{result['name']}_{run.task}.json",)
        run.macs = float("nan") if result["macs"] is None else result["macs"]
        run.notes += (result["note"],) if "note" in result else ()
        run.done = True
        with self._lock:
            self.seen[run.task, run.settings] = time.perf_counter() - run.begin - run.compiled
            self.runs[run.number] = run
            while len(self.runs) > _KEPT:
                _, old = self.runs.popitem(last=False)
                shutil.rmtree(old.folder, ignore_errors=True)


def plain(text: str, folder: Path) -> str:
    """A message with the names of files as the person knows them."""
    return text.replace(f"{folder / 'out'}/", "").replace(f"{folder}/", "")
