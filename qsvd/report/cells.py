"""Numbers as the cells of a table."""

SIGNIFICANT = 4
LARGE = 10.0**SIGNIFICANT  # from here on four digits need an exponent
SMALL = 1e-4


def number(value: float) -> str:
    """Four significant digits: 0.09250, 12.34, 1.235e+04; zero is 0."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{SIGNIFICANT}g}")  # 9999.7 rounds up to a number of five digits
    if SMALL <= abs(rounded) < LARGE:
        return f"{rounded:#.{SIGNIFICANT}g}".rstrip(".")
    return f"{rounded:.{SIGNIFICANT - 1}e}"


def estimate(value: float, standard_error: float) -> str:
    """A number, with `± standard error` in two digits when it is not exact."""
    return number(value) if standard_error == 0 else f"{number(value)} ± {standard_error:.2g}"


def short_count(count: int) -> str:
    """A count of at most seven characters: 123,456 and then 1.235 M, 1.235 G, 1.235 T."""
    for power, unit in ((12, "T"), (9, "G"), (6, "M")):
        if count >= 10**power:
            return f"{number(count / 10**power)} {unit}"
    return f"{count:,}"
