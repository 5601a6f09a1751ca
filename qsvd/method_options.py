"""The options of `qsvd train` and `qsvd plan`, with those of the method that is chosen."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints

from qsvd.arguments import canonical
from qsvd.errors import BadInput
from qsvd.inputs.other_names import PLACES, REMEDIES, VALUES

NEAR = 0.8  # of difflib: a name this near to an option of all methods is a slip of the keys


def with_method(record: type, given: Mapping[Any, Any], *, is_help: bool = False) -> type:
    """Return the record, Train or Plan, with the own options of the method that is given, if they are needed.

    They are in the file of the method, which imports torch; without one of them among the names it is not read.

    Args:
        given: Values by our names or other tools'; of a flag without a value, an empty text.

    Raises:
        BadInput: a name is an option of another method.
    """
    names = get_type_hints(record)
    typed = {canonical(str(name).replace("_", "-"), names).replace("-", "_"): value for name, value in given.items()}
    unknown = [
        name
        for name in typed
        if name.removeprefix("no_") not in names and name.replace("_", "-") not in (*PLACES, "bf16")
    ]
    method = VALUES["method"].get(typed.get("method", ""), typed.get("method"))
    is_named = method in get_args(names["method"]) and method != "auto"
    if is_named and (is_help or unknown):
        from qsvd.adapters.methods.table import owners, with_options

        own = [name for name in unknown if str(method) in owners(name.removeprefix("no_"))]
        record = with_options(record, str(method)) if own or is_help else record
        unknown = [name for name in unknown if name not in own]
    strange = [
        name
        for name in unknown
        if name.replace("_", "-") not in REMEDIES and not get_close_matches(name, names, cutoff=NEAR)
    ]
    if strange and not is_help:
        from qsvd.adapters.methods.table import owners

        if of := owners(strange[0]):
            raise BadInput(f"--{strange[0].replace('_', '-')} is an option of --method {of[0]}: give both")
    return record
