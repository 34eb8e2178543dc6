"""The page of a fit and the frontier of training against test-time compute."""

import base64
import io
import re
import shlex
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from synthetic_laws import made

from scaling_perception.fit import command_of
from scaling_perception.scaling.frontier import best_splits, staircase, undominated, usual_images
from scaling_perception.scaling.law_fit import Options, Problem, fit_problem
from scaling_perception.scaling.law_intervals import profile_curves, profile_intervals
from scaling_perception.scaling.laws import fit_law, load_law, predict
from scaling_perception.scaling.points import Points
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import make_parser, run_verb

TRAIN, SERVE = np.meshgrid(np.geomspace(1e9, 1e12, 5), np.geomspace(1e5, 1e8, 5))


def surface(noise: float = 0.0) -> Points:
    """E + A / train^0.3 + B / serve^0.2."""
    x = np.stack([TRAIN.ravel(), SERVE.ravel()])
    y = 0.05 + 300 * x[0] ** -0.3 + 3 * x[1] ** -0.2
    return Points(x, y * np.exp(noise * np.random.default_rng(3).normal(size=len(y))), ("train_macs", "macs"), "err")


def test_profiles_cross_the_threshold_where_the_interval_ends():
    problem = Problem.of(made("power_floor", 40, 0.02), "power_floor", Options())
    best = fit_problem(problem, Options())
    known = (problem.form, best, problem.lx, problem.ly, problem.loss, problem.centre, problem.scale)
    curves = profile_curves(*known, problem.points.groups, 0.95)
    ends = profile_intervals(*known, problem.points.groups, 0.95)
    assert list(curves) == ["E", "A", "alpha"]
    for name, one in curves.items():
        assert one.ends == pytest.approx(ends[name]) and one.statistic.min() < 1e-3
        for end in ends[name]:
            assert end is not None
            assert np.interp(end, one.values, one.statistic) == pytest.approx(one.threshold, rel=0.06)


def test_the_best_split_is_where_a_mac_is_worth_the_same_in_both():
    law = fit_law(surface(), "additive", Options(bootstraps=100))
    images = 1e3
    one = best_splits(law, images, count=9)[4]
    assert 3 * one.train + images * one.serve == pytest.approx(one.total, rel=1e-9)
    slopes = 0.3 * 300 * one.train**-1.3 / 3, 0.2 * 3 * one.serve**-1.2 / images
    assert np.log(slopes[0] / slopes[1]) == pytest.approx(0, abs=0.05)  # the grid is 3 % fine
    assert one.low <= one.error * (1 + 1e-6) and one.error <= one.high * (1 + 1e-6)
    assert usual_images(surface())[1] == 1e4  # 3 x 3.2e10 / 3.2e6


def test_points_that_none_beats():
    total, error = np.array([3.0, 1, 2, 4, 1]), np.array([0.2, 0.5, 0.5, 0.3, 0.4])
    assert staircase(total, error).tolist() == [4, 0]
    train, serve = np.array([1.0, 1, 2, 2]), np.array([1.0, 2, 1, 2])
    assert undominated(train, serve, np.array([0.4, 0.3, 0.5, 0.3])).tolist() == [True, True, False, False]


def test_a_page_holds_its_command_its_points_and_its_law(tmp_path: Path):
    points = surface(0.01)
    rows = "".join(f"{a:.8g},{b:.8g},{y:.8g}\n" for (a, b), y in zip(points.x.T, points.y, strict=True))
    (tmp_path / "p.csv").write_text(f"train_macs,macs,err\n{rows}")
    words = [str(tmp_path / "p.csv"), "--x", "train_macs", "macs", "--form", "additive", "--bootstraps", "100"]
    out = [str(tmp_path / name) for name in ("a.html", "a.svg")]
    assert run_verb("fit", [*words, "--html", out[0], "--serve", "1e3"]) == 0
    page = Path(out[0]).read_text()
    heads = re.findall("<h2>(.*?)</h2>", page)
    wanted = ["The law and its residuals", "Profile likelihood", "Hold-out", "Training against test-time compute"]
    assert [head for head in heads if head != "Warnings"][:4] == wanted and page.count("<svg") == 4
    assert not re.search(r'(?:src|href)="http', page)  # nothing is fetched
    (command,) = re.findall("<pre>(scaling-perception fit .*?)</pre>", page)
    told = make_parser("fit").parse_args(shlex.split(unescape(command))[2:])
    assert told == make_parser("fit").parse_args([*words, "--html", out[0], "--serve", "1e3"])
    (data,) = re.findall('download="points.csv" href="data:text/csv;base64,(.*?)"', page)
    again = np.loadtxt(io.BytesIO(base64.b64decode(data)), delimiter=",", skiprows=1)
    np.testing.assert_allclose(again.T, [*points.x, points.y], rtol=1e-7)
    (data,) = re.findall('download="law.json" href="data:application/json;base64,(.*?)"', page)
    (tmp_path / "again.json").write_bytes(base64.b64decode(data))
    np.testing.assert_allclose(predict(load_law(tmp_path / "again.json"), points.x), points.y, rtol=0.05)
    for more, told in (
        (["--x", "macs", "--frontier", str(tmp_path / "b.svg")], "--frontier: the law is of macs"),
        (["--x", "macs", "--html", "page.txt"], "end the name in .html"),
        (["--x", "train_macs", "macs", "--serve", "0"], "--serve '0': give N as numbers above zero"),
        (["--x", "macs", "--frontier", "a.bmp"], "--frontier a.bmp: end the name in .svg"),
    ):
        with pytest.raises(UserError, match=told):
            run_verb("fit", [words[0], *more, "--form", "power"])


def test_pages_say_what_an_envelope_does_not_have(tmp_path: Path):
    out = tmp_path / "hull.html"
    points = made("power", 30, 0.02)
    (tmp_path / "p.csv").write_text(
        "macs,err\n" + "".join(f"{a:.8g},{y:.8g}\n" for a, y in zip(points.x[0], points.y, strict=True))
    )
    assert run_verb("fit", [str(tmp_path / "p.csv"), "--form", "hull", "--html", str(out)]) == 0
    assert "an envelope is no maximum of a likelihood" in out.read_text()
    assert command_of(make_parser("fit").parse_args(["a b.csv", "--where", "x=1", "y=2"])) == (
        "scaling-perception fit 'a b.csv' --where x=1 y=2"
    )
