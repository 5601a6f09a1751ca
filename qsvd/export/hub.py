"""Upload of a finished folder to the Hub: one repository, one commit."""

import json
from collections.abc import Mapping
from pathlib import Path

from qsvd.errors import BadInput, QsvdError, first_line
from qsvd.files.atomic import read_object, write_json
from qsvd.files.layout import ADAPTER_CONFIG
from qsvd.files.trained.records import TEXTS
from qsvd.files.workspace import IDENTITY, LOCK, REPORT
from qsvd.inputs.paths import hub_id
from qsvd.options import Export, Quantize, Train

HUB = "hub.json"  # of an uploaded folder: its name on the Hub
NOT_UPLOADED = (
    HUB,
    IDENTITY,
    LOCK,
    REPORT,
    TEXTS,
)  # nor folders: checkpoints with their optimizers, and unfinished work


class UploadFailed(QsvdError):
    """The Hub did not take the files. They are complete on this machine."""


def open_repository(options: Quantize | Train | Export) -> str | None:
    """Make the repository of --push-to-hub, or take the one that is there; return its id, or None without the option.

    A repository that is there stays private or public, as it is.

    Raises:
        BadInput: the Hub cannot be reached, or refuses the name or the token.
    """
    from huggingface_hub import HfApi, errors

    name = options.push_to_hub
    if name is None:
        return None
    try:
        return HfApi().create_repo(name, private=not options.public, exist_ok=True).repo_id
    except (OSError, ValueError, errors.HTTPError) as error:
        raise BadInput(
            f"--push-to-hub {name}: the Hub cannot be reached or refuses the repository: {first_line(error)}; "
            "check the name and the token (`hf auth whoami`), or leave the option out"
        ) from error


def upload(folder: Path, name: str, replaced: Mapping[str, str]) -> str:
    """Upload the files of a folder, and record the name in its hub.json. Return the address of the repository.

    Args:
        replaced: Texts of files that differ on the Hub, by file name; the files on this machine stay as they are.

    Raises:
        UploadFailed: the Hub cannot be reached or refuses the files. Large files that it has are not sent again.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    files = {path.name: path for path in sorted(folder.iterdir()) if _is_uploaded(path)}
    contents = files | {file: text.encode() for file, text in replaced.items()}
    added = [CommitOperationAdd(file, content) for file, content in contents.items()]
    try:
        HfApi().create_commit(name, added, commit_message="Upload by qsvd")
    except (OSError, RuntimeError, ValueError, errors.HTTPError) as error:
        raise UploadFailed(
            f"the upload to {name} failed: {first_line(error.__cause__ or error)}; {folder} is complete. "
            "The same command tries again"
        ) from error
    write_json(folder / HUB, {"name": name})
    return f"{HfApi().endpoint}/{name}"


def _is_uploaded(path: Path) -> bool:
    return path.is_file() and path.name not in NOT_UPLOADED and not path.name.startswith(".")


def uploaded_name(folder: Path) -> str | None:
    """Return the Hub id of a folder that was uploaded, or downloaded into the Hub's cache; None if it is not known."""
    if (folder / HUB).is_file():
        return read_object(folder / HUB).get("name")
    return hub_id(str(folder), None)


def named_base(folder: Path, base: str | None) -> dict[str, str]:
    """Return adapter_config.json with the Hub id of its base, by file name; nothing if either is not there."""
    if base is None or not (folder / ADAPTER_CONFIG).is_file():
        return {}
    config = read_object(folder / ADAPTER_CONFIG) | {"base_model_name_or_path": base}
    return {ADAPTER_CONFIG: json.dumps(config, indent=2) + "\n"}
