"""Pictures of one evaluated image: truth, prediction, error and uncertainty side by side, as uint8 RGB."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling_perception.tasks import get_task
from scaling_perception.tasks.base import Estimate
from scaling_perception.tasks.colours import heat


def panel_pictures(raw: Mapping[str, Any], estimate: Estimate, protocol: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """image, prompt (where the task has one), truth, prediction, error, uncertainty, each uint8 (H, W, 3).

    Args:
        raw: the prepared sample.
    """
    drawn = get_task(protocol["task"]).panels(raw, estimate, protocol)
    return {"image": np.asarray(raw["image"]), **drawn, "uncertainty": heat(estimate.uncertainty)}
