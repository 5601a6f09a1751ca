"""`qsvd eval`: its numbers are those of transformers and NumPy, and whatever it cannot measure it says in a sentence.

Expected numbers come from transformers' own model in float64 with the weights that the files stand for.
"""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import qsvd
from qsvd.cli import run as qsvd_command
from qsvd.commands import eval as qsvd_eval
from qsvd.memory.block_bytes import Batch
from tests.commands.folders import shared_model, without_progress
from tests.commands.trained_runs import LABELS, factors_of, trained_weights, write_run
from tests.evaluate.tiny import shared, sliding_windows
from tests.export.cases import ROUNDINGS, make_base, residual
from tests.runs import write_rows

pytestmark = pytest.mark.slow

WINDOW, STRIDE = 48, 20
TEXT = "Once upon a time there was a little girl named Lily. She had a red ball, and the ball was very big. "
DOCUMENTS = ["One day Tom saw a cat in the big tree.", "Lily was sad. Her mom said it is fine.", TEXT]


@pytest.fixture(scope="module")
def made(tmp_path_factory, stories, stories_base):
    """The three kinds of one model, and their weights in float64 by module path."""
    base, source, folder = stories_base, stories, tmp_path_factory.mktemp("eval")
    run = folder / "run"
    weights = trained_weights(base, run, write_run(base, run))
    split = {module: residual(base, f"{module}.weight") + up @ down for module, (up, down) in factors_of(base).items()}
    text = folder / "text.txt"
    text.write_text(TEXT * 3)
    jsonl = write_rows(folder / "documents.jsonl", [{"text": text} for text in DOCUMENTS])
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    return SimpleNamespace(
        folder=folder, base=base, run=run, source=source, text=text, jsonl=jsonl, tokenizer=tokenizer,
        weights={str(source): {}, str(base): split, str(run): weights},
    )  # fmt: skip


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """A tiny BERT's split and a run of it with labels."""
    folder = make_base(tmp_path_factory.mktemp("classifiers"), "BertModel", rank=4)
    for place in (folder / "source", folder / "out"):
        write_tokenizer(place)
    model = write_run(folder / "out", folder / "run", labels=LABELS)
    rows = [
        {"text": text, "label": LABELS[len(text) != 7]} for text in ("a b c", "d e", "f g h a", "b", "c c c", "h g")
    ]
    data = write_rows(folder / "labelled.jsonl", rows)
    return SimpleNamespace(folder=folder, base=folder / "out", run=folder / "run", model=model, rows=rows, data=data)


def write_tokenizer(folder, words="abcdefgh"):
    """One token for each letter, [CLS] in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {name: number for number, name in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    ).save_pretrained(folder)


@pytest.fixture
def evaluate(capsys):
    """The command: its exit code, stdout and stderr."""

    def run(*words):
        code = qsvd_command(["eval", *map(str, words)])
        shown = capsys.readouterr()
        return code, shown.out, without_progress(shown.err)

    return run


@pytest.fixture
def measured(evaluate):
    """The JSON document of the command, which must succeed."""

    def run(*words):
        code, said, err = evaluate(*words, "--json")
        assert (code, err) == (0, "")
        return json.loads(said)

    return run


def plain(made, name, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(made.source, dtype=dtype).eval()
    for path, weight in made.weights[name].items():
        model.get_submodule(path).weight.data = torch.from_numpy(weight).to(dtype)
    return model


def predictions(model, tokens):
    """Log-probabilities of the next token, NumPy float64 [T, V]."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].double().log_softmax(-1).numpy()


def expected_nats(made, name, windows):
    """Mean nats over (tokens, first position that counts), and how far float32 may be off.

    A log-probability moves by at most twice as much as the logits do.
    """
    exact, single = plain(made, name, torch.float64), plain(made, name, torch.float32)
    nats, rounding = [], 0.0
    for tokens, first in windows:
        log_p = predictions(exact, tokens)
        rounding = max(rounding, np.abs(log_p - predictions(single, tokens)).max())
        nats += [-log_p[position - 1, tokens[position]] for position in range(first, len(tokens))]
    return np.mean(nats), len(nats), 2 * ROUNDINGS * rounding


def test_a_text_is_measured_by_windows_that_slide(made, measured):
    names = list(made.weights)
    document = measured(*names, "--data", made.text, "--window", WINDOW, "--stride", STRIDE)
    tokens = made.tokenizer(made.text.read_text()).input_ids
    windows = {}
    for start, end, position in sliding_windows(len(tokens), WINDOW, STRIDE):
        windows.setdefault((start, end), position)
    assert [(one["model"], one["kind"]) for one in document["models"]] == [
        (name, kind) for name, kind in zip(names, ("16-bit", "split", "trained"), strict=True)
    ]
    for one in document["models"]:
        pieces = [(tokens[start:end], first - start) for (start, end), first in windows.items()]
        nats, count, tolerance = expected_nats(made, one["model"], pieces)
        assert (one["tokens"], one["window"], one["stride"]) == (count, WINDOW, STRIDE)
        assert one["nats"] == pytest.approx(nats, abs=tolerance)
        assert one["perplexity"] == pytest.approx(math.exp(one["nats"]), rel=1e-12)
    how = document["how"]
    assert (how["task"], how["data"], how["dtype"], how["device"]) == ("perplexity", str(made.text), "float32", "cpu")


def test_documents_are_measured_each_by_itself(made, measured):
    names = list(made.weights)
    document = measured(*names, "--data", made.jsonl, "--window", 24, "--batch-size", 2)
    encoded = [made.tokenizer(text).input_ids for text in DOCUMENTS]
    for one in document["models"]:
        nats, count, tolerance = expected_nats(made, one["model"], [(tokens[:24], 1) for tokens in encoded])
        assert (one["tokens"], one["window"]) == (count, 24)
        assert one["shortened"] == sum(len(tokens) > 24 for tokens in encoded)
        assert one["nats"] == pytest.approx(nats, abs=tolerance)
    assert document["how"]["examples"] == 3
    assert measured(names[0], "--data", made.jsonl, "--limit", 2)["how"]["examples"] == 2


def test_windows_are_the_context_and_half_of_it_unless_told(made, measured):
    [one] = measured(made.base, "--data", made.text)["models"]
    assert (one["window"], one["stride"]) == (512, 256)


def test_tinystories_cost_the_16_bit_model_what_its_author_measured(measured):
    [one] = measured(shared_model("stories260K"), "--data", shared("data/tinystories-100.jsonl"), "--limit", 60)[
        "models"
    ]
    assert one["perplexity"] == pytest.approx(3.6545, abs=0.5e-4)


def test_a_model_does_not_diverge_from_itself(made, measured):
    found = measured(made.source, made.base, "--data", made.jsonl, "--reference", made.source)["models"]
    same, other = found
    assert same["kl_mean"] == same["kl_maximum"] == 0.0
    assert same["top_token_agreement"] == 1.0
    exact, near = (plain(made, str(name), torch.float64) for name in (made.source, made.base))
    divergences = []
    for text in DOCUMENTS:
        tokens = made.tokenizer(text).input_ids
        log_p, log_q = predictions(exact, tokens)[:-1], predictions(near, tokens)[:-1]
        divergences += list((np.exp(log_p) * (log_p - log_q)).sum(-1))
    assert other["kl_mean"] == pytest.approx(np.mean(divergences), rel=1e-3)
    assert other["log_perplexity_ratio"] == pytest.approx(other["nats"] - same["nats"], abs=1e-6)


def test_a_reference_with_another_tokenizer_is_refused_before_it_is_loaded(made, tmp_path, evaluate):
    """The vocabularies may have one size, and ids then mean other words."""
    other = tmp_path / "other"
    shutil.copytree(made.source, other)
    write_tokenizer(other)
    (other / "model.safetensors").unlink()
    (other / "model.safetensors").write_bytes(b"")
    code, said, err = evaluate(made.base, "--data", made.jsonl, "--reference", other)
    assert (code, said) == (2, "")
    assert f"{made.base} and {other} tokenize the text differently" in err


def test_answers_are_measured_given_their_questions(made, tmp_path, measured):
    rows = [{"question": "What did Lily see?", "answer": "A big red ball."}, {"question": "Who?", "answer": "Tom."}]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    [one] = measured(made.base, "--data", data)["models"]
    pieces = []
    for row in rows:
        before = made.tokenizer(row["question"] + "\n").input_ids
        whole = [*made.tokenizer(row["question"] + "\n" + row["answer"]).input_ids, made.tokenizer.eos_token_id]
        assert whole[: len(before)] == before
        pieces.append((whole, len(before)))
    nats, count, tolerance = expected_nats(made, str(made.base), pieces)
    assert one["tokens"] == count
    assert one["nats"] == pytest.approx(nats, abs=tolerance)


def test_gsm8k_is_scored_by_its_final_numbers(made, tmp_path, measured, monkeypatch):
    rows = [json.loads(line) for line in shared("data/gsm8k-train.jsonl").read_text().splitlines()[:3]]
    data = write_rows(tmp_path / "gsm.jsonl", rows)
    document = measured(made.base, made.run, "--data", data, "--max-new-tokens", 6)
    assert document["how"]["task"] == "exact-match"
    assert document["models"][0]["max_new_tokens"] == 6
    for one in document["models"]:
        assert (one["total"], one["correct"], one["exact_match"]) == (3, 0, 0.0)
        assert 0 <= one["unfinished"] <= 3
        assert one["high"] == pytest.approx(1.959963984540054**2 / (3 + 1.959963984540054**2))  # Wilson, none of 3
    right = transformers.AutoTokenizer.from_pretrained(made.base)(f"#### {answer_of(rows[0])}").input_ids[1:]

    def answered(_, input_ids, **__):
        ends = torch.tensor([*right, 2]).expand(len(input_ids), -1)
        return torch.cat((input_ids, ends), dim=1)

    monkeypatch.setattr(transformers.GenerationMixin, "generate", answered)
    [one] = measured(made.base, "--data", data, "--max-new-tokens", 50)["models"]
    assert (one["correct"], one["unfinished"]) == (1, 0)


def answer_of(row):
    return row["answer"].rpartition("####")[2].strip()


def test_a_classifier_is_counted_right_as_by_hand(classifiers, measured):
    document = measured(classifiers.run, "--data", classifiers.data, "--batch-size", 4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifiers.base)
    logits = []
    for row in classifiers.rows:
        with torch.no_grad():
            logits.append(classifiers.model(**tokenizer(row["text"], return_tensors="pt")).logits[0].double().numpy())
    labels = [LABELS.index(row["label"]) for row in classifiers.rows]
    [one] = document["models"]
    assert document["how"]["task"] == "accuracy"
    assert one["correct"] == sum(int(logit.argmax() == label) for logit, label in zip(logits, labels, strict=True))
    nats = [np.log(np.exp(logit).sum()) - logit[label] for logit, label in zip(logits, labels, strict=True)]
    assert one["label_nats"] == pytest.approx(np.mean(nats), abs=1e-6)


def test_a_16_bit_classifier_is_asked_by_its_own_names(classifiers, tmp_path, measured, capsys):
    """Not by the sorted names of the data; and by numbers where the data has them."""
    merged = tmp_path / "merged"
    assert (
        qsvd_command(["export", str(classifiers.run), "--to", "merged", "--out", str(merged), "--dtype", "float32"])
        == 0
    )
    capsys.readouterr()
    swapped = tmp_path / "swapped"
    shutil.copytree(merged, swapped)
    config = json.loads((swapped / "config.json").read_text())
    turned = {"id2label": {"0": "pos", "1": "neg"}, "label2id": {"pos": 0, "neg": 1}}
    (swapped / "config.json").write_text(json.dumps(config | turned))
    numbers = [row | {"label": LABELS.index(row["label"])} for row in classifiers.rows]
    by_number = write_rows(tmp_path / "numbers.jsonl", numbers)
    run, plain_one, turned_one = measured(classifiers.run, merged, swapped, "--data", classifiers.data)["models"]
    assert run["correct"] != len(classifiers.rows) / 2, "else the order of the names would not show"
    assert run["correct"] == plain_one["correct"]
    assert turned_one["correct"] == len(classifiers.rows) - run["correct"]
    [numbered] = measured(merged, "--data", by_number)["models"]
    assert numbered["correct"] == run["correct"]
    one = write_rows(tmp_path / "one.jsonl", classifiers.rows[:1])
    assert measured(merged, "--data", one)["models"][0]["total"] == 1, "one class is enough to measure on"


def test_several_models_are_columns_of_one_table(made, evaluate, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, said, err = evaluate(made.source, made.base, made.run, "--data", made.jsonl)
    assert (code, err) == (0, "")
    assert "task perplexity" in said
    row = next(line for line in said.splitlines() if line.startswith("│ perplexity"))
    assert len([cell for cell in row.split("│") if cell.strip()]) == 4


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("{base} --data {text} --window 1", "--window 1 is below 2"),
        ("{base} --data {text} --window 64 --stride 100", "--stride 100 is above --window 64"),
        ("{base} --data {text} --window 513", "--window 513 is above 512, the context length of {base}"),
        ("{base} --data {jsonl} --stride 4", "--stride 4 is for one text, such as a .txt file; {jsonl} holds several"),
        (
            "{base} --data {text} --limit 0 --batch-size 0 --max-new-tokens 0",
            "--max-new-tokens 0 is below 1; --limit 0 is below 1; --batch-size 0 is below 1",
        ),
        ("{base} --data {folder}/none.txt", "no such file or folder: {folder}/none.txt"),
        ("{folder}/none --data {text}", "no folder '{folder}/none' here, and a Hub id looks like 'owner/name'"),
        ("{base} --data {text} --task accuracy", "--task accuracy does not go with text examples, as {text} has"),
        ("{base} --data {text} --task exact-match", "--task exact-match does not go with text examples, as {text} has"),
        ("{base} --data {text} --device tpu", "--device 'tpu' is not one of auto, cpu, cuda, cuda:N"),
        (
            "{labelled} --data {rows} --reference {base}",
            "--reference compares models on text; {rows} holds labelled examples",
        ),
        (
            "{run} --data {rows}",
            "{run} has no classification head, which labelled examples need; give a run trained on labels",
        ),
        (
            "{encoder} --data {rows}",
            "{encoder} has no classification head, which labelled examples need; give a run trained on labels",
        ),
        ("{labelled} --data {text}", "{labelled} is a classifier (neg, pos), which needs labelled examples"),
        ("{encoder} --data {text}", "{encoder} is a BertModel, which does not predict tokens; give a language model"),
        (
            "{plain_encoder} --data {rows}",
            "{plain_encoder} lacks 2 weights of a BertForSequenceClassification: classifier.bias, classifier.weight",
        ),
        (
            "{no_tokenizer} --data {text}",
            "{no_tokenizer} has no tokenizer that transformers can open; "
            "copy the tokenizer files of the 16-bit model there",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(made, classifiers, evaluate, words, sentence):
    bare = made.folder / "bare"
    if not bare.exists():
        bare.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(made.source / name, bare / name)
    names = vars(made) | {
        "labelled": classifiers.run,
        "rows": classifiers.data,
        "encoder": classifiers.base,
        "plain_encoder": classifiers.folder / "source",
        "no_tokenizer": bare,
    }
    code, said, err = evaluate(*words.format(**names).split())
    assert (code, said, err) == (2, "", f"qsvd: {sentence.format(**names)}\n")


def test_an_encoder_is_no_language_model_by_a_head_drawn_at_random(classifiers, made, evaluate):
    code, _, err = evaluate(classifiers.folder / "source", "--data", made.text)
    assert code == 2
    assert "source lacks " in err
    assert "weights of a BertLMHeadModel" in err


def test_a_run_whose_base_was_moved_needs_base(made, tmp_path, measured, evaluate):
    base = tmp_path / "base"
    shutil.copytree(made.base, base)
    write_run(base, tmp_path / "run")
    base.rename(tmp_path / "moved")
    code, _, err = evaluate(tmp_path / "run", "--data", made.jsonl)
    assert code == 2
    assert (
        err
        == f"qsvd: {tmp_path / 'run'} was trained on {base}, which does not exist; give --base with its new folder\n"
    )
    measured(tmp_path / "run", "--data", made.jsonl, "--base", tmp_path / "moved")


def test_answers_without_a_number_are_refused_before_a_model_is_loaded(made, tmp_path, evaluate, monkeypatch):
    monkeypatch.setattr(qsvd, "load", None)
    data = write_rows(
        tmp_path / "d.jsonl", [{"question": "a?", "answer": "#### 4"}, {"question": "b?", "answer": "#### x"}]
    )
    code, _, err = evaluate(made.base, "--data", data)
    assert (code, err) == (
        2,
        f"qsvd: {data}, line 2: the answer has no number to compare with (1 such rows)\n",
    )


def test_pages_from_disk_change_no_digit(made, capsys):
    shown = []
    for resident in ("1", "0.5"):  # of two blocks
        words = ["eval", str(made.run), "--data", made.jsonl, "--device", "cpu", "--resident", resident]
        assert qsvd_command([*words, "--json"]) == 0
        shown.append(json.loads(capsys.readouterr().out)["models"])
    assert shown[0] == shown[1]


def test_a_share_that_is_none_is_refused(made, capsys):
    assert qsvd_command(["eval", str(made.base), "--data", made.jsonl, "--resident", "-1"]) == 2
    assert "--resident -1.0 is neither auto nor a number from 0 to 1" in capsys.readouterr().err


def test_the_planner_is_asked_for_every_model_of_4_bits(made, measured, monkeypatch):
    seen = []
    real = qsvd_eval.place_reading

    def place_reading(split, record, batch, wish, there, pixels):
        seen.append((split.folder, record.method, batch, wish.share, there.dtype))
        return real(split, record, batch, wish, there, pixels=pixels)

    monkeypatch.setattr(qsvd_eval, "place_reading", place_reading)
    run = made.folder / "edora"
    write_run(made.base, run, "edora")
    places = ["--device", "cpu", "--resident", "0.5", "--batch-size", "3"]
    measured(made.source, made.base, run, "--data", made.jsonl, "--window", "40", *places)
    batch = Batch(40, 3, is_masked=True, checkpointing=True, device="cpu")
    assert seen == [(made.base, method, batch, 0.5, torch.float32) for method in ("pissa", "edora")]
    seen.clear()
    monkeypatch.setattr(qsvd_eval, "MOST_WINDOW", 33)
    measured(made.base, "--data", made.jsonl)
    monkeypatch.setattr(qsvd_eval, "MOST_WINDOW", 10**6)
    measured(made.base, "--data", made.jsonl)
    positions = transformers.AutoConfig.from_pretrained(made.source).max_position_embeddings
    assert [batch.tokens for _, _, batch, _, _ in seen] == [33, positions]
    assert {share for *_, share, _ in seen} == {"auto"}
