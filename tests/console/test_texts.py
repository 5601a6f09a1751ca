"""What a model writes before and after training: by a greedy loop of its own, and without a trace in the training."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from qsvd.commands.demo import MODEL
from qsvd.console.texts import NEW_TOKENS, PROMPT_TOKENS, texts_after, texts_before
from qsvd.data.columns import UNTRAINED, Tokenized
from qsvd.data.row_files import Places
from tests.checkpoints import write_checkpoint

COUNT = 9
PROMPT = "The old man looked at the sea and said that the ships would never come back to the harbour"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def data_of(tokenizer, prompts, answers=("",), *, masked=True):
    pairs = [(tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]) for prompt, answer in
             zip(prompts, answers, strict=True)]  # fmt: skip
    rows = [first + second for first, second in pairs]
    labels = [([UNTRAINED] * len(first) if masked else first) + second for first, second in pairs]
    return Tokenized("pair" if masked else "text", rows, labels, Places("d", [[1]] * len(rows), "line"))


def run_of(tokenizer, train, held_out=None, *, steps=16, accumulate=2):
    data = SimpleNamespace(tokenizer=tokenizer, train=train, held_out=held_out, is_encoder_decoder=False)
    settings = SimpleNamespace(accumulate=accumulate)
    return SimpleNamespace(data=data, settings=settings, total_steps=steps, device=torch.device("cpu"))


@torch.no_grad()
def decoded(model, tokens, count):
    """What a decoder writes after its first token, which reads `tokens` through its encoder."""
    found = [model.config.decoder_start_token_id]
    for _ in range(count):
        read = {"input_ids": torch.tensor([tokens]), "decoder_input_ids": torch.tensor([found])}
        found.append(int(model(**read, use_cache=False).logits[0, -1].argmax()))
    return found[1:]


@torch.no_grad()
def greedily(model, tokens, count, end):
    """The most probable token after all tokens, one forward pass each."""
    found = [*tokens]
    for _ in range(count):
        found.append(int(model(torch.tensor([found]), use_cache=False).logits[0, -1].argmax()))
        if found[-1] == end:
            return found[len(tokens) : -1]
    return found[len(tokens) :]


def test_texts_are_the_most_probable_tokens_after_the_ends_of_the_held_out_prompts(tokenizer, model):
    long = f"{PROMPT}. " * 6
    prompts, answers = [PROMPT, long, "Once", "a fourth"], [" in the evening", " again", " upon", " is left out"]
    held_out = data_of(tokenizer, prompts, answers)
    run = run_of(tokenizer, data_of(tokenizer, ["none"], [" of these"]), held_out, steps=2 * COUNT)
    found = texts_before(run, model.eval())
    assert (found.new_tokens, len(found.examples)) == (COUNT, 3)
    for prompt, answer, one in zip(prompts, answers, found.examples, strict=False):
        tokens = tokenizer(prompt)["input_ids"][-PROMPT_TOKENS:]
        written = greedily(model, tokens, COUNT, tokenizer.eos_token_id)
        assert one.before == tokenizer.decode(written, skip_special_tokens=True)
        assert (one.prompt, one.expected) == (tokenizer.decode(tokens, skip_special_tokens=True), answer)
        assert one.after is None


def test_a_text_is_continued_from_its_middle_and_its_end_is_what_the_data_have(tokenizer, model):
    train = data_of(tokenizer, [PROMPT], masked=False)
    (one,) = texts_before(run_of(tokenizer, train), model).examples
    tokens = train.input_ids[0]
    middle = len(tokens) // 2
    assert one.prompt == tokenizer.decode(tokens[:middle], skip_special_tokens=True)
    assert one.expected == tokenizer.decode(tokens[middle : middle + 8], skip_special_tokens=True)


def test_an_encoder_reads_the_end_of_a_prompt_and_a_decoder_writes(tokenizer, tmp_path):
    sizes = {"vocab_size": 4096, "decoder_start_token_id": 300, "tie_word_embeddings": False}
    write_checkpoint(tmp_path / "t5", "T5ForConditionalGeneration", **sizes)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5", dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    prompt = f"{PROMPT}. " * 6
    run = run_of(tokenizer, data_of(tokenizer, [prompt], [" in the evening"]))
    run.data.is_encoder_decoder = True
    (one,) = texts_before(run, model.eval()).examples
    tokens = tokenizer(prompt)["input_ids"][-PROMPT_TOKENS:]
    assert one.prompt == tokenizer.decode(tokens, skip_special_tokens=True)
    assert one.before == tokenizer.decode(decoded(model, tokens, 8), skip_special_tokens=True) != ""
    assert one.expected == " in the evening"


def test_no_draw_and_no_mode_of_the_training_changes(tokenizer, model):
    run = run_of(tokenizer, data_of(tokenizer, [PROMPT], [" now"]))
    model.train()
    model.generation_config.do_sample = True
    torch.manual_seed(7)
    state, weights = torch.get_rng_state(), {name: t.clone() for name, t in model.state_dict().items()}
    first = texts_before(run, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.is_inference() for parameter in model.parameters())
    with torch.no_grad():
        model.get_output_embeddings().weight.neg_()
    later = texts_after(run, model, first)
    assert [one.before for one in later.examples] == [one.before for one in first.examples]
    assert later.examples[0].after not in (None, first.examples[0].before)
    with torch.no_grad():
        model.get_output_embeddings().weight.neg_()


def test_a_short_run_has_short_texts_or_none_and_so_has_one_that_writes_none(tokenizer, model):
    train = data_of(tokenizer, [PROMPT], [" now"])
    assert texts_before(run_of(tokenizer, train, steps=16), model).new_tokens == 8
    assert texts_before(run_of(tokenizer, train, steps=10**6), model).new_tokens == NEW_TOKENS
    assert texts_before(run_of(tokenizer, train, steps=15), model) is None
    labelled = Tokenized("labelled", train.input_ids, [0], train.places, label_names=("a", "b"))
    assert texts_before(run_of(tokenizer, labelled), model) is None
    assert texts_after(run_of(tokenizer, train), model, None) is None


def test_a_model_that_cannot_write_has_no_texts_and_its_run_goes_on(tokenizer, model, monkeypatch, capsys):
    def generate(**_):
        raise RuntimeError("shapes differ\nthere")

    monkeypatch.setattr(model, "generate", generate)
    assert texts_before(run_of(tokenizer, data_of(tokenizer, [PROMPT], [" now"])), model.train()) is None
    assert model.training
    assert "the page of this run will have no new texts: shapes differ\n" in capsys.readouterr().err
