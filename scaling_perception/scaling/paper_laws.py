"""The paper's published laws and values, with their sources: ``published/paper.csv``.

`fit paper:fig8a` fits points made from a published law; what comes back are its coefficients.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.tables import Table, read_table

FILE = Path(__file__).parent / "published" / "paper.csv"
PREFIX = "paper:"
_POINTS = 24
_PRETRAINING = (1e17, 1e20)  # the figure's axis has no readable ends: a1 to a6 for 400 k steps of 256 samples


class PublishedLaw(NamedTuple):
    """``metric = a * MACs^b`` between ``low`` and ``high`` MACs."""

    figure: str
    metric: str
    a: float
    b: float
    low: float
    high: float


def published_laws() -> dict[str, PublishedLaw]:
    """The laws by figure."""
    table = read_table(FILE)
    a, b, low, high = (table.numbers(name) for name in ("a", "b", "low", "high"))
    columns = (table.text(name) for name in ("figure", "kind", "metric"))
    out = {}
    for at, (figure, kind, metric) in enumerate(zip(*columns, strict=True)):
        if kind == "law":
            ends = (low[at], high[at]) if np.isfinite(low[at]) else _PRETRAINING
            out[figure] = PublishedLaw(figure, metric, float(a[at]), float(b[at]), *map(float, ends))
    return out


class PublishedValue(NamedTuple):
    """One value of a table or figure; ``settings`` say of which model or setting."""

    figure: str
    dataset: str
    metric: str
    value: float
    settings: str
    text: str


def published_values(figure: str) -> list[PublishedValue]:
    """The single values of a figure or table (tab3), as many as are published; ``text`` as printed."""
    table = read_table(FILE)
    names = ("figure", "kind", "dataset", "metric", "settings", "value")
    rows = zip(*(table.text(name) for name in names), strict=True)
    return [
        PublishedValue(found, dataset, metric, float(value), settings, value)
        for found, kind, dataset, metric, settings, value in rows
        if kind == "point" and found == figure
    ]


def published_points(figure: str) -> Table:
    """Points made from the law of a figure, evenly spaced in log MACs: columns macs and the metric.

    Raises:
        UserError: no law of that figure is published.
    """
    laws = published_laws()
    if figure not in laws:
        raise UserError(f"{PREFIX}{figure}: no law of this figure is published{did_you_mean(figure, laws)}")
    law = laws[figure]
    macs = np.geomspace(law.low, law.high, _POINTS)
    rows = [[repr(float(x)), repr(float(law.a * x**law.b))] for x in macs]
    return Table(f"{PREFIX}{figure}", ["macs", law.metric], rows, range(2, 2 + _POINTS))
