"""What a run chooses by default, and says: the method of a model of several ranks, the rank of experts."""

import pytest
import torch

import qsvd
from qsvd.adapters.model import split_linears
from qsvd.plan.targets import is_expert
from qsvd.prepare.train import load_start, prepare_train
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.mixed import modules_of, write_table
from tests.runs import text_rows, training, write_rows


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "texts.jsonl", text_rows())


def model_of(folder, architecture, **options):
    write_checkpoint(folder, architecture, vocab_size=4096, **options)
    write_tokenizer(folder)
    return folder


def test_a_model_of_several_ranks_says_why_it_gets_new_adapters(tmp_path, data):
    source = model_of(tmp_path / "source", "LlamaForCausalLM")
    write_table(tmp_path / "table.txt", modules_of(source), ranks=(2, 0))
    chosen = {"allocation": tmp_path / "table.txt", "iterations": 1, "device": "cpu"}
    out = qsvd.quantize(source, out=tmp_path / "out", **chosen).path

    def said(model=out, **options):
        lines = prepare_train(training(model, data, tmp_path / "run", **options)).first_lines
        return [line for line in lines if line.startswith("Method")]

    assert said() == [
        "Method: lora, since 7 of 14 layers have no components: every layer gets a new adapter. --method pissa trains "
        "the stored components alone"
    ]
    assert said(method="lora") == said(method="pissa") == []
    even = qsvd.quantize(source, out=tmp_path / "even", rank=0, iterations=1, device="cpu").path
    assert said(even) == []


def test_an_expert_has_a_small_rank_and_the_scale_of_all_layers(tmp_path, data):
    source = model_of(tmp_path / "source", "MixtralForCausalLM", num_hidden_layers=1, hidden_size=128)
    out = qsvd.quantize(source, out=tmp_path / "out", rank=0, iterations=1, device="cpu").path
    options = {"method": "lora", "train_experts": True}
    run = prepare_train(training(out, data, tmp_path / "run", **options))
    assert "Experts: rank 16 each, the default for experts; --rank sets that of all layers" in run.first_lines
    ranks, scales = {}, set()
    model = load_start(run, is_resumed=False)
    for path, linear in split_linears(model):
        with torch.no_grad():
            linear.adapter.up.fill_(1.0)
        up_OK, down_KI = linear.adapter.factors()
        ranks.setdefault(is_expert(path), set()).add(len(down_KI))
        scales |= {round((up_OK[0, 0] * down_KI[0, 0] / linear.adapter.down[0, 0]).item(), 6)}
    assert ranks == {True: {16}, False: {64}}
    assert scales == {0.25}
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert run.placed.memory["trained parameters"].host == trained
    given = prepare_train(training(out, data, tmp_path / "run", rank=8, **options))
    assert not [line for line in given.first_lines if line.startswith("Experts")]


def test_a_classifier_has_no_output_head(tmp_path):
    source = model_of(tmp_path / "source", "LlamaForCausalLM")
    for task, head in (("causal", 4096 * 64 * 4), ("classification", 0)):
        answer = qsvd.plan(source, rank=4, device="cpu", task=task, max_length=16)
        assert answer.train.placed.memory["output head"].host == head
