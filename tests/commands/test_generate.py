"""`qsvd generate`: its tokens are those of transformers' own generate, and they are printed while they are made."""

import io
import shutil
import signal

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import qsvd
from qsvd.cli import run as command
from qsvd.commands import generate as qsvd_generate
from tests.checkpoints import write_checkpoint
from tests.commands.folders import shared_model, write_dense
from tests.commands.trained_runs import LABELS, factors_of, trained_weights, write_run
from tests.data.templates import CHATML
from tests.export.cases import residual

pytestmark = pytest.mark.slow
PROMPT, COUNT = "Once upon a time", 26


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The three kinds of one model, by name."""
    source, folder = shared_model("stories260K"), tmp_path_factory.mktemp("generate")
    options = qsvd.Quantize(str(source), out=folder / "out", rank=8, iterations=1, device="cpu")
    base = qsvd.quantize(options).path
    write_run(base, folder / "run")
    return {"16-bit": source, "split": base, "trained": folder / "run"}


@pytest.fixture(scope="module")
def dense(models, tmp_path_factory):
    """The weights that the quantized model and the run stand for, by NumPy, as float32 models of transformers."""
    base, run = models["split"], models["trained"]
    stored = {m: residual(base, f"{m}.weight") + up @ down for m, (up, down) in factors_of(base).items()}
    moved = trained_weights(base, run, qsvd.load(base, adapter=run))
    made = {}
    for kind, weights in (("split", stored), ("trained", moved)):
        made[kind] = tmp_path_factory.mktemp("dense") / kind
        replaced = {f"{module}.weight": torch.from_numpy(weight).float() for module, weight in weights.items()}
        write_dense(models["16-bit"], made[kind], replaced)
    return made


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = shutil.copytree(shared_model("stories260K"), tmp_path_factory.mktemp("chat") / "model")
    folder.chmod(0o755)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def plain(folder, text, count=COUNT, **sampling):
    """What transformers alone says after a text."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens="<|im_start|>" not in text)
    torch.manual_seed(5)
    made = model.generate(**inputs, max_new_tokens=count, **({"do_sample": False} | sampling))
    return tokenizer.decode(made[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_greedy_tokens_are_those_of_transformers(models, dense, generate):
    words = ("--prompt", PROMPT, "--max-new-tokens", COUNT, "--temperature", 0)
    expected = plain(models["16-bit"], PROMPT)
    code, said, notes = generate(models["16-bit"], *words)
    assert (code, said) == (0, expected + "\n")
    assert notes.startswith(f"{COUNT} tokens, ")
    assert notes.count("\n") == 1
    assert generate(models["16-bit"], *words[2:], stdin=PROMPT + "\n")[1] == said, "stdin is the prompt"
    others = {kind: plain(folder, PROMPT) for kind, folder in dense.items()}
    assert {kind: qsvd.generate(models[kind], PROMPT, max_new_tokens=COUNT) for kind in dense} == others
    assert generate(models["trained"], *words)[1] == others["trained"] + "\n"
    assert len({expected, *others.values()}) == 3


def test_sampling_is_that_of_transformers_and_a_seed_repeats_it(models):
    def sampled(seed):
        return qsvd.generate(models["16-bit"], PROMPT, temperature=0.9, top_p=0.8, max_new_tokens=COUNT, seed=seed)

    before = torch.get_rng_state()
    first = sampled(5)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == plain(models["16-bit"], PROMPT, do_sample=True, temperature=0.9, top_p=0.8)
    assert sampled(5) == first
    assert sampled(6) != first


def test_several_prompts_have_an_answer_each(models, generate):
    prompts = [PROMPT, "Tom had a"]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    code, said, notes = generate(models["16-bit"], *words, "--max-new-tokens", 5)
    answers = qsvd.generate(models["16-bit"], prompts, max_new_tokens=5)
    assert answers == [plain(models["16-bit"], prompt, 5) for prompt in prompts]
    assert (code, said) == (0, "".join(f"{answer}\n" for answer in answers))
    assert notes.splitlines()[:2] == ["prompt 1 of 2", "prompt 2 of 2"]


class Stops(io.StringIO):
    """A stdout that presses Ctrl-C when it has the second word, once: the next one would end the process."""

    is_pressed = False

    def write(self, text):
        done = super().write(text)
        if self.getvalue().count(" ") == 2 and not self.is_pressed:
            self.is_pressed = True
            signal.raise_signal(signal.SIGINT)
        return done


def test_tokens_are_printed_as_they_are_made_and_ctrl_c_ends_the_answer(models, monkeypatch, capsys):
    shown = Stops()
    monkeypatch.setattr("sys.stdout", shown)
    assert command(["generate", str(models["16-bit"]), "--prompt", PROMPT]) == 130
    said = shown.getvalue().removesuffix("\n")
    assert 2 <= said.count(" ") <= 3
    assert plain(models["16-bit"], PROMPT).startswith(said)
    assert capsys.readouterr().err == "qsvd: interrupted\n"


def chatml(*messages):
    turns = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages)
    return f"{turns}<|im_start|>assistant\n"


def test_a_prompt_goes_through_the_chat_template_and_a_chat_keeps_its_history(chat_model, generate):
    flags = ("--max-new-tokens", 9, "--system", "Be brief.")
    asked = [("system", "Be brief."), ("user", "Hi")]
    first = plain(chat_model, chatml(*asked), 9)
    assert generate(chat_model, "--prompt", "Hi", *flags)[1] == first + "\n"
    second = plain(chat_model, chatml(*asked, ("assistant", first), ("user", "And then?")), 9)
    code, said, notes = generate(chat_model, "--chat", *flags, stdin="Hi\nAnd then?\n/exit\nnot read\n")
    assert (code, said) == (0, f"{first}\n{second}\n")
    assert notes.startswith("18 tokens, ")
    assert second != plain(chat_model, chatml(asked[0], ("user", "And then?")), 9)
    raw = generate(chat_model, "--prompt", PROMPT, "--raw", "--max-new-tokens", 9)[1]
    assert raw == plain(chat_model, PROMPT, 9) + "\n"


def test_generation_config_has_the_defaults(chat_model, tmp_path, generate):
    folder = shutil.copytree(chat_model, tmp_path / "model")
    transformers.GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.5, eos_token_id=2).save_pretrained(
        folder
    )
    _, said, notes = generate(folder, "--raw", "--prompt", PROMPT, "--seed", 5)
    assert said == plain(folder, PROMPT, 7, do_sample=True, temperature=0.5) + "\n"
    assert notes.startswith("7 tokens, ")


@pytest.mark.parametrize(
    ("words", "stdin", "sentence"),
    [
        (["--prompt", " "], "", "--prompt is empty"),
        (["--prompt"], "", "--prompt needs a value: --prompt TEXT"),
        ([], " \n", "stdin is empty: give --prompt TEXT, --chat, or a text on stdin"),
        (["--chat", "--prompt", "x"], "", "--chat reads its messages from stdin: leave out --prompt"),
        (["--system", "x", "--prompt", "x"], "", "--system needs a chat template"),
        (["--system", "x", "--raw", "--prompt", "x"], "", "--system needs the chat template: leave out --raw"),
        (["--prompt", "x", "--temperature", "0", "--top-p", "0.5"], "", "--temperature 0 is greedy"),
        (["--prompt", "x " * 600], "", "shorten it"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_a_model_is_loaded(
    models, generate, monkeypatch, words, stdin, sentence
):
    monkeypatch.setattr(qsvd_generate, "load_generating", None)
    code, said, notes = generate(models["split"], *words, stdin=stdin)
    assert (code, said, notes.count("\n")) == (2, "", 1)
    assert sentence in notes


class Terminal(io.StringIO):
    """A stdin on which nobody has typed."""

    def isatty(self):
        return True


def test_a_terminal_without_a_prompt_is_told_what_to_give(models, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Terminal())
    code = command(["generate", str(models["split"])])
    assert (code, capsys.readouterr().err) == (
        2,
        "qsvd: there is no prompt: give --prompt TEXT, --chat, or a text on stdin\n",
    )


def test_classifiers_and_encoders_generate_nothing(tmp_path, generate):
    write_checkpoint(tmp_path / "bert", "BertModel")
    code, _, notes = generate(tmp_path / "bert", "--prompt", "x")
    assert (code, notes.partition("bert is a ")[2]) == (
        2,
        "BertModel, which generates no text; give a language model\n",
    )
    base = qsvd.quantize(qsvd.Quantize(str(tmp_path / "bert"), out=tmp_path / "out", rank=2, iterations=1))
    write_run(base, tmp_path / "run", labels=LABELS)
    code, _, notes = generate(tmp_path / "run", "--prompt", "x")
    assert code == 2
    assert "is a classifier (neg, pos), which generates no text" in notes
