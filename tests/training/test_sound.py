"""Whisper: training and evaluation on sounds, judged by transformers' own model with the dense weights Q + B A."""

import wave

import numpy as np
import pytest
import torch
from scipy.signal import resample_poly
from transformers import AutoProcessor, WhisperForConditionalGeneration

import qsvd
from qsvd.data.columns import UNTRAINED
from qsvd.data.media import open_sound
from qsvd.errors import BadInput
from qsvd.prepare.train import prepare_train
from tests.runs import steps_of, training
from tests.sound import RATE, dense, quantized, rows, tone, write_rows

pytestmark = pytest.mark.slow
CLOSE = 2e-5  # relative: float32 sums in another order
LEARNS = {"any_start": True, "learning_rate": 3e-3, "max_length": 64}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """OUT, and the data file."""
    folder = tmp_path_factory.mktemp("sound")
    return quantized(folder), write_rows(folder / "rows.jsonl", rows(folder))


def read(base):
    """What transformers' processor makes of the rows, with samples by Python's wave module, and labels as it trains."""
    processor, sounds, labels = AutoProcessor.from_pretrained(base), [], []
    for row in rows(base.parent):
        with wave.open(str(base.parent / row["audio"])) as file:
            sounds.append(np.frombuffer(file.readframes(file.getnframes()), dtype="<i2") / 32768)
        labels.append(torch.tensor(processor.tokenizer(row["text"]).input_ids[1:]))  # the model adds the first
    features = processor.feature_extractor(sounds, sampling_rate=RATE, return_tensors="pt").input_features
    return features, torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=UNTRAINED)


def test_losses_are_those_of_transformers_with_dense_weights(made, tmp_path):
    base, data = made
    features, labels = read(base)
    with torch.no_grad():
        wanted = dense(base)(input_features=features, labels=labels).loss.item()
        silent = dense(base)(input_features=0 * features, labels=labels).loss.item()
    assert silent != pytest.approx(wanted, rel=10 * CLOSE)
    options = training(base, data, tmp_path / "run", steps=2, warmup=0.0, batch_size=4, accumulate=1, **LEARNS)
    checked = prepare_train(options).training
    assert (checked.batch.tokens, checked.pixels) == (labels.shape[1], features.numel())
    run = qsvd.train(options)
    assert run.losses[0] == pytest.approx(wanted, rel=CLOSE)
    assert run.losses[-1] < wanted
    assert steps_of(tmp_path / "run")[0]["tokens"] == (labels != UNTRAINED).sum()
    measured = qsvd.evaluate(base, base.parent / "source", data=data, device="cpu", batch_size=3).rows
    assert measured[0].values["nats"] == pytest.approx(wanted, rel=CLOSE)
    assert measured[0].values["tokens"] == (labels != UNTRAINED).sum()
    qsvd.export(tmp_path / "run", out=tmp_path / "merged", to="merged", dtype="float32")
    merged = WhisperForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    trained = qsvd.load(tmp_path / "run", device="cpu")
    with torch.no_grad():
        plain, ours = (model(input_features=features, labels=labels).logits for model in (merged, trained))
    assert torch.allclose(plain, ours, atol=1e-4 * plain.std().item())


def test_held_out_sounds_are_measured_and_another_sound_is_another_run(made, tmp_path):
    base, _ = made
    data = write_rows(tmp_path / "rows.jsonl", rows(tmp_path))
    options = training(base, data, tmp_path / "run", steps=2, held_out=0.25, eval_every=1, save_every=1, **LEARNS)
    summary = qsvd.train(options).summary
    assert summary.held_out_after < summary.held_out_before
    tone(tmp_path / "0.wav", 999)
    with pytest.raises(BadInput, match="data"):
        qsvd.train(options)


def test_sounds_are_read_in_every_spelling(tmp_path):
    wanted = tone(tmp_path / "a.wav", 300)
    tone(tmp_path / "two.wav", 300, channels=2)
    tone(tmp_path / "float.wav", 300, dtype="float32")
    spellings = ["a.wav", "two.wav", "float.wav", (tmp_path / "a.wav").read_bytes()]
    for source in [*spellings, {"array": wanted.tolist(), "sampling_rate": RATE}]:
        assert np.abs(open_sound(source, tmp_path, RATE) - wanted).max() < 2**-15
    slow = tone(tmp_path / "slow.wav", 300, rate=22_050)
    assert np.abs(open_sound("slow.wav", tmp_path, RATE) - resample_poly(slow, 320, 441)).max() < 1e-4


def test_all_that_cannot_be_heard_is_told_at_once(made, tmp_path, monkeypatch):
    base, _ = made
    monkeypatch.setattr("qsvd.commands.train.load_start", None)
    (tmp_path / "words.wav").write_text("no sound")
    tone(tmp_path / "long.wav", 300, seconds=1.5)
    bad = [{"audio": name, "text": "x"} for name in ("none.wav", "words.wav", "long.wav")]
    data = write_rows(tmp_path / "rows.jsonl", [*rows(tmp_path, 1), *bad])
    message = r"3 unusable examples: line 2 \(no such file: .*none.wav\), line 3 \(words.wav is not a WAV file .*line 4"
    with pytest.raises(BadInput, match=message) as raised:
        qsvd.train(training(base, data, tmp_path / "run", **LEARNS))
    assert "lasts 1.5 s, and the model hears 1 s" in str(raised.value)
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "x"}] * 3)
    with pytest.raises(BadInput, match="which learns from the columns audio and text"):
        qsvd.train(training(base, texts, tmp_path / "run", **LEARNS))
    with pytest.raises(BadInput, match="which writes what it hears"):
        qsvd.generate(base, "x")


def test_a_model_of_text_does_not_hear(language, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows(tmp_path))
    with pytest.raises(BadInput, match=r"has the column audio, which .*, a LlamaForCausalLM, does not hear"):
        qsvd.train(training(language, data, tmp_path / "run"))
