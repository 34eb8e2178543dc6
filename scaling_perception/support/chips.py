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

# A dimension of a slice's torus closes to a ring where its length is a multiple of this.
RINGS = {"v2": 16, "v3": 32, "v4": 4, "v5e": 16, "v5p": 4, "v6e": 16}

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
    chip = _chip(kind)
    return PEAKS[chip] if chip else None


def closes(kind: str, length: int) -> bool:
    """Whether a dimension of ``length`` devices of this kind is a ring."""
    ring = RINGS.get(_chip(kind) or "", 0)
    return bool(ring) and length % ring == 0


def _chip(kind: str) -> str | None:
    return None if kind in _UNKNOWN else next((chip for name, chip in _KINDS.items() if name in kind), None)
