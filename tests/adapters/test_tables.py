"""Quantized embeddings and heads against transformers' own models with dense weights in float64.

The dense weights are decoded by docs/format.md and NumPy (tests/mixed.py). CLOSE: float32 sums of the same numbers; the
largest difference seen is 4e-6 of the largest logit.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from trl.trainer.utils import add_fused_lm_head

import qsvd
from qsvd.adapters.start import new_record, planner_of
from qsvd.errors import BadInput
from qsvd.files.split_folder import open_split
from qsvd.memory.items import Placement
from tests import mixed
from tests.checkpoints import GROUPED, SHARED_MODELS, write_checkpoint
from tests.commands.folders import tensors_of

CLOSE = 4e-5
TOKENS = torch.tensor([[5, 17, 3, 88, 41, 2, 60], [9, 9, 70, 1, 33, 12, 4]])
BOTH = {"head_bits": 4, "embedding_bits": 8}
OTHERS = {
    "Gemma3ForCausalLM": ("Gemma3TextConfig", GROUPED | {"head_dim": 8}),  # its embedding scales the rows
    "BartForConditionalGeneration": (  # one tensor for four modules
        "BartConfig",
        {"vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "scale_embedding": True}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    ),
}
CASES = {
    "untied": ("LlamaForCausalLM", {"tie_word_embeddings": False}, BOTH),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True, "hidden_size": 40, "head_dim": 8}, {"head_bits": 8}),
    "head alone": ("GPTNeoXForCausalLM", {"tie_word_embeddings": False}, {"head_bits": 8}),
    "scaled": ("Gemma3ForCausalLM", {}, {"embedding_bits": 8}),
    "four": ("BartForConditionalGeneration", {}, {"embedding_bits": 8}),
}


def made(folder, architecture, options, bits, rank=0):
    """A quantized model of random weights."""
    source = folder / "source"
    if architecture in OTHERS:
        kind, defaults = OTHERS[architecture]
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**(defaults | options))
        getattr(transformers, architecture)(config).to(torch.bfloat16).save_pretrained(source)
    else:
        write_checkpoint(source, architecture, **options)
    qsvd.quantize(source, out=folder / "out", rank=rank, iterations=1, device="cpu", **bits)
    return folder / "out"


def dense(out, kind="tables"):
    """The decoded matrices of embedding and head, or of the weights of the blocks, by their paths, float64."""
    stored = {name: tensor.reshape(-1) if tensor.ndim == 2 else tensor for name, tensor in tensors_of(out).items()}
    return {
        table["module"]: mixed.residual(table["codec"], name.removesuffix(".weight"), table["shape"], stored)
        for name, table in json.loads((out / "qsvd.json").read_text())[kind].items()
    }


def own_model(out, architecture):
    """transformers' own model in float64, with dense weights in the place of quantized ones."""
    kind = getattr(transformers, architecture)
    model = kind.from_pretrained(out.parent / "source", dtype=torch.float64).eval()
    with torch.no_grad():
        for module, matrix in (dense(out, "weights") | dense(out)).items():
            model.get_submodule(module).weight.copy_(torch.from_numpy(np.ascontiguousarray(matrix)))
    return model


def logits(model):
    inputs = {"input_ids": TOKENS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS.flip(1)
    with torch.no_grad():
        return model(**inputs).logits.double()


def assert_close(found, wanted):
    assert (found - wanted).abs().max() <= CLOSE * wanted.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_every_way_to_open_it_computes_with_the_decoded_tables(request, tmp_path, case):
    architecture, options, bits = CASES[case]
    out = request.getfixturevalue(case) if case == "tied" else made(tmp_path, architecture, options, bits)
    wanted = logits(own_model(out, architecture))
    loaded = qsvd.load(out, device="cpu", dtype=torch.float32)
    opened = getattr(transformers, architecture).from_pretrained(out, dtype=torch.float32).eval()
    assert_close(logits(loaded), wanted)
    assert torch.equal(logits(opened), logits(loaded))
    opened.tie_weights()
    assert_close(logits(opened), wanted)
    opened.save_pretrained(tmp_path / "saved")
    again = getattr(transformers, architecture).from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(opened))
    again.dequantize()
    assert_close(logits(again), wanted)
    head, embedding = again.get_output_embeddings(), again.get_input_embeddings()
    assert (head.weight is embedding.weight) == (case not in ("untied", "head alone"))
    if case != "four":  # qsvd export checks decoders only
        qsvd.export(out, to="merged", out=tmp_path / "merged", dtype="float32")
        merged = getattr(transformers, architecture).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        assert_close(logits(merged), wanted)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A Llama with a head in 4 bits and an embedding in 8, with components; tests only read it."""
    return made(tmp_path_factory.mktemp("untied"), *CASES["untied"], rank=4)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A Llama with one tensor for both, in 8 bits, without components."""
    return made(tmp_path_factory.mktemp("tied"), *CASES["tied"])


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_the_report_names_both_with_the_error_of_the_decoded_matrix(request, name):
    out = request.getfixturevalue(name)
    lines = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
    found = {line["name"]: line for line in lines if line["role"] in ("embedding", "head")}
    decoded, source = dense(out), tensors_of(out.parent / "source")
    assert found.keys() == decoded.keys()
    for module, matrix in decoded.items():
        error = np.linalg.norm(source[f"{module}.weight"].double().numpy() - matrix)
        assert found[module]["after"]["frobenius"] == pytest.approx(error, rel=1e-4)
        assert found[module]["rank"] == 0
    assert ("lm_head.weight" in tensors_of(out)) == (name == "untied")


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_the_loss_in_chunks_and_its_gradients_are_those_of_the_dense_model(request, name):
    out = request.getfixturevalue(name)
    model = qsvd.load(out, options=qsvd.AdapterOptions("lora", rank=2), device="cpu", dtype=torch.float32).train()
    other = qsvd.load(out, options=qsvd.AdapterOptions("lora", rank=2), device="cpu", dtype=torch.float32).train()
    for module, matrix in dense(out).items():
        own = torch.nn.Parameter(torch.from_numpy(matrix).float(), requires_grad=False)
        linear = torch.nn.Linear(*reversed(matrix.shape), bias=False)
        if module == "model.embed_tokens":
            other.set_submodule(module, torch.nn.Embedding.from_pretrained(own))
        linear.weight = own
        other.lm_head = linear if module == "lm_head" or name == "tied" else other.lm_head
    add_fused_lm_head(model)
    loss = model(input_ids=TOKENS, labels=TOKENS, fused_lm_head=True).loss
    wanted = other(input_ids=TOKENS, labels=TOKENS).loss  # transformers' own loss, of all logits
    assert loss.item() == pytest.approx(wanted.item(), rel=CLOSE)
    loss.backward()
    wanted.backward()
    trained, expected = ([p for p in m.parameters() if p.requires_grad] for m in (model, other))
    assert trained
    for mine, theirs in zip(trained, expected, strict=True):
        assert_close(mine.grad.double(), theirs.grad.double())


def test_an_embedding_in_cpu_memory_gives_the_same_bits(untied):
    placed = Placement(embeddings_on_host=True, resident=0, pages="host")
    model, other = (qsvd.load(untied, device="cpu", placement=place) for place in (placed, Placement()))
    assert torch.equal(logits(model), logits(other))
    assert torch.equal(logits(model.reference()), logits(other))


def test_a_tied_embedding_cannot_be_in_cpu_memory(tied):
    with pytest.raises(BadInput, match="is also its output head"):
        qsvd.load(tied, device="cpu", placement=Placement(embeddings_on_host=True))


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_the_plan_counts_the_bytes_of_the_files_and_of_the_decoded_head(request, name):
    out = request.getfixturevalue(name)
    split = open_split(out)
    plan = planner_of(split, torch.float32)(new_record(split, qsvd.AdapterOptions("lora", rank=2)))
    stored = {key: tensor.nbytes for key, tensor in tensors_of(out).items()}
    parts = [key for key in stored if key.startswith(("model.embed_tokens.", "lm_head."))]
    assert plan.dense.embeddings + plan.dense.head == sum(stored[key] for key in parts)
    head = transformers.AutoModelForCausalLM.from_pretrained(out.parent / "source").lm_head
    assert plan.decoded_head == 4 * head.weight.numel()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 asks for it
def test_an_adapter_of_peft_is_not_merged_into_a_decoded_head(untied):
    model = transformers.AutoModelForCausalLM.from_pretrained(untied, adapter_kwargs={"subfolder": "none"})
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    with pytest.raises(BadInput, match="would be lost"):
        adapted.merge_and_unload()


@pytest.mark.parametrize(
    ("architecture", "options", "bits", "says"),
    [
        ("LlamaForCausalLM", {"tie_word_embeddings": True}, BOTH, "shares its tensor with the token embedding"),
        ("BertModel", {}, {"head_bits": 8}, "has no output head"),
        ("ViTModel", {}, {"embedding_bits": 8}, "has no token embedding"),
    ],
)
def test_what_cannot_be_quantized_is_refused(tmp_path, architecture, options, bits, says):
    with pytest.raises(BadInput, match=says):
        made(tmp_path, architecture, options, bits)


def test_a_tied_head_that_is_stored_too_is_dropped_if_equal_and_refused_if_not(tmp_path):
    write_checkpoint(tmp_path / "source", tie_word_embeddings=False)
    config = json.loads((tmp_path / "source" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    options = {"rank": 0, "iterations": 1, "device": "cpu", "head_bits": 8}
    with pytest.raises(BadInput, match="have other values"):
        qsvd.quantize(tmp_path / "source", out=tmp_path / "out", **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    tensors = tensors_of(tmp_path / "source")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    qsvd.quantize(tmp_path / "source", out=tmp_path / "out", **options)
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    assert qsvd.load(tmp_path / "out", device="cpu").lm_head.weight.shape == model.lm_head.weight.shape


def test_an_allocation_of_bitsandbytes_is_refused(tmp_path):
    write_checkpoint(tmp_path / "source")
    mixed.write_table(tmp_path / "table.txt", mixed.modules_of(tmp_path / "source"), codecs=("nf4",), ranks=(0,))
    with pytest.raises(BadInput, match=r"with --head-bits or --embedding-bits: .* cannot be mixed"):
        qsvd.quantize(tmp_path / "source", out=tmp_path / "out", allocation=tmp_path / "table.txt", embedding_bits=8)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """A trained language model of 260,000 numbers, whose embedding and head are a quarter of its bytes."""
    out = tmp_path_factory.mktemp("stories") / "out"
    qsvd.quantize(SHARED_MODELS / "stories260K", out=out, rank=0, iterations=1, device="cpu", embedding_bits=8)
    return out


def test_a_trained_model_keeps_its_perplexity(stories):
    """Measured: 3.6598 with both in 16 bits, 3.6629 in 8; everything else in 4 bits."""
    source = SHARED_MODELS / "stories260K"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    lines = (SHARED_MODELS.parent / "data" / "tinystories-100.jsonl").read_text().splitlines()[:6]
    texts = [tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids[:, :256] for line in lines]
    model = qsvd.load(stories, device="cpu", dtype=torch.float32)
    found = perplexity(model, texts)
    own = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.set_submodule("model.embed_tokens", own.model.embed_tokens)
    model.lm_head = own.lm_head
    assert found == pytest.approx(perplexity(model, texts), rel=2e-3)
    sizes = [sum(f.stat().st_size for f in Path(folder).glob("*.safetensors")) for folder in (source, stories)]
    assert sizes[1] < 0.4 * sizes[0]


@torch.no_grad()
def perplexity(model, texts):
    losses = [model(input_ids=ids, labels=ids).loss.item() * (ids.numel() - 1) for ids in texts]
    return float(np.exp(sum(losses) / sum(ids.numel() - 1 for ids in texts)))


def test_a_run_is_trained_and_exported(stories, tmp_path):
    data = SHARED_MODELS.parent / "data" / "tinystories-100.jsonl"
    options = {"method": "lora", "rank": 4, "max_length": 64, "device": "cpu", "held_out": 0.0}
    qsvd.train(stories, str(data), out=tmp_path / "run", steps=1, batch_size=2, accumulate=1, **options)
    for kind in ("merged", "peft"):
        done = qsvd.export(tmp_path / "run", to=kind, out=tmp_path / kind)
        assert done.checked is not None
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
