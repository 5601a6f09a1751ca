"""Several processes measure a model: the numbers of one process, to the last digit."""

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from qsvd import ranks
from qsvd.cli import run
from qsvd.evaluate.batches import Part
from tests.checkpoints import write_tokenizer
from tests.ranks.processes import each, lines, together
from tests.runs import BERT, TEXTS, labelled_rows, text_rows, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
CPU = ("--device", "cpu", "--batch-size", "2", "--json")


@pytest.fixture(scope="module")
def commands(tmp_path_factory, language):
    """One command for each measure."""
    folder = tmp_path_factory.mktemp("eval")
    base, source = str(language), str(language.parent / "source")
    (folder / "text.txt").write_text(" ".join(TEXTS[:5]))
    pairs = [{"prompt": text[:30], "completion": f"{text[30:50]} #### {number}"} for number, text in enumerate(TEXTS)]
    write_classifier(folder / "classifier")
    data = {
        "text": folder / "text.txt",
        "documents": write_rows(folder / "documents.jsonl", text_rows()[:5]),
        "one": write_rows(folder / "one.jsonl", text_rows()[:1]),
        "pairs": write_rows(folder / "pairs.jsonl", pairs[:5]),
        "labelled": write_rows(folder / "labelled.jsonl", labelled_rows(7)),
    }
    return {
        "perplexity of a text": (base, "--data", data["text"], "--window", 32, *CPU),
        "divergence of documents": (base, "--data", data["documents"], "--reference", source, *CPU),
        "fewer documents than processes": (base, "--data", data["one"], "--reference", source, *CPU),
        "loss of answers": (base, "--data", data["pairs"], "--task", "perplexity", *CPU),
        "exact match": (base, "--data", data["pairs"], "--max-new-tokens", 2, *CPU),
        "accuracy": (folder / "classifier", "--data", data["labelled"], *CPU),
    }


def write_classifier(folder):
    """A random BERT with two classes and the tokenizer of the embedded model."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "id2label": {0: "a", 1: "b"}}
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**BERT, **sizes)).save_pretrained(folder)
    write_tokenizer(folder)


def test_the_numbers_are_those_of_one_process_to_the_last_digit(commands, tmp_path, capsys):
    def measure_all(_):
        return max(run(["eval", *map(str, words)]) for words in commands.values())

    assert measure_all(None) == 0  # in this process, so that those that it forks need import nothing
    alone = dict(zip(commands, parsed(capsys.readouterr().out), strict=True))
    codes, shown = each(2, tmp_path / "shown", measure_all)
    assert codes == [0, 0], shown
    assert shown[1][0] == "", "the first process alone prints"
    divided = dict(zip(commands, parsed(shown[0][0]), strict=True))
    for name in commands:
        assert divided[name]["models"] == alone[name]["models"], name
        assert len(alone[name]["models"]) == 1
    assert divided["exact match"]["models"][0]["total"] == 5


def parsed(text):
    """The JSON objects in a text."""
    decoder, place, found = json.JSONDecoder(), 0, []
    while place < len(text):
        one, place = decoder.raw_decode(text, place)
        found.append(one)
        place += len(text[place:]) - len(text[place:].lstrip())
    return found


def test_what_is_refused_is_said_once(commands, tmp_path):
    codes, shown = together(2, tmp_path / "shown", "eval", *commands["loss of answers"], "--window", 10**6)
    assert codes == [2, 2]
    (line,) = lines(shown)
    assert "--window 1000000 is above " in line


def test_the_batches_are_divided_and_joined_in_their_order():
    batches = list("abcdefg")
    parts = [list(Part(rank, 3).of(batches)) for rank in range(3)]
    assert parts == [["a", "d", "g"], ["b", "e"], ["c", "f"]]


def test_many_bytes_go_through_the_store_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "PIECE", 1000)

    def exchange(rank):
        ranks.join()
        found = ranks.gather_bytes(bytes([rank]) * (2500 * rank))
        ranks.leave()
        return 0 if found == [b"", bytes([1]) * 2500] else 1

    assert each(2, tmp_path / "shown", exchange)[0] == [0, 0]
