"""Raw samples to pictures in many processes, and pictures to latents: what the shards of a cache are made of."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from scaling_perception.data.latents import FIELDS
from scaling_perception.data.manifest import RawSamples, ranges_of, reason
from scaling_perception.data.sources.base import LeftOut
from scaling_perception.support.errors import UserError
from scaling_perception.support.failures import not_damage
from scaling_perception.tasks import TaskOptions, get_task


class SampleMaker:
    """``maker(index)`` -> the samples of a raw sample, each distinct picture once; made once in each process.

    The result holds ``samples``: dictionaries whose pictures (image, prompt, target) are digests; and ``pictures``:
    digest -> float32 (R, R, 3). The image of a scene is shared by its four passes and the prompt of depth is constant,
    so about a third of the encoding is saved. Or ``bad``: why the sample cannot be used, and ``left_out``: whether that
    is how it was published.
    """

    def __init__(self, spec: tuple[Any, ...], resolution: int, options: dict[str, Any]):
        self.samples, self.resolution = RawSamples(*spec), resolution
        self.options = TaskOptions.from_dict(options)

    def __call__(self, index: int) -> dict[str, Any]:
        pictures: dict[bytes, Any] = {}
        try:
            raw, tasks = self.samples.read(index)
            ranges = ranges_of(raw, tasks)
            made = [one for task in tasks for one in get_task(task).encode(raw, self.resolution, self.options)]
            for sample in made:
                for field in (name for name in FIELDS if name in sample):
                    picture = np.ascontiguousarray(sample[field], np.float32)
                    if not np.isfinite(picture).all():
                        raise UserError(f"sample '{sample['key']}': its {field} is not finite everywhere")
                    sample[field] = hashlib.blake2b(picture.data, digest_size=16).digest()
                    pictures[sample[field]] = picture
        except Exception as error:
            if not isinstance(error, UserError) and (why := not_damage(error)):  # no reason to leave the sample out
                raise UserError(f"cannot read raw sample {index}: {why}") from error
            return {"index": index, "bad": reason(error), "left_out": isinstance(error, LeftOut)}
        return {"index": index, "samples": made, "pictures": pictures, "ranges": ranges}


class Name(NamedTuple):
    """A picture to encode: its digest; its view, None as it is, or the signs of its channels when mirrored; the digest
    of the frame before it, where it is to be matched with that."""

    digest: bytes
    view: tuple[float, float, float] | None
    first: bytes | None


class Encoder:
    """Collects pictures and encodes them ``batch`` at a time on each device, each distinct one once; keeps float16.

    Every device runs the program of one device on ``batch`` pictures, so that in float32 the bytes do not depend on how
    many devices there are.
    """

    PLAIN = (1.0, 1.0, 1.0)

    def __init__(self, autoencoder: Any, batch: int, resolution: int, devices: Sequence[Any], exact: Any = None):
        """Args: ``devices``: of this process; ``exact``: the same autoencoder in float32, where the first is not."""
        import jax  # not in the processes that read

        from scaling_perception.parallel.mesh import BATCH_AXES, batch_sharding, make_mesh, replicated
        from scaling_perception.support.compiler_options import convolving

        mesh = make_mesh(devices=devices)
        split, whole = jax.sharding.PartitionSpec(BATCH_AXES), jax.sharding.PartitionSpec()

        def on_each(encode: Any) -> Any:
            def call(params: Any, *pictures: Any) -> Any:  # one of pictures, or one of them and one of first frames
                takes = {"in_specs": (whole, *[split] * len(pictures)), "out_specs": split}
                return jax.shard_map(encode, mesh=mesh, check_vma=False, **takes)(params, *pictures)

            return jax.jit(call, compiler_options=convolving(devices[0].platform, window_sums=True))

        self.factor, self.latent_channels = autoencoder.factor, autoencoder.latent_channels
        self.matches = autoencoder.matches
        self._encode, self._exact = on_each(autoencoder.encode), None if exact is None else on_each(exact.encode)
        self._params, self._place = jax.device_put(autoencoder.params, replicated(mesh)), batch_sharding(mesh)
        self._batch, self._resolution, self._at_once = batch, resolution, batch * len(devices)
        self.clear()

    def clear(self) -> None:
        self._waiting: dict[bool, dict[Name, tuple[Any, ...]]] = {False: {}, True: {}}  # without and with a first frame
        self._running: tuple[list[Name], Any, Any] | None = None
        self.done: dict[Name, tuple[Any, Any]] = {}
        self.error: dict[str, float] = {}  # of the first batch, where ``exact`` is known: {"rms", "std", "pictures"}
        self._known: set[Name] = set()

    def add(self, name: Name, pictures: Mapping[bytes, Any]) -> None:
        """Have a view of one of the pictures (R, R, 3), by their digests, encoded."""
        if name in self._known:
            return
        self._known.add(name)
        paired = name.first is not None
        digests = [name.digest] if name.first is None else [name.digest, name.first]
        self._waiting[paired][name] = tuple(self._seen(pictures[digest], name.view) for digest in digests)
        if len(self._waiting[paired]) == self._at_once:
            self._start(paired)

    def _seen(self, picture: Any, view: tuple[float, float, float] | None) -> Any:
        if view is not None:
            picture = picture[:, ::-1]
        return picture if view in (None, self.PLAIN) else picture * np.asarray(view, picture.dtype)

    def finish(self) -> None:
        """Encode what still waits; then ``done`` holds (mean, log-variance or None) of all that was added."""
        for paired, waiting in self._waiting.items():
            if waiting:
                self._start(paired)
        self._collect()

    def _start(self, paired: bool) -> None:
        import jax

        waiting = self._waiting[paired]
        batch = np.zeros((1 + paired, self._at_once, self._resolution, self._resolution, 3), np.float32)
        for row, pictures in enumerate(waiting.values()):
            batch[:, row] = pictures
        placed = [jax.device_put(field, self._place) for field in batch]
        result = self._encode(self._params, *placed)
        first = self._exact is not None and not self.done and self._running is None
        exact = self._exact(self._params, *placed)[0] if first and self._exact is not None else None
        self._collect()  # the previous batch, while this one runs
        self._running = (list(waiting), result, exact)
        self._waiting[paired] = {}

    def _collect(self) -> None:
        if self._running is None:
            return
        names, (mean, logvar), exact = self._running
        self._running = None
        if exact is not None:
            rows = min(len(names), self._batch)
            wanted, made = (np.asarray(x[:rows], np.float64) for x in (exact, mean))
            rms = float(np.sqrt(np.mean(np.square(made - wanted))))
            self.error = {"rms": rms, "std": float(wanted.std()), "pictures": rows}
        mean = np.asarray(mean).astype(np.float16)
        logvar = None if logvar is None else np.asarray(logvar).astype(np.float16)
        for row, name in enumerate(names):
            if not np.isfinite(mean[row]).all():
                raise UserError("the autoencoder makes latents that are no finite float16: check its weights (--vae)")
            self.done[name] = (mean[row], None if logvar is None else logvar[row])
