"""Training and evaluation on images, judged by transformers' own model with the dense weights Q + B A."""

import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import AutoProcessor

import qsvd
from qsvd.cli import run
from qsvd.commands import eval as qsvd_eval
from qsvd.commands.train import train
from qsvd.data.columns import UNTRAINED
from qsvd.errors import BadInput
from qsvd.prepare.train import prepare_train
from tests.runs import outcome, steps_of, training, words
from tests.sealed import without_digests
from tests.vision import KINDS, SIDE, chats, dense, picture, quantized, write_chats, write_lines

pytestmark = pytest.mark.slow

CLOSE = 2e-5  # relative: float32 sums in another order
LEARNS = {
    "any_start": True,
    "learning_rate": 3e-3,
    "max_length": 96,
}  # a random model starts above the loss of guessing


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {kind: quantized(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def read(base, rows, folder):
    """What transformers' processor makes of some rows of `chats`, padded on the right, and labels of the answers."""
    processor = AutoProcessor.from_pretrained(base)
    conversations, answers = [], []
    for row in rows:
        number = int(row["messages"][0]["content"].split()[-1][:-1]) if "images" in row else None
        content = [{"type": "text", "text": row["messages"][0]["content"]}]
        if number is not None:
            content.insert(0, {"type": "image", "path": str(folder / f"{number}.png")})
        answers.append(row["messages"][1]["content"] + "<|im_end|>\n")
        said = {"role": "assistant", "content": [{"type": "text", "text": row["messages"][1]["content"]}]}
        conversations.append([{"role": "user", "content": content}, said])
    options = {"add_special_tokens": False, "padding": True, "padding_side": "right"}
    inputs = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
    )
    labels = torch.full_like(inputs["input_ids"], UNTRAINED)
    for line, ids, mask, answer in zip(labels, inputs["input_ids"], inputs["attention_mask"], answers, strict=True):
        end, count = int(mask.sum()), len(processor.tokenizer(answer, add_special_tokens=False).input_ids)
        line[end - count : end] = ids[end - count : end]
    return inputs, labels


def simple(folder, count=4):
    """Rows with a string beside the column of images, and the last without an image."""
    rows = []
    for number in range(count):
        picture(folder / f"{number}.png", number)
        question, answer = f"What is in picture {number}?", f"A field of colour {number}, and no cat."
        row = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        rows.append(row | ({"images": [f"{number}.png"]} if number < count - 1 else {}))
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_those_of_transformers_with_dense_weights(bases, kind, tmp_path, monkeypatch):
    rows = simple(tmp_path)
    data, base = write_lines(tmp_path / "rows.jsonl", rows), bases[kind]
    inputs, labels = read(base, rows, tmp_path)
    with torch.no_grad():
        wanted = dense(base, kind)(**inputs, labels=labels).loss.item()
        blind = {name: value for name, value in inputs.items() if name != "pixel_values"}
        blind["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
        assert dense(base, kind)(**blind, labels=labels).loss.item() != pytest.approx(wanted, rel=100 * CLOSE)
    options = training(base, data, tmp_path / "run", steps=1, batch_size=4, accumulate=1, **LEARNS)
    checked = prepare_train(options).training
    assert (checked.batch.tokens, checked.pixels) == (inputs["input_ids"].shape[1], 4 * 3 * SIDE**2)
    made = qsvd.train(options)
    assert made.losses[0] == pytest.approx(wanted, rel=CLOSE)
    numbers, place = [], qsvd_eval.place_reading
    monkeypatch.setattr(
        qsvd_eval, "place_reading", lambda *a, pixels: numbers.append(pixels) or place(*a, pixels=pixels)
    )
    measured = qsvd.evaluate(str(base), data=data, device="cpu", batch_size=3).rows[0].values
    assert numbers == [3 * 3 * SIDE**2], "of three images in colour"
    assert measured["nats"] == pytest.approx(wanted, rel=CLOSE)
    assert measured["tokens"] == (labels != UNTRAINED).sum()


def test_a_stopped_run_goes_on_as_if_nothing_had_happened_and_another_image_is_another_run(bases, tmp_path):
    data = write_chats(tmp_path)
    chosen = {"steps": 2, "warmup": 0.0, "held_out": 0.2, "eval_every": 1, "save_every": 1, **LEARNS}
    options = training(bases["llava"], data, tmp_path / "alone", **chosen)
    undisturbed = outcome(train(options))
    stopped = replace(options, out=tmp_path / "stopped")
    shutil.copytree(options.out, stopped.out, ignore=shutil.ignore_patterns("summary.json", "checkpoint-2"))
    assert run([*words(stopped), "--resume"]) == 0
    assert outcome(stopped.out) == undisturbed
    assert undisturbed[1][1]["loss"] < undisturbed[1][0]["loss"]
    picture(tmp_path / "0.png", 9)
    with pytest.raises(BadInput, match="data"):
        train(stopped)


def test_a_16_bit_model_is_quantized_and_trained_and_its_merged_export_reads_images(tmp_path, bases):
    source, rows = bases["gemma3"].parent / "source", simple(tmp_path)
    data = write_lines(tmp_path / "rows.jsonl", rows)
    options = training(source, data, tmp_path / "run", steps=2, rank=4, quantized=tmp_path / "out", **LEARNS)
    qsvd.train(options)
    qsvd.export(tmp_path / "run", out=tmp_path / "merged", to="merged", dtype="float32")
    nats = {
        name: qsvd.evaluate(str(tmp_path / name), data=data, device="cpu").rows[0].values["nats"]
        for name in ("run", "merged")
    }
    inputs, labels = read(tmp_path / "merged", rows, tmp_path)
    merged = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        wanted = merged.eval()(**inputs, labels=labels).loss.item()
    assert nats == pytest.approx({"run": wanted, "merged": wanted}, rel=CLOSE)
    assert wanted < steps_of(tmp_path / "run")[0]["loss"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"packing": True}, "has images, with which --packing cannot be used"),
        ({"layer_major": True, "gradient_checkpointing": True}, "has images, with which --layer-major cannot be used"),
    ],
)
def test_options_that_images_do_not_have_are_refused(bases, tmp_path, changes, sentence):
    data = write_chats(tmp_path)
    with pytest.raises(BadInput, match=sentence):
        train(training(bases["llava"], data, tmp_path / "run", **(LEARNS | changes)))


def test_a_text_model_and_a_folder_without_a_processor_refuse_images(bases, tmp_path, language):
    data = write_chats(tmp_path)
    with pytest.raises(BadInput, match=r"has images, which .*, a LlamaForCausalLM, does not read"):
        train(training(language, data, tmp_path / "run"))
    with pytest.raises(BadInput, match=r"has images, which .*, a LlamaForCausalLM, does not read"):
        qsvd.evaluate(str(language), data=data, device="cpu")
    bare = tmp_path / "bare"
    without_digests(shutil.copytree(bases["llava"], bare))
    (bare / "processor_config.json").unlink()
    with pytest.raises(BadInput, match="has no processor of images"):
        train(training(bare, data, tmp_path / "run", **LEARNS))
    pair = {"question": "What?", "answer": "#### 4", "images": chats(tmp_path, 1)[0]["images"]}
    path = write_lines(tmp_path / "pairs.jsonl", [pair])
    with pytest.raises(BadInput, match="--task exact-match does not go with pair examples with images"):
        qsvd.evaluate(str(bases["llava"]), data=path, task="exact-match", device="cpu")
