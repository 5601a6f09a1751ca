"""How far a share that was counted on some examples may be from the share on all."""

import math

NORMAL_975 = 1.959963984540054  # the normal distribution's 97.5% quantile: two sides of a 95% interval


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """The 95% score interval of a share, in 0..1 even for none or all (Wilson 1927, JASA 22, page 209).

    Args:
        count: Examples that have the property, 0..total.
        total: Examples, at least 1, drawn independently.
    """
    assert 0 <= count <= total, "what was counted is among all"
    assert total, "a measure without examples is refused before it is one"
    share, squared = count / total, NORMAL_975**2
    middle = (count + squared / 2) / (total + squared)
    half = NORMAL_975 / (total + squared) * math.sqrt(total * share * (1 - share) + squared / 4)
    return max(0.0, middle - half), min(1.0, middle + half)
