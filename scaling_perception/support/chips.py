"""The one table of what chips can compute at most."""

# Dense bfloat16 FLOP/s of one device as JAX counts them (makers' data sheets). Of TPU v2, v3 and 7x, a device is half a
# chip.
PEAKS = {
    "v2": 23e12,
    "v3": 61.5e12,
    "v4": 275e12,
    "v5e": 197e12,
    "v5p": 459e12,
    "v6e": 918e12,
    "v7x": 1153.5e12,
    "a100": 312e12,
    "h100": 989e12,
    "h100-pcie": 756e12,
    "h200": 989e12,
}

# What a device's kind holds -> its chip; the first that is found counts.
_KINDS = {
    "TPU v2": "v2",
    "TPU v3": "v3",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "TPU7x": "v7x",
    "A100": "a100",
    "H100 PCIe": "h100-pcie",
    "H100": "h100",
    "H200": "h200",
}
_UNKNOWN = ("TPU v4 lite",)


def peak_flops(kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device of this kind (``jax.Device.device_kind``), or None where they are not known."""
    if kind in _UNKNOWN:
        return None
    return next((PEAKS[chip] for name, chip in _KINDS.items() if name in kind), None)
