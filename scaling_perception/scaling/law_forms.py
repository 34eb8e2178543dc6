"""The forms of scaling laws: an error as a sum of non-negative coefficients times functions of x and a few exponents.

Every form is ``y = sum_k c_k * phi_k(x; theta)`` with ``c_k >= 0``: for given ``theta`` the best ``c`` is a linear
problem (variable projection). Fits run in *inner* parameters ``(c, theta)``, taken at the centre of the data (x over
its geometric mean, y over its own) where they are of order one; people read *published* parameters, such as A and
alpha of ``A / N^alpha``. ``Form.publish`` converts, for one or for thousands of parameter sets at once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from scaling_perception.support.errors import UserError, did_you_mean

Array = np.ndarray
Slopes = list[list[tuple[int, Array]]]
"""For each entry of theta: (term k, d log phi_k / d theta), where it is not zero."""

EXPONENT = (0.0, 5.0)
"""Bounds of an exponent below a floor. At 0 the term is a constant and cannot be told from the floor."""
GRID = (0.05, 0.15, 0.3, 0.5, 0.8, 1.3)


@dataclass(frozen=True)
class Form:
    """One form of law.

    ``terms``: names of the inner coefficients, ``floor`` among them where the form has one. ``shape``: names of theta
    with ``lower``, ``upper`` and ``grid`` (starting values). ``basis(theta, lx)``: ``theta`` (B, q) and centred log x
    (v, n) to the K terms, each (B, n) or a scalar, and their slopes. ``published``: names of what people read, and
    ``publish(c, theta, centre, scale)`` -> (B, P), where c is (B, K), ``centre`` (v,) the mean log x and ``scale`` the
    geometric mean of y. ``value(published, log_x)`` -> (B, n): the law itself from published parameters.
    ``exponents``: published names whose interval is checked for zero. ``profiles``: published name -> (inner name, the
    variables whose log x must be uncentred for the two to be the same, how the inner value becomes the published one:
    ``scale`` times the geometric mean of y, ``same``, ``exp``, ``place``: exp after adding the centre).
    ``shift(inner, delta)``: the same law for log x + delta.
    """

    name: str
    equation: str
    terms: tuple[str, ...]
    shape: tuple[str, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    grid: tuple[tuple[float, ...], ...]
    basis: Callable[[Array, Array], tuple[list[Array], Slopes]]
    published: tuple[str, ...]
    publish: Callable[[Array, Array, Array, float], Array]
    value: Callable[[Array, Array], Array]
    exponents: tuple[str, ...]
    profiles: dict[str, tuple[str, tuple[int, ...], str]]
    shift: Callable[[Array, Array], Array]

    @property
    def size(self) -> int:
        """How many parameters."""
        return len(self.terms) + len(self.shape)

    @property
    def inner(self) -> tuple[str, ...]:
        """Names of the inner parameters, coefficients first."""
        return (*self.terms, *self.shape)

    @property
    def floor(self) -> bool:
        """Whether there is an irreducible term."""
        return "E" in self.terms

    def bounds(self) -> tuple[Array, Array]:
        """Lower and upper bounds of the inner parameters. Of a form of one term the coefficient cannot be zero."""
        least = 0.0 if len(self.terms) > 1 else 1e-12
        lower = np.array([least] * len(self.terms) + list(self.lower))
        return lower, np.array([math.inf] * len(self.terms) + list(self.upper))

    def evaluate(self, inner: Array, lx: Array) -> Array:
        """The law in inner parameters: (B, p) and (v, n) to (B, n)."""
        coefficients, theta = np.split(inner, [len(self.terms)], axis=1)
        terms, _ = self.basis(theta, lx)
        total = np.zeros((len(inner), lx.shape[1]))
        for k, term in enumerate(terms):
            total += coefficients[:, k, None] * term
        return total

    def to_published(self, inner: Array, centre: Array, scale: float) -> Array:
        """Inner parameters (B, p) to published ones (B, P)."""
        coefficients, theta = np.split(inner, [len(self.terms)], axis=1)
        return self.publish(coefficients, theta, centre, scale)


_ONE = np.ones((1, 1))


def _power_terms(count: int, floor: bool):
    """``basis`` of a floor (or none) and ``count`` power terms, one a variable."""

    def basis(theta: Array, lx: Array) -> tuple[list[Array], Slopes]:
        terms = [np.exp(-theta[:, j, None] * lx[j]) for j in range(count)]
        slopes: Slopes = [[(j + floor, -lx[None, j])] for j in range(count)]
        return [_ONE, *terms] if floor else terms, slopes

    return basis


def _publish_powers(count: int, floor: bool):
    """E, then A_j and alpha_j of each power term."""

    def publish(c: Array, theta: Array, centre: Array, scale: float) -> Array:
        columns = [c[:, 0] * scale] if floor else []
        for j in range(count):
            columns += [c[:, j + floor] * scale * np.exp(np.minimum(theta[:, j] * centre[j], 690.0)), theta[:, j]]
        return np.stack(columns, 1)

    return publish


def _value_powers(count: int, floor: bool):
    def value(published: Array, log_x: Array) -> Array:
        total = np.zeros((len(published), log_x.shape[1]))
        if floor:
            total += published[:, :1]
        with np.errstate(divide="ignore"):
            for j in range(count):
                a, alpha = (published[:, [floor + 2 * j + i]] for i in (0, 1))
                total += np.exp(np.log(a) - alpha * log_x[j])
        return total

    return value


def _shift_powers(count: int, floor: bool):
    def shift(inner: Array, delta: Array) -> Array:
        out = inner.copy()
        terms = count + floor
        out[:, floor:terms] *= np.exp(np.clip(inner[:, terms:] * delta, -690, 690))
        return out

    return shift


def _shift_upcycling(inner: Array, delta: Array) -> Array:
    _, _, a1, a2, a3 = inner.T
    out = inner.copy()
    out[:, 1] *= np.exp(np.clip(a1 * delta[0] + a2 * delta[1] + a3 * delta[0] * delta[1], -690, 690))
    out[:, 2] += a3 * delta[1]
    out[:, 3] += a3 * delta[0]
    return out


def _no_shift(inner: Array, delta: Array) -> Array:
    if np.any(delta):
        raise ValueError("this form has no parameter that needs uncentred x")
    return inner


def _powers(name: str, variables: Sequence[str], letters: Sequence[tuple[str, str]], floor: bool) -> Form:
    count = len(variables)
    parts = [f"{a} / {variable}^{alpha}" for variable, (a, alpha) in zip(variables, letters, strict=True)]
    low, high = EXPONENT if floor else (-EXPONENT[1], EXPONENT[1])
    return Form(
        name=name,
        equation="y = " + " + ".join((["E"] if floor else []) + parts),
        terms=(*(["E"] if floor else []), *(a for a, _ in letters)),
        shape=tuple(alpha for _, alpha in letters),
        lower=(low,) * count,
        upper=(high,) * count,
        grid=(GRID if floor else (-0.3, 0.0, *GRID),) * count,
        basis=_power_terms(count, floor),
        published=(*(["E"] if floor else []), *(one for pair in letters for one in pair)),
        publish=_publish_powers(count, floor),
        value=_value_powers(count, floor),
        exponents=tuple(alpha for _, alpha in letters),
        profiles={
            **({"E": ("E", (), "scale")} if floor else {}),
            **{a: (a, (j,), "scale") for j, (a, _) in enumerate(letters)},
            **{alpha: (alpha, (), "same") for _, alpha in letters},
        },
        shift=_shift_powers(count, floor),
    )


def _joint(variables: Sequence[str], kaplan: bool) -> Form:
    """E + ((Nc / N)^(alpha / gamma) + (Dc / D)^(beta / gamma))^gamma; Kaplan's: E = 0 and gamma = beta.

    Inner: coefficient S, shape (alpha, beta, rho, gamma): phi = (N^(-alpha / gamma) + e^rho D^(-beta / gamma))^gamma.
    """
    n, d = variables

    def basis(theta: Array, lx: Array) -> tuple[list[Array], Slopes]:
        alpha, beta, rho = (theta[:, j, None] for j in range(3))
        gamma = beta if kaplan else theta[:, 3, None]
        left, right = -alpha / gamma * lx[0], rho - beta / gamma * lx[1]
        log_sum = np.logaddexp(left, right)
        phi = np.exp(gamma * log_sum)
        share = np.exp(left - log_sum)
        by_gamma = log_sum - share * left - (1 - share) * (right - rho)
        by_beta, k = -(1 - share) * lx[1], 0 if kaplan else 1
        if kaplan:  # beta is also the joint exponent
            by_beta = by_beta + by_gamma
        slopes: Slopes = [[(k, -share * lx[0])], [(k, by_beta)], [(k, gamma * (1 - share))]]
        return ([phi], slopes) if kaplan else ([_ONE, phi], [*slopes, [(k, by_gamma)]])

    def publish(c: Array, theta: Array, centre: Array, scale: float) -> Array:
        alpha, beta, rho = theta[:, 0], theta[:, 1], theta[:, 2]
        gamma = beta if kaplan else theta[:, 3]
        with np.errstate(divide="ignore", over="ignore"):
            log_s = np.log(c[:, -1] * scale)
            n_c = np.exp(np.clip(centre[0] + log_s / np.maximum(alpha, 1e-9), -690, 690))
            d_c = np.exp(np.clip(centre[1] + (log_s + gamma * rho) / np.maximum(beta, 1e-9), -690, 690))
        if kaplan:
            return np.stack([n_c, alpha, d_c, beta], 1)
        return np.stack([c[:, 0] * scale, n_c, alpha, d_c, beta, gamma], 1)

    def value(published: Array, log_x: Array) -> Array:
        columns = [published[:, [i]] for i in range(published.shape[1])]
        if kaplan:
            floor, (n_c, alpha, d_c, beta) = np.zeros_like(columns[0]), columns
            gamma = beta
        else:
            floor, n_c, alpha, d_c, beta, gamma = columns
        left, right = alpha / gamma * (np.log(n_c) - log_x[0]), beta / gamma * (np.log(d_c) - log_x[1])
        return floor + np.exp(gamma * np.logaddexp(left, right))

    exponents = ("alpha", "beta")
    same = exponents if kaplan else ("E", *exponents, "gamma")
    inner = f"(Nc / {n})^(alpha / %s) + (Dc / {d})%s"
    return Form(
        name="kaplan" if kaplan else "joint",
        equation="y = (" + inner % ("beta", "") + ")^beta"
        if kaplan
        else "y = E + (" + inner % ("gamma", "^(beta / gamma)") + ")^gamma",
        terms=("S",) if kaplan else ("E", "S"),
        shape=("alpha", "beta", "rho") if kaplan else ("alpha", "beta", "rho", "gamma"),
        lower=(1e-3, 1e-3, -60.0) if kaplan else (1e-3, 1e-3, -60.0, 0.02),
        upper=(5.0, 5.0, 60.0) if kaplan else (5.0, 5.0, 60.0, 5.0),
        grid=(GRID, GRID, (-2.0, 0.0, 2.0)) if kaplan else (GRID, GRID, (-2.0, 0.0, 2.0), (0.3, 1.0, 2.0)),
        basis=basis,
        published=("Nc", "alpha", "Dc", "beta") if kaplan else ("E", "Nc", "alpha", "Dc", "beta", "gamma"),
        publish=publish,
        value=value,
        exponents=exponents,
        profiles={name: (name, (), "scale" if name == "E" else "same") for name in same},
        shift=_no_shift,
    )


def _broken(variable: str, span: tuple[float, float]) -> Form:
    """E + A x^-alpha (1 + (x / d)^(1 / f))^(-f (beta - alpha)): exponent alpha before the break at d, beta after it."""
    low, high = span

    def basis(theta: Array, lx: Array) -> tuple[list[Array], Slopes]:
        alpha, beta, log_d, log_f = (theta[:, j, None] for j in range(4))
        f = np.exp(log_f)
        z = (lx[0] - log_d) / f
        soft = np.logaddexp(0.0, z)
        sigmoid = np.exp(z - soft)
        change = beta - alpha
        phi = np.exp(-alpha * (lx[0] - log_d) - change * f * soft)
        by_d = alpha + change * sigmoid
        by_f = -change * f * (soft - sigmoid * z)
        slopes: Slopes = [[(1, -(lx[0] - log_d) + f * soft)], [(1, -f * soft)], [(1, by_d)], [(1, by_f)]]
        return [_ONE, phi], slopes

    def publish(c: Array, theta: Array, centre: Array, scale: float) -> Array:
        # The coefficient is the reducible error at the break, times 2^(f (beta - alpha)).
        log_d = theta[:, 2] + centre[0]
        a = c[:, 1] * scale * np.exp(np.clip(theta[:, 0] * log_d, -690, 690))
        return np.stack([c[:, 0] * scale, a, theta[:, 0], theta[:, 1], np.exp(log_d), np.exp(theta[:, 3])], 1)

    def value(published: Array, log_x: Array) -> Array:
        e, a, alpha, beta, d, f = (published[:, [i]] for i in range(6))
        soft = np.logaddexp(0.0, (log_x[0] - np.log(d)) / f)
        with np.errstate(divide="ignore"):
            return e + np.exp(np.log(a) - alpha * log_x[0] - (beta - alpha) * f * soft)

    width = high - low
    return Form(
        name="broken",
        equation=f"y = E + A {variable}^-alpha (1 + ({variable} / d)^(1 / f))^(-f (beta - alpha))",
        terms=("E", "A"),
        shape=("alpha", "beta", "log_d", "log_f"),
        lower=(-2.0, 0.0, low, math.log(0.05)),
        upper=(5.0, 5.0, high, math.log(5.0)),
        grid=(
            (0.0, 0.1, 0.3, 0.6, 1.0), (0.05, 0.15, 0.4, 0.8, 1.3),
            tuple(low + width * share for share in (0.2, 0.35, 0.5, 0.65, 0.8)), (math.log(0.2), 0.0),
        ),
        basis=basis,
        published=("E", "A", "alpha", "beta", "d", "f"),
        publish=publish,
        value=value,
        exponents=("beta",),
        profiles={
            "E": ("E", (), "scale"), "alpha": ("alpha", (), "same"), "beta": ("beta", (), "same"),
            "d": ("log_d", (), "place"), "f": ("log_f", (), "exp"),
        },
        shift=_no_shift,
    )  # fmt: skip


def _upcycling(variables: Sequence[str]) -> Form:
    """E + A D1^-alpha1 D2^(-alpha2 + alpha3 log D1) (2502.03009): the more D1, the less D2 helps."""
    first, second = variables

    def basis(theta: Array, lx: Array) -> tuple[list[Array], Slopes]:
        product = lx[0] * lx[1]
        phi = np.exp(-theta[:, [0]] * lx[0] - theta[:, [1]] * lx[1] + theta[:, [2]] * product)
        return [_ONE, phi], [[(1, -lx[None, 0])], [(1, -lx[None, 1])], [(1, product[None])]]

    def publish(c: Array, theta: Array, centre: Array, scale: float) -> Array:
        a1, a2, a3 = theta.T
        m1, m2 = centre
        a = c[:, 1] * scale * np.exp(np.clip(a1 * m1 + a2 * m2 + a3 * m1 * m2, -690, 690))
        return np.stack([c[:, 0] * scale, a, a1 + a3 * m2, a2 + a3 * m1, a3], 1)

    def value(published: Array, log_x: Array) -> Array:
        e, a, a1, a2, a3 = (published[:, [i]] for i in range(5))
        with np.errstate(divide="ignore"):
            return e + np.exp(np.log(a) - a1 * log_x[0] - a2 * log_x[1] + a3 * log_x[0] * log_x[1])

    return Form(
        name="upcycling",
        equation=f"y = E + A {first}^-alpha1 {second}^(-alpha2 + alpha3 log {first})",
        terms=("E", "A"),
        shape=("a1", "a2", "a3"),
        lower=(-5.0, -5.0, -2.0),
        upper=(5.0, 5.0, 2.0),
        grid=((0.0, *GRID[:4]), (0.0, *GRID[:4]), (-0.02, 0.0, 0.02, 0.06)),
        basis=basis,
        published=("E", "A", "alpha1", "alpha2", "alpha3"),
        publish=publish,
        value=value,
        exponents=("alpha1", "alpha2", "alpha3"),
        profiles={
            "E": ("E", (), "scale"), "A": ("A", (0, 1), "scale"), "alpha1": ("a1", (1,), "same"),
            "alpha2": ("a2", (0,), "same"), "alpha3": ("a3", (), "same"),
        },
        shift=_shift_upcycling,
    )  # fmt: skip


LETTERS = (("A", "alpha"), ("B", "beta"), ("G", "gamma"), ("H", "eta"), ("K", "kappa"))
FORMS = {
    "power": "y = A / x^alpha",
    "power_floor": "y = E + A / x^alpha",
    "broken": "y = E + A x^-alpha (1 + (x / d)^(1 / f))^(-f (beta - alpha))",
    "additive": "y = E + A / N^alpha + B / D^beta",
    "joint": "y = E + ((Nc / N)^(alpha / gamma) + (Dc / D)^(beta / gamma))^gamma",
    "kaplan": "y = ((Nc / N)^(alpha / beta) + Dc / D)^beta",
    "test_time": "y = E + A / steps^alpha + B / members^beta + G / size^gamma + H / compute^eta (2 to 5 columns)",
    "upcycling": "y = E + A D1^-alpha1 D2^(-alpha2 + alpha3 log D1)",
    "hull": "y = A / x^alpha below all points: the iterated convex hull",
}
_COUNTS = {"power": 1, "power_floor": 1, "broken": 1, "hull": 1, "additive": 2, "joint": 2, "kaplan": 2, "upcycling": 2}


def variable_counts(name: str) -> tuple[int, int]:
    """The least and the greatest number of x columns of the form ``name``.

    Raises:
        UserError: there is no such form.
    """
    if name not in FORMS:
        raise UserError(f"--form: there is no '{name}'{did_you_mean(name, FORMS)}")
    return (2, len(LETTERS)) if name == "test_time" else (_COUNTS[name], _COUNTS[name])


def make_form(name: str, variables: Sequence[str], span: tuple[float, float] = (-3.0, 3.0)) -> Form:
    """The form ``name`` over these columns.

    Args:
        span: least and greatest centred log x of the first column; a break lies between.

    Raises:
        UserError: there is no such form, or it takes another number of columns.
    """
    least, most = variable_counts(name)
    if not least <= len(variables) <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        raise UserError(
            f"--form {name} takes {wanted} column{'s' * (wanted != '1')}, and --x names {len(variables)} "
            f"({', '.join(variables)}): {FORMS[name]}"
        )
    if name in ("power", "hull", "power_floor"):
        return _powers(name, variables, LETTERS[:1], floor=name == "power_floor")
    if name in ("additive", "test_time"):
        return _powers(name, variables, LETTERS[: len(variables)], floor=True)
    if name in ("joint", "kaplan"):
        return _joint(variables, kaplan=name == "kaplan")
    return _broken(variables[0], span) if name == "broken" else _upcycling(variables)
