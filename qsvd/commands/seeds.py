"""Seeds of single weights."""

import hashlib

from qsvd.plan.model import WeightSpec


def seed_of(seed: int, spec: WeightSpec) -> int:
    """A seed for this weight alone, so that neither the order nor a resumed run changes its sketch."""
    return int.from_bytes(hashlib.sha256(f"{seed} {spec.module}".encode()).digest()[:6])
