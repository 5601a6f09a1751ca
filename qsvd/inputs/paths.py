"""What a model's name on the command line stands for: a local path or a Hub id. No torch, so that a wrong path is
refused at once."""

import re
from pathlib import Path

from qsvd.errors import BadInput, listing

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def local_path(name: str) -> Path | None:
    """Return the file or folder of this name, or None if there is none and the name may be a Hub id.

    Raises:
        BadInput: there is none, and the name cannot be a Hub id.
    """
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    if not HUB_ID.fullmatch(name):
        raise BadInput(f"no folder {name!r} here, and a Hub id looks like 'owner/name'")
    return None


def hub_id(name: str, revision: str | None) -> str | None:
    """Return the Hub id of a 16-bit model, or None if it is not known.

    Args:
        name: As it was given. A snapshot in the Hub's cache, .../models--owner--name/snapshots/COMMIT, names its id.
        revision: The Hub's commit if the name is an id; None for a folder.
    """
    if revision is not None:
        return name
    *_, cached, snapshots, _ = ("", "", "", *Path(name).expanduser().absolute().parts)
    parts = cached.split("--")
    return "/".join(parts[1:]) if snapshots == "snapshots" and parts[0] == "models" and len(parts) in (2, 3) else None


def checkpoint_folder(name: str) -> Path | None:
    """Return the local folder of a 16-bit model, or None if the name may be a Hub id.

    Raises:
        BadInput: the name is a file or cannot be a Hub id, or `check_checkpoint` refuses the folder.
    """
    folder = local_path(name)
    if folder is None:
        return None
    if folder.is_file():
        raise BadInput(f"{name!r} is a file; give the folder that holds it and config.json")
    check_checkpoint(folder)
    return folder


def check_checkpoint(folder: Path) -> None:
    """Check that a folder looks like a 16-bit model.

    Raises:
        BadInput: it has no config.json, holds GGUF files only, or holds an adapter of PEFT, too.
    """
    check_not_gguf(folder)
    if not (folder / "config.json").is_file():
        hint = adapter_hint(folder) or "give the folder of a transformers model"
        raise BadInput(f"no config.json in {folder}; {hint}")
    if (folder / "adapter_config.json").is_file() and not (folder / "qsvd.json").is_file():
        raise BadInput(
            f"{folder} holds a 16-bit model and an adapter of PEFT (adapter_config.json), which would not be read: "
            "merge the two, or move the files of the adapter to a folder of their own"
        )


def check_not_gguf(folder: Path) -> None:
    """Refuse a folder, or a file, of a GGUF model."""
    files = [folder] if folder.suffix == ".gguf" else folder.glob("*.gguf")
    gguf = sorted(path.name for path in files)
    if gguf and not any(folder.glob("*.safetensors")):
        raise BadInput(
            f"{folder} holds GGUF files ({listing(gguf)}), which are quantized or for llama.cpp only; "
            "give the 16-bit safetensors model that they were made from"
        )


def adapter_hint(folder: Path) -> str:
    """Return what to do with the folder of a PEFT adapter; "" if it is not one."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return ""
    base = re.search(r'"base_model_name_or_path"\s*:\s*"([^"]+)"', file.read_text(encoding="utf-8", errors="replace"))
    return f"this is an adapter of PEFT: give its base model{f', {base[1]}' if base else ''}"
