"""`qsvd calibrate` as it is called: its file against autograd."""

import json
import re
import shutil

import pytest
import safetensors.torch
import torch
import transformers

from qsvd.cli import run
from qsvd.commands import calibrate as command
from qsvd.commands.calibrate import calibrate, measure
from qsvd.files.statistics import open_statistics
from qsvd.prepare.calibrate import prepare_calibrate
from tests.commands.calibrations import TEXTS, options_of, write_rows
from tests.stops import StopAfter

ROUNDOFF = 64 * 2.0**-24  # of the largest moment of a weight, as in tests/calibrate/test_moments.py


def moments_of(model, batches):
    """Mean over examples of the squared gradient of the model's own loss, by name of the parameter."""
    found = {}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            found[name] = found.get(name, 0.0) + parameter.grad.double().square() / len(batches)
    return found


def check_moments(path, expected):
    statistics = open_statistics(path)
    tensors = safetensors.torch.load_file(path)
    for module in statistics.modules:
        for part, dim in (("rows", 1), ("columns", 0)):
            by_autograd = expected[f"{module}.weight"].mean(dim)
            tolerance = ROUNDOFF * by_autograd.max().item()
            assert tensors[f"{module}.{part}"].tolist() == pytest.approx(by_autograd.tolist(), abs=tolerance, rel=1e-4)
    return statistics


def test_a_language_model_on_texts_against_autograd(stories, texts, tmp_path, capsys):
    out = tmp_path / "deep" / "s.safetensors"
    flags = ("--examples", "4", "--chunk", "3", "--device", "cpu")
    assert run(["calibrate", str(stories), str(texts), "--out", str(out), *flags]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{out}\n"
    assert shown.err.splitlines()[-3].startswith("100 %, 4/4 examples kept, 0 s left, loss ")
    model = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)
    tokens = [torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]]) for text in TEXTS]
    expected = moments_of(model, [{"input_ids": one, "labels": one} for one in tokens])
    statistics = check_moments(out, expected)
    assert len(statistics.modules) == 14
    losses = [model(input_ids=one, labels=one).loss.item() for one in tokens]
    record = statistics.record
    assert record["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert (record["examples"], record["tokens"]) == (4, sum(one.numel() for one in tokens))
    assert (record["model"], record["data"], record["traces"]) == (str(stories), str(texts), 0)
    assert list(tmp_path.rglob("*")) == [out.parent, out]


def test_answers_alone_count_unless_all_is_asked_for(stories, tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", [{"prompt": text, "completion": " The end."} for text in TEXTS])
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)
    model = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    for loss_on in ("answers", "all"):
        batches = []
        for text in TEXTS:
            given, whole = (tokenizer(one).input_ids for one in (text, f"{text} The end."))
            assert whole[: len(given)] == given
            tokens = torch.tensor([[*whole, tokenizer.eos_token_id]])
            labels = tokens.clone()
            labels[0, : len(given) if loss_on == "answers" else 0] = -100
            batches.append({"input_ids": tokens, "labels": labels})
        out = calibrate(options_of(stories, data, tmp_path / loss_on, loss_on=loss_on))
        check_moments(out, moments_of(model, batches))


def test_in_chats_what_the_assistant_says_counts_with_the_end_that_the_model_stops_at(stories, tmp_path):
    """Here an exclamation mark, by the model's generation config alone."""
    folder = shutil.copytree(stories, tmp_path / "chats")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    (end,) = tokenizer("!", add_special_tokens=False).input_ids[-1:]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!{% endgeneration %}"
        "{% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    turns = [{"role": "user", "content": "Who ran?"}, {"role": "assistant", "content": "The dog ran"}]
    data = write_rows(tmp_path / "c.jsonl", [{"messages": turns}])
    (example,) = prepare_calibrate(options_of(folder, data, tmp_path / "s", examples=1)).examples
    assert example.target[-1] == end
    said = [label for label in example.target if label != -100]
    assert tokenizer.decode(said).strip() == "The dog ran!"


def test_a_classifier_on_labels_against_autograd(classifier, tmp_path):
    """Names of the model's own classes, or their numbers; pairs of texts have segments."""
    names, numbers = (
        write_rows(
            tmp_path / f"{labels[0]}.jsonl",
            [{"text": text, "text_pair": "A story.", "label": one} for text, one in zip(TEXTS, labels, strict=True)],
        )
        for labels in (("good", "bad", "bad", "good"), (1, 0, 0, 1))
    )
    named, numbered = (options_of(classifier, data, tmp_path / "s", traces=1) for data in (names, numbers))
    assert prepare_calibrate(named).examples == prepare_calibrate(numbered).examples
    out = calibrate(named)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
    batches = [
        dict(tokenizer(text, "A story.", return_tensors="pt")) | {"labels": torch.tensor([number])}
        for text, number in zip(TEXTS, (1, 0, 0, 1), strict=True)
    ]
    statistics = check_moments(out, moments_of(model, batches))
    assert all(torch.isfinite(torch.tensor(statistics.trace(module))) for module in statistics.modules)


def test_examples_are_drawn_by_the_seed_and_long_texts_are_divided(stories, tmp_path):
    data = write_rows(tmp_path / "t.jsonl", [{"text": " ".join(TEXTS * 3)}, *({"text": text} for text in TEXTS)])
    jobs = [
        prepare_calibrate(options_of(stories, data, tmp_path / "s", examples=3, max_length=20, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert jobs[0].examples == jobs[1].examples != jobs[2].examples
    assert all(len(example.input_ids) <= 20 for job in jobs for example in job.examples)
    assert jobs[0].identity == jobs[1].identity != jobs[2].identity


def test_a_chunk_is_what_half_of_the_free_memory_holds(stories, texts, tmp_path, monkeypatch):
    """Two blocks of hidden size 64; states before each and after the last, and a mask for each block."""
    least, some, every = (0, 1), (6, 3), (10**12, 4)  # how many examples the free memory holds, and a chunk has
    for traces, cases in ((0, (least, some, every)), (2, (some,))):
        job = prepare_calibrate(options_of(stories, texts, tmp_path / "s", traces=traces))
        tokens = max(len(example.input_ids) for example in job.examples)
        each = 4 * (tokens * 64 * 3 * (1 + traces) + tokens**2 * 2)
        for free, expected in cases:
            monkeypatch.setattr(command, "free_host_memory", lambda left=free * each: left)
            show = StopAfter()
            measure(job, show)
            assert next(now.done for now in show.seen if now.may_stop) == expected
            (tmp_path / "s").unlink()


def test_a_block_that_does_not_fit_ends_with_what_to_do(stories, texts, tmp_path, capsys, monkeypatch):
    def full(*_arguments, **_named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(command, "add_examples", full)
    flags = ("--examples", "1", "--device", "cpu")
    assert run(["calibrate", str(stories), str(texts), "--out", str(tmp_path / "s"), *flags]) == 3
    assert re.fullmatch(
        rf"qsvd: a block of {stories} with its gradients does not fit on cpu for \d+ tokens; give a smaller "
        r"--max-length, close other programs that use it, or give --device cpu\n",
        capsys.readouterr().err,
    )
