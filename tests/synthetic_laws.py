"""Points made of known laws, one of every form."""

import numpy as np

from scaling_perception.scaling.law_forms import make_form
from scaling_perception.scaling.points import Points

TRUTHS = {  # published parameters, and ranges of x
    "power": ((28.93, 0.1504), ((1e10, 1e14),)),
    "power_floor": ((0.1, 150.0, 0.29), ((1e8, 1e13),)),
    "broken": ((0.05, 30.0, 0.1, 0.5, 1e11, 0.3), ((1e8, 1e14),)),
    "additive": ((1.69, 406.4, 0.34, 410.7, 0.28), ((5e7, 1.6e10), (1e9, 5e11))),
    "joint": ((1.5, 1e11, 0.3, 1e12, 0.25, 0.6), ((1e7, 1e10), (1e8, 1e12))),
    "kaplan": ((6.4e13, 0.076, 1.8e13, 0.103), ((1e6, 1e9), (2e7, 2e10))),
    "test_time": ((0.08, 0.2, 0.8, 0.05, 1.0, 3.0, 0.2), ((1, 200), (1, 50), (1e6, 1e9))),
    "upcycling": ((1.3, 100.0, 0.25, 0.15, 0.004), ((1e9, 1e12), (1e9, 1e11))),
}


def made(form: str, count: int, noise: float = 0.0, seed: int = 0) -> Points:
    """Points of a law: x log-uniform in its ranges, errors log-normal."""
    truth, ranges = TRUTHS[form]
    rng = np.random.default_rng(seed)
    log_x = np.stack([rng.uniform(np.log(low), np.log(high), count) for low, high in ranges])
    names = (
        ("steps", "ensemble", "params", "train_macs")[: len(ranges)]
        if form == "test_time"
        else ("a", "b")[: len(ranges)]
    )
    y = make_form(form, names).value(np.array([truth]), log_x)[0]
    return Points(np.exp(log_x), y * np.exp(noise * rng.normal(size=count)), names, "y")
