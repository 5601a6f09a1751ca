"""The JSON files of a checkpoint: objects by name, and the index that says which shard holds which tensor."""

import json
from pathlib import Path


def read_object(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        ValueError: the file is no valid JSON, or something other than an object.
    """
    try:
        table = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}); download or write it again") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} is a JSON {type(table).__name__}, not an object; download or write it again")
    return table


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> name of its shard.

    Raises:
        ValueError: the index is no JSON object with such a table under "weight_map".
    """
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to files; download it again")
    return weight_map
