"""Samples from caches of latents: decoded once into memory when they fit, else read as they are needed."""

from typing import Any, NamedTuple

import numpy as np

from scaling_perception.data.latents import CacheReader, split_record
from scaling_perception.support.errors import UserError

_WIDE = np.arange(1 << 16, dtype="<u2").view("<f2").astype(np.float32)  # float16's bits -> float32: half a cast's time
_IN_MEMORY = 16 << 30  # caches up to this size (and up to half of the free memory) are held in memory


class _Rows(NamedTuple):
    """Decoded records: latents float16 (N, values), valid as bits (N, bytes), pass_id and label int32 (N,), keys."""

    latents: np.ndarray
    bits: np.ndarray
    pass_id: np.ndarray
    label: np.ndarray
    keys: list[str]


class Cached:
    """Samples from caches of latents, decoded once into memory when they fit."""

    def __init__(self, paths: list[str], flip: bool, in_memory: bool | None = None):
        self.readers = [CacheReader(path) for path in paths]
        first = self.readers[0]
        for reader in self.readers:
            for name in ("latent", "target_channels", "autoencoder", "resolution", "task_options"):
                if reader.settings.get(name) != first.settings.get(name):
                    raise UserError(
                        f"caches {first.path} and {reader.path} differ in {name} ({first.settings.get(name)}, "
                        f"{reader.settings.get(name)}): prepare them alike"
                    )
            if reader.fields != first.fields:
                raise UserError(f"caches {first.path} and {reader.path} are of tasks that cannot be mixed")
            if flip and not reader.flipped:
                raise UserError(
                    f"data.flip is on but {reader.path} has no flipped copies: set data.flip=false, or prepare with "
                    "--flips both"
                )
        self.starts = np.cumsum([0, *map(len, self.readers)])
        if in_memory is None:
            import psutil

            size = sum(reader.size for reader in self.readers)
            in_memory = size <= min(_IN_MEMORY, psutil.virtual_memory().available // 2)
        self._names = list(first.fields)
        if self._names == ["target"] and first.settings["logvar"]:  # what a draw from the posterior needs
            self._names.append("target_logvar")
        h, w, c = first.shape
        own = {name: first.target_channels if name.startswith("target") else c for name in self._names}
        self._sizes = [h * w * own[name] for name in self._names]
        self._view = sum(self._sizes[: len(first.fields)])  # float16 values of the means of one view
        self._held: list[_Rows] = []  # as they are, and mirrored
        if in_memory:
            records = [record for reader in self.readers for shard in reader.everything() for record in shard]
            self._held = [self._decode(records, np.full(len(records), mirrored)) for mirrored in range(1 + flip)]

    def fingerprint(self) -> list[dict[str, Any]]:
        return [reader.fingerprint for reader in self.readers]

    def _records(self, indices: np.ndarray) -> list[bytes]:
        out = [b""] * len(indices)
        owner = np.searchsorted(self.starts, indices, side="right") - 1
        for number in np.unique(owner):
            places = np.flatnonzero(owner == number)
            found = self.readers[number].raw((indices[places] - self.starts[number]).tolist())
            for place, record in zip(places, found, strict=True):
                out[place] = record
        return out

    def _decode(self, records: list[bytes], flips: np.ndarray) -> "_Rows":
        h, w, _ = self.readers[0].shape
        mask = (h * w + 7) // 8
        rows = _Rows(
            np.empty((len(records), sum(self._sizes)), "<f2"),
            np.empty((len(records), mask), np.uint8),
            np.empty(len(records), np.int32),
            np.empty(len(records), np.int32),
            [],
        )
        for row, record in enumerate(records):
            (flags, rows.pass_id[row], *_, rows.label[row]), key, body = split_record(record)
            view = self._view * 2 * (2 if flags & 1 else 1) + mask
            at = view if flips[row] else 0
            rows.latents[row] = np.frombuffer(body, "<f2", rows.latents.shape[1], at)
            rows.bits[row] = np.frombuffer(body, np.uint8, mask, at + view - mask)
            rows.keys.append(key)
        return rows

    def batch(self, indices: np.ndarray, flips: np.ndarray) -> dict[str, Any]:
        """The records' fields, stacked: latents (B, h, w, c) float32, those with features float16; valid bool (B, h,
        w), pass_id, label, key."""
        h, w, _ = self.readers[0].shape
        if self._held:
            plain = self._held[0]
            taken = (plain.latents[indices], plain.bits[indices], plain.pass_id[indices], plain.label[indices])
            rows = _Rows(*taken, [plain.keys[i] for i in indices])
            for row in np.flatnonzero(flips):
                for column, mirrored in zip(rows[:2], self._held[1][:2], strict=True):
                    column[row] = mirrored[indices[row]]
        else:
            rows = self._decode(self._records(indices), flips)
        out: dict[str, Any] = {}
        ends = np.cumsum(self._sizes).tolist()
        for name, size, end in zip(self._names, self._sizes, ends, strict=True):
            field = rows.latents[:, end - size : end].view("<u2")
            # with features it is many numbers, which the step casts: half the bytes to be moved
            wide = field.copy().view("<f2") if size > self._sizes[-1] else _WIDE.take(field, mode="wrap")
            out[name] = wide.reshape(len(indices), h, w, -1)
        out["valid"] = np.unpackbits(rows.bits, axis=1, count=h * w).reshape(-1, h, w).astype(bool)
        return {**out, "pass_id": rows.pass_id, "label": rows.label, "key": rows.keys}
