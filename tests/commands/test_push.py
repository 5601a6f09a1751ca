"""--push-to-hub: what arrives at a Hub on this machine, and that plain transformers opens it from there.

The server speaks the calls of huggingface_hub 2.4 with the LFS protocol, not Xet.
"""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM

from qsvd import load
from qsvd.cli import run
from tests.adapters.results import in_float32
from tests.checkpoints import write_checkpoint
from tests.commands.hub_server import TOKEN, Hub
from tests.runs import text_rows, write_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning"),  # huggingface_hub's own call
]


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def qsvd(hub, tmp_path, monkeypatch, capsys):
    """Run a command with that Hub; returns stdout and stderr."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)  # read from HF_ENDPOINT at the import, as the next
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))

    def command(*words, token=TOKEN, code=0):
        monkeypatch.setenv("HF_TOKEN", token)
        capsys.readouterr()
        found = run([str(word) for word in words])
        out, err = capsys.readouterr()
        assert found == code, err
        return out, err

    return command


def opens_by_its_name(name, folder):
    """Plain transformers opens the Hub's model by its name as qsvd opens the folder."""
    ids = torch.arange(1, 9)[None]
    theirs = in_float32(AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32))(input_ids=ids).logits
    ours = load(folder, device="cpu")(input_ids=ids).logits
    assert (theirs - ours).abs().max() < 1e-5 * ours.abs().max()


def test_a_quantized_model_arrives_whole_and_opens_by_its_name(hub, qsvd, tmp_path):
    write_checkpoint(tmp_path / "source", hidden_size=64, intermediate_size=128)
    out = tmp_path / "out"
    command = ("quantize", tmp_path / "source", "--out", out, "--rank", "8", "--push-to-hub", "me/tiny")
    assert qsvd(*command)[0].endswith(f"{out}\n{hub.address}/me/tiny\n")
    repository = hub.repositories["me/tiny"]
    assert repository["private"]
    here = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "report.html"}  # it has paths
    there = repository["files"]
    assert set(there) == set(here) - {"hub.json"}
    assert {name for name in there if there[name] != here[name]} == {"README.md", "adapter_config.json"}
    assert json.loads(here["adapter_config.json"])["base_model_name_or_path"] is None
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == "me/tiny"
    card = ModelCard(there["README.md"].decode())
    assert card.data.to_dict() == ModelCard.load(out / "README.md").data.to_dict()
    assert 'from_pretrained("me/tiny")' in card.text
    assert str(tmp_path / "out") not in card.text
    opens_by_its_name("me/tiny", out)
    assert "complete already" in qsvd(*command, "--public")[1]
    assert repository["private"], "a repository that exists stays as it is"


def test_a_run_and_its_export_name_the_quantized_model_and_leave_checkpoints_at_home(hub, qsvd, language, tmp_path):
    out, trained = shutil.copytree(language, tmp_path / "out"), tmp_path / "run"
    data = write_rows(tmp_path / "data.jsonl", text_rows())
    flags = ("--steps", "2", "--save-every", "1", "--batch-size", "2", "--max-length", "32", "--device", "cpu")
    train = ("train", out, data, "--out", trained, *flags, "--push-to-hub", "tuned", "--public")
    assert "is not on the Hub as far as is known" in qsvd(*train)[1]
    (out / "hub.json").write_text('{"name": "me/tiny"}')
    (trained / "texts.json").write_text("{}")  # it has texts of the data
    assert "is not on the Hub" not in qsvd(*train, "--resume")[1]
    repository = hub.repositories["me/tuned"]
    assert not repository["private"]
    assert set(repository["files"]) == {path.name for path in trained.iterdir() if path.is_file()} - {
        "report.html",
        "hub.json",
        "run.json",
        "lock",
        "texts.json",
    }
    assert repository["files"]["qsvd_adapter.safetensors"] == (trained / "qsvd_adapter.safetensors").read_bytes()
    card = ModelCard(repository["files"]["README.md"].decode())
    assert card.data.base_model == "me/tiny"
    assert "hf download me/tuned --local-dir tuned\nhf download me/tiny --local-dir tiny" in card.text
    assert "qsvd.load('tiny', adapter='tuned')" in card.text
    for to, base in (("peft", "me/tiny"), ("merged", None)):
        qsvd("export", trained, "--to", to, "--out", tmp_path / to, "--no-check", "--push-to-hub", f"me/{to}")
        files = hub.repositories[f"me/{to}"]["files"]
        assert ModelCard(files["README.md"].decode()).data.base_model == base
    config = json.loads(hub.repositories["me/peft"]["files"]["adapter_config.json"])
    assert config["base_model_name_or_path"] == "me/tiny"


@pytest.mark.parametrize(
    ("words", "token", "sentence"),
    [
        (("--push-to-hub", "a b"), TOKEN, "--push-to-hub 'a b' is not a name of the Hub, which looks like owner/name"),
        (("--push-to-hub", "me/tiny"), "", "needs a token of the Hub: run `hf auth login`, or set HF_TOKEN"),
        (("--push-to-hub", "me/tiny"), "hf_old", "refuses the repository: "),
        (("--push-to-hub", "others/tiny"), TOKEN, "refuses the repository: "),
        (("--public",), TOKEN, "--public is for --push-to-hub NAME: give both"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_any_work(hub, qsvd, tmp_path, words, token, sentence):
    write_checkpoint(tmp_path / "source")
    command = ("quantize", tmp_path / "source", "--out", tmp_path / "out", "--rank", "4")
    _, error = qsvd(*command, *words, token=token, code=2)
    assert sentence in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not hub.repositories


def test_a_failed_upload_leaves_a_complete_folder_and_the_same_command_tries_again(hub, qsvd, tmp_path):
    write_checkpoint(tmp_path / "source")
    out = tmp_path / "out"
    command = ("quantize", tmp_path / "source", "--out", out, "--rank", "4", "--push-to-hub", "me/tiny")
    hub.is_full = True
    assert "is complete. The same command tries again" in qsvd(*command, code=1)[1]
    assert (out / "qsvd.json").is_file()
    assert not (out / "hub.json").exists()
    hub.is_full = False
    qsvd(*command)
    assert hub.repositories["me/tiny"]["files"]["model.safetensors"] == (out / "model.safetensors").read_bytes()
