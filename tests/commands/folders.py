"""Folders before and after `qsvd quantize`, their dense equivalent, and what a command writes to stderr."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch

from tests.checkpoints import SHARED_MODELS

ADAPTER = "adapter_model.safetensors"


def files_of(folder):
    """Relative path -> bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tensors_of(folder):
    """Name -> tensor of every safetensors file that lies in the folder itself, but for an adapter's."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(path) if path.name != ADAPTER else {}
    return tensors


def components_of(folder):
    """Name -> tensor of the components of a quantized model; none at rank 0."""
    return safetensors.torch.load_file(folder / ADAPTER) if (folder / ADAPTER).is_file() else {}


def shared_model(name):
    """A really trained model, or a skip."""
    if not (SHARED_MODELS / name).is_dir():
        pytest.skip(f"models/{name} of the shared folder is not here")
    return SHARED_MODELS / name


def write_first_layers(source, folder, count):
    """A Llama or BERT without the layers after the first ones, tensor by tensor as it was; returns its folder."""
    folder.mkdir()
    for path in source.glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
    layer = re.compile(r"\.layers?\.(\d+)\.")
    kept = {n: t for n, t in tensors_of(source).items() if not (found := layer.search(n)) or int(found[1]) < count}
    safetensors.torch.save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_dense(source, folder, replaced):
    """The checkpoint `source` in float32, with some of its tensors replaced."""
    folder.mkdir()
    for path in source.glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    tensors = {name: tensor.float() for name, tensor in tensors_of(source).items()} | replaced
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


PROGRESS = re.compile(r" s left\n|\d+/[\d,]+ (weights|examples|answers|tokens)")
ALWAYS = ("Training: ", "Learning rate: ", "Done: ", "Next: ", "Time: ")  # starts of lines on stderr


def without_progress(err):
    """What was written to stderr, without progress, what is trained, and the last lines on the output."""
    lines = err.splitlines(keepends=True)
    return "".join(line for line in lines if not PROGRESS.search(line) and not line.startswith(ALWAYS))


def python_path():
    """Where the package under test lies, then what the environment names."""
    import qsvd

    return os.pathsep.join(filter(None, (str(Path(qsvd.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
