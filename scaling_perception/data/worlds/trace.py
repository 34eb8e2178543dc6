"""Rays against triangles by Embree (the package ``embreex``, an extra)."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from scaling_perception.support.errors import UserError

Array = np.ndarray


@functools.cache
def _embree() -> tuple[Any, Any, Any]:
    try:
        from embreex.mesh_construction import TriangleMesh  # pyright: ignore[reportMissingImports]
        from embreex.rtcore import EmbreeDevice  # pyright: ignore[reportMissingImports]
        from embreex.rtcore_scene import EmbreeScene  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"the worlds need the ray tracer embreex ({error}): pip install 'scaling-perception[worlds]'"
        ) from None
    # Embree starts as many threads as it may use cores; workers are many processes of one thread each.
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    if cores:
        os.sched_setaffinity(0, {min(cores)})
    try:
        return EmbreeDevice(), EmbreeScene, TriangleMesh
    finally:
        if cores:
            os.sched_setaffinity(0, cores)


class Hits(NamedTuple):
    """What rays met: ``face`` int (N,), -1 nothing; ``far`` float32 (N,) in units of the direction's length (infinite
    for nothing); ``weights`` float32 (N, 3) of the triangle's corners."""

    face: Array
    far: Array
    weights: Array


class Tracer:
    """Triangles float32 (F, 3, 3), ready for rays.

    With ``vertices`` (V,), one corner of those in each place, counted through the triangles, and ``index`` int32
    (F, 3), the vertices of each triangle, this takes half the time: embreex copies number by number.
    """

    def __init__(self, corners: Array, vertices: Array | None = None, index: Array | None = None) -> None:
        device, scene, mesh = _embree()
        self._scene = scene(device)
        corners = np.ascontiguousarray(corners, np.float32)
        if vertices is None or index is None:
            self._mesh = mesh(self._scene, corners)
        else:
            self._mesh = mesh(self._scene, corners.reshape(-1, 3).take(vertices, axis=0), index)

    @classmethod
    def of(cls, mesh: Mapping[str, Array]) -> Tracer:
        """The triangles of `World.triangles`."""
        return cls(mesh["corners"], mesh["vertices"], mesh["index"])

    def cast(self, origins: Array, directions: Array) -> Hits:
        """The first hits of rays (N, 3)."""
        if not len(origins):
            return Hits(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros((0, 3), np.float32))
        found = self._scene.run(
            np.ascontiguousarray(origins, np.float32), np.ascontiguousarray(directions, np.float32), output=True
        )
        face = found["primID"].astype(np.int64)
        weights = np.stack([1 - found["u"] - found["v"], found["u"], found["v"]], axis=1)
        return Hits(face, np.where(face < 0, np.float32(np.inf), found["tfar"]), weights)
