"""OUT/README.md and RUN/README.md are model cards: huggingface_hub's own loader reads them."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard

import qsvd
from qsvd.cli import run
from qsvd.commands.train import train
from qsvd.inputs.paths import hub_id
from tests.checkpoints import write_checkpoint
from tests.commands.measurements import few_candidates
from tests.runs import text_rows, training, write_rows

CARD = "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\nlanguage: de\ntags: [x]\n---\n# A model\n"
APACHE = "\n                         Apache License\n                   Version 2.0, January 2004\n"


def quantized(source, out, **options):
    write_checkpoint(source)
    return qsvd.quantize(qsvd.Quantize(str(source), out=out, rank=4, iterations=1, **options))


@pytest.mark.parametrize(
    ("card", "license_", "expected"),
    [
        (CARD, APACHE, {"license": "other", "license_name": "llama3", "license_link": "LICENSE", "language": "de"}),
        ("no header", APACHE, {"license": "apache-2.0"}),
        ("---\n- a list\n---\n", "MIT License\n\nCopyright", {"license": "mit"}),
        ("---\na: [\n---\n", "Terms of our own", {}),
    ],
)
def test_the_license_is_that_of_the_16_bit_model(tmp_path, card, license_, expected):
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text(card)
    (source / "LICENSE.txt").write_text(license_)
    found = ModelCard.load(quantized(source, tmp_path / "out") / "README.md").data.to_dict()
    assert {key: found[key] for key in found if key.startswith("lic") or key == "language"} == expected
    assert found["pipeline_tag"] == "text-generation"
    assert "base_model" not in found, "a local folder has no name on the Hub"


def test_a_snapshot_of_the_hubs_cache_names_the_base_model_and_the_table_is_that_of_the_report(tmp_path):
    out = quantized(tmp_path / "models--owner--tiny" / "snapshots" / "0123", tmp_path / "out")
    card = ModelCard.load(shutil.move(out, tmp_path / "moved") / "README.md")
    assert card.data.base_model == "owner/tiny"
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert card.data.library_name == "transformers"
    assert {"qsvd", "quantization", "4-bit"} <= set(card.data.tags)
    total = next(
        line for line in (tmp_path / "moved" / "report.md").read_text().splitlines() if line.startswith("| all")
    )
    cells = [cell.strip() for cell in total.split("|")[1:]]
    assert f"| {' | '.join([*cells[:2], *cells[3:7]])} |" in " ".join(card.text.split())


def test_a_hub_id_is_known_only_where_it_stands():
    assert hub_id("owner/tiny", "0123") == "owner/tiny"
    assert hub_id("owner/tiny", None) is None
    assert hub_id("/cache/models--gpt2/snapshots/0123", None) == "gpt2"


@pytest.mark.slow
def test_the_card_of_a_run_has_the_license_and_base_of_its_quantized_model(language, tmp_path):
    out = shutil.copytree(language, tmp_path / "out")
    text = (out / "README.md").read_text()
    (out / "README.md").write_text(text.replace("---\n", "---\nbase_model: owner/tiny\nlicense: mit\n", 1))
    data = write_rows(tmp_path / "data.jsonl", text_rows())
    card = ModelCard.load(train(training(out, data, tmp_path / "run", steps=1)) / "README.md")
    assert (card.data.base_model, card.data.license) == ("owner/tiny", "mit")
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert card.data.pipeline_tag == "text-generation"


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (["--exclude", "*.0.self_attn.k_proj"], True),
        (["--exclude", "*.self_attn.*"], False),
        (["--exclude", "*.0.self_attn.k_proj", "--budget", "6bits"], False),  # vLLM does not load it at all
    ],
)
def test_a_part_of_a_joined_layer_in_16_bits_is_warned_of(tmp_path, capsys, monkeypatch, options, warned):
    few_candidates(monkeypatch, 0, 4)
    write_checkpoint(tmp_path / "source")
    words = ["quantize", str(tmp_path / "source"), "--out", str(tmp_path / "out"), "--rank", "4", "--iterations", "1"]
    assert run([*words, *options]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(lines) == warned
    if warned:
        assert "a part of model.layers.0.self_attn.qkv_proj in 16 bits; vLLM" in lines[0]
    assert json.loads((tmp_path / "out" / "qsvd.json").read_text())
