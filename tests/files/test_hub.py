"""Models of the hub, with the hub's one download function replaced by a folder or by its errors."""

import fnmatch
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from qsvd.files.source import open_checkpoint
from tests.checkpoints import write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model: its files lie in hub/, a download copies those asked for into the cache."""
    source, cache = tmp_path / "hub", tmp_path / "snapshots" / COMMIT
    revisions = iter([None, COMMIT, COMMIT, COMMIT])  # the newest at first, and then the same one

    def snapshot_download(model, *, revision, allow_patterns, ignore_patterns=()):
        assert (model, revision) == ("owner/name", next(revisions))
        for path in source.rglob("*"):
            name = path.relative_to(source).as_posix()
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if path.is_file() and wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return source, cache


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "8KB"}], ids=["single", "sharded"])
def test_config_tokenizer_and_safetensors_are_downloaded_and_nothing_else(hub, options):
    source, cache = hub
    stored = write_checkpoint(source, **options).state_dict()
    needed = sorted(path.name for path in source.iterdir())
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf", "model.onnx"):
        (source / name).write_text("large")
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    templates = source / "additional_chat_templates"  # where transformers keeps all but the default one
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ tools }}")
    checkpoint = open_checkpoint("owner/name")
    assert sorted(path.name for path in cache.iterdir()) == sorted([*needed, templates.name])
    assert checkpoint.other_files[0] == cache / templates.name / "tool_use.jinja"
    assert (checkpoint.name, checkpoint.folder, checkpoint.revision) == ("owner/name", cache, COMMIT)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in stored.items())


def test_pickled_weights_are_downloaded_when_there_are_no_others(hub):
    source, _ = hub
    stored = write_checkpoint(source).state_dict()
    (source / "model.safetensors").unlink()
    torch.save(stored, source / "pytorch_model.bin")
    assert open_checkpoint("owner/name").tensors.keys() == stored.keys()


@pytest.mark.parametrize("model", ["./absent", "/absent/folder", "a/b/c", "~/absent", "", "name with spaces"])
def test_what_looks_like_a_path_is_not_looked_up(model, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    with pytest.raises(ValueError, match=r"no folder '.*' here, and a Hub id looks like 'owner/name'"):
        open_checkpoint(model)


class Response:
    """As much of an HTTP response as the hub's errors look at."""

    headers: dict = {}  # noqa: RUF012
    request = None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RepositoryNotFoundError("404", response=Response()), "and no such model on the hub"),
        (errors.GatedRepoError("403", response=Response()), "is gated: accept its terms there"),
        (errors.LocalEntryNotFoundError("No network\nand more"), r"\(offline\?\): No network$"),
        (errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set"), r"\(offline\?\): HF_HUB_OFFLINE is set$"),
        (errors.RevisionResolutionError("no commit"), r"\(offline\?\): no commit$"),
        (ConnectionError(), r"\(offline\?\): ConnectionError$"),
        (errors.HFValidationError("bad id"), r"\(offline\?\): bad id$"),
    ],
)
def test_errors_of_the_hub_become_one_sentence(monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=message) as raised:
        open_checkpoint("owner/name")
    assert "owner/name" in str(raised.value)
    assert "\n" not in str(raised.value)
