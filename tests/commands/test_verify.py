"""`qsvd verify`: every changed byte of a file that is read back is found, and named with its file."""

import re
import shutil

import pytest

from qsvd.cli import run
from tests.runs import text_rows, training, words, write_rows
from tests.sealed import reseal, without_digests


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """OUT, a run with a checkpoint, and an export."""
    top = tmp_path_factory.mktemp("verified")
    out = shutil.copytree(tiny, top / "out")
    options = training(out, write_rows(top / "data.jsonl", text_rows()), top / "run", steps=1, any_start=True)
    assert run(words(options)) == 0
    assert run(["export", str(top / "run"), "--out", str(top / "lora"), "--to", "peft", "--no-check"]) == 0
    (top / "data.jsonl").unlink()
    return top


RECORDS = {"summary.json", "qsvd_export.json"}  # no other file names them
NEVER_READ = {
    "README.md",
    "report.md",
    "report.html",
    "allocation.txt",
}  # again by qsvd
OTHERS = {"adapter_config.json", "training_args.bin"}  # PEFT's, of a run or an export; written by transformers


def test_what_qsvd_wrote_is_as_it_was(folder, capsys):
    assert run(["verify", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "are as they were written\nnot checked, since they have no digests: " in out
    plain = out.partition("digests: ")[2].strip().split(", ")
    assert {path.rpartition("/")[2] for path in plain} <= OTHERS
    every = [path for path in folder.rglob("*") if path.is_file()]
    checked, total = map(int, re.search(r": (\d+) of (\d+) files \(", out).groups())
    assert total == len(every)
    assert checked == total - len(plain) - sum(path.name in NEVER_READ for path in every)


def test_a_changed_byte_of_any_file_is_found(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "copy")
    paths = [path for path in sorted(copy.rglob("*")) if path.is_file() and path.name not in NEVER_READ | OTHERS]
    assert len(paths) > 20
    for path in paths:
        content, part = path.read_bytes(), copy / path.relative_to(copy).parts[0]
        for place in (len(content) // 3, len(content) - 3):
            broken = bytearray(content)
            broken[place] ^= 2
            path.write_bytes(broken)
            assert (run(["verify", str(part)]), path) == (1, path)
            said = capsys.readouterr().err
            assert f"{path.name} is " in said or f"of {path} is " in said, said
        path.write_bytes(content)
        if path.suffix != ".jsonl":
            path.unlink()
            is_named = path.name not in RECORDS
            assert (run(["verify", str(copy)]), path) == (int(is_named), path)
            said = capsys.readouterr().err
            assert not is_named or f"{path} is missing" in said or f"{path.parent} lacks {path.name}" in said
            path.write_bytes(content)
    assert run(["verify", str(copy)]) == 0


def test_a_run_without_its_summary_or_with_an_adapter_of_another_file_is_found(folder, tmp_path, capsys):
    copy = shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copyfile(folder / "out" / "adapter_model.safetensors", copy / "adapter_model.safetensors")
    assert run(["verify", str(copy)]) == 1
    assert "adapter_model.safetensors is not the file that was written with summary.json" in capsys.readouterr().err
    shutil.copyfile(folder / "run" / "adapter_model.safetensors", copy / "adapter_model.safetensors")
    summary, checkpoint = (copy / "summary.json").read_text(), next(copy.glob("checkpoint-*"))
    (copy / "summary.json").write_text("[" * 10**5)
    (checkpoint / "qsvd_files.json").rename(copy / "elsewhere")
    assert run(["verify", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"{copy}/summary.json is damaged: it has no digest; {checkpoint} lacks qsvd_files.json" in said
    (checkpoint / "qsvd_files.json").symlink_to("nowhere")
    (copy / "summary.json").write_text(summary)
    assert run(["verify", str(copy)]) == 1
    assert f"{checkpoint}/qsvd_files.json is a link to a file that is not there" in capsys.readouterr().err
    (copy / "elsewhere").replace(checkpoint / "qsvd_files.json")
    assert run(["verify", str(copy)]) == 0
    (copy / "summary.json").unlink()
    assert run(["verify", str(copy)]) == 1
    assert f"{copy} lacks summary.json: it is not finished" in capsys.readouterr().err


def test_what_no_record_names_is_missed_in_a_run(folder, tmp_path, capsys):
    copy = shutil.copytree(folder / "run", tmp_path / "run")
    (copy / "adapter_config.json").rename(tmp_path / "elsewhere")
    assert run(["verify", str(copy)]) == 1
    assert f"{copy} lacks adapter_config.json" in capsys.readouterr().err
    (tmp_path / "elsewhere").replace(copy / "adapter_config.json")
    for name in ("summary.json", "run.json"):  # as a run that is not finished
        (copy / name).unlink()
    assert run(["verify", str(tmp_path)]) == 1
    assert f"{copy} lacks run.json" in capsys.readouterr().err


def test_one_file_is_checked_alone_and_what_others_wrote_is_not(folder, tmp_path, capsys):
    assert run(["verify", str(folder / "out" / "model.safetensors")]) == 0
    assert "1 files (" in capsys.readouterr().out
    (tmp_path / "config.json").write_text("{}")
    for path, said in ((tmp_path, "has no files with digests"), (tmp_path / "nowhere", "no folder or file")):
        assert run(["verify", str(path)]) == 2
        assert said in capsys.readouterr().err


def test_a_config_that_was_changed_on_purpose_is_accepted_and_a_shard_is_not(folder, tmp_path, capsys):
    out = shutil.copytree(folder / "out", tmp_path / "out")
    config = out / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 20000.0') + "\n")
    (tmp_path / "text.txt").write_text("A text.")
    assert run(["eval", str(out), "--data", str(tmp_path / "text.txt")]) == 1
    said = capsys.readouterr().err
    assert (
        f"config.json in {out} differ from what qsvd quantize wrote; copy the folder again, or give qsvd verify" in said
    )
    assert run(["verify", str(out), "--accept"]) == 0
    assert capsys.readouterr().out.startswith(f"{config} is accepted as it is\n{out}: ")
    assert run(["verify", str(out)]) == 0
    shard = out / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert run(["verify", str(out), "--accept"]) == 1
    shard.unlink()
    capsys.readouterr()
    assert run(["verify", str(out), "--accept"]) == 1
    assert f"{out} lacks model.safetensors; copy the folder again" in capsys.readouterr().err


def test_residuals_of_an_older_version_are_compared_with_the_digests_that_it_wrote(folder, tmp_path, capsys):
    out = without_digests(shutil.copytree(folder / "out", tmp_path / "out"))
    assert run(["verify", str(out), "--accept"]) == 2
    assert run(["verify", str(out)]) == 0
    name = "model.layers.0.mlp.down_proj.weight"
    reseal(out / "qsvd.json", lambda manifest: manifest["weights"][name].update(residual_sha256="0" * 64))
    capsys.readouterr()
    assert run(["verify", str(out)]) == 1
    assert "its fingerprint is not that of its weights" in capsys.readouterr().err
