"""`qsvd generate --audio`: its text is that of transformers' own model and processor with dense weights."""

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from transformers import AutoProcessor, Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

import qsvd
from qsvd.commands import generate as qsvd_generate
from tests.commands.folders import shared_model
from tests.sound import BANDS, RATE, SECONDS, dense, processor, quantized, tone
from tests.vision import TEXT, tokenizer

pytestmark = pytest.mark.slow
COUNT, QUESTION = 14, "What is this?"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return quantized(tmp_path_factory.mktemp("whisper"))


@pytest.fixture
def sounds(tmp_path):
    tone(tmp_path / "1.wav", 300, seconds=0.4)
    tone(tmp_path / "2.wav", 5000, seconds=0.9)
    return [tmp_path / "1.wav", tmp_path / "2.wav"]


def samples(path):
    rate, values = wavfile.read(path)
    assert rate == RATE
    return (values / 32768).astype(np.float32)


def plain(model, folder, path, count=COUNT):
    """What transformers alone writes of a sound."""
    made = AutoProcessor.from_pretrained(folder)
    features = made.feature_extractor(samples(path), sampling_rate=RATE, return_tensors="pt").input_features
    tokens = model.generate(features, max_new_tokens=count, do_sample=False)
    return made.tokenizer.decode(tokens[0], skip_special_tokens=True)


def test_what_whisper_writes_of_sounds_is_what_transformers_writes(base, sounds, generate):
    wanted = [plain(dense(base), base, path) for path in sounds]
    assert wanted[0] != wanted[1], "the sounds are heard"
    words = ("--max-new-tokens", COUNT, "--temperature", 0)
    code, said, notes = generate(base, "--audio", sounds[0], *words)
    assert (code, said) == (0, wanted[0] + "\n")
    assert notes.endswith(" tokens/s\n")
    code, said, notes = generate(base, "--audio", sounds[0], "--audio", sounds[1], *words)
    assert (code, said) == (0, "".join(f"{one}\n" for one in wanted))
    assert notes.startswith("sound 1 of 2\n")
    assert qsvd.generate(base, audio=sounds[0], max_new_tokens=COUNT) == wanted[0]
    assert qsvd.generate(base, audio=sounds, max_new_tokens=COUNT) == wanted
    assert qsvd.generate(base.parent / "source", audio=sounds[0]) == plain(dense_source(base), base, sounds[0], 60)


def dense_source(base):
    from transformers import WhisperForConditionalGeneration

    return WhisperForConditionalGeneration.from_pretrained(base.parent / "source").eval()


def test_what_an_audio_language_model_says_of_sounds_is_what_transformers_says(tmp_path, sounds, generate):
    words = tokenizer()
    words.add_tokens(["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"], special_tokens=True)
    own = Qwen2AudioProcessor(processor().feature_extractor, words)
    tower = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128}
    tower |= {"num_mel_bins": BANDS, "max_source_positions": RATE * SECONDS // 320}
    config = Qwen2AudioConfig(
        text_config=TEXT | {"model_type": "qwen2"},
        audio_config=tower,
        audio_token_index=words.convert_tokens_to_ids("<|AUDIO|>"),
    )
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    model.save_pretrained(tmp_path / "model")
    own.save_pretrained(tmp_path / "model")
    wanted, options = [], {"sampling_rate": RATE, "add_special_tokens": False, "return_tensors": "pt"}
    for heard, text in ((sounds[:1], QUESTION), (sounds, QUESTION), (sounds[1:], "")):
        parts = [{"type": "audio", "audio": samples(path)} for path in heard]
        asked = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
        whole = own.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        inputs = own(text=[whole], audio=[part["audio"] for part in parts], **options)
        made = model.generate(**inputs, max_new_tokens=COUNT, do_sample=False)
        wanted.append(words.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert len({*wanted}) == 3, "the sounds are heard"
    flags = ("--max-new-tokens", COUNT, "--temperature", 0)
    code, said, _ = generate(tmp_path / "model", "--audio", sounds[0], "--prompt", QUESTION, *flags)
    assert (code, said) == (0, wanted[0] + "\n")
    assert qsvd.generate(tmp_path / "model", [QUESTION], audio=sounds, max_new_tokens=COUNT) == wanted[1:2]
    assert qsvd.generate(tmp_path / "model", audio=sounds[1], max_new_tokens=COUNT) == wanted[2]
    code, said, _ = generate(tmp_path / "model", "--chat", "--audio", sounds[0], *flags, stdin=f"{QUESTION}\n")
    assert (code, said) == (0, wanted[0] + "\n")


def test_what_cannot_be_heard_is_refused_in_one_sentence_before_a_model_is_loaded(
    base, tmp_path, sounds, generate, monkeypatch
):
    monkeypatch.setattr(qsvd_generate, "load_generating", None)
    (tmp_path / "broken.wav").write_bytes(b"RIFF, but not a sound")
    tone(tmp_path / "long.wav", 300, seconds=SECONDS + 0.5)
    files = [tmp_path / name for name in ("none.wav", "broken.wav", "long.wav")]
    code, _, notes = generate(base, *(word for path in files for word in ("--audio", path)))
    assert (code, notes.count("\n")) == (2, 1)
    assert f"--audio: no such file: {files[0]}; " in notes
    assert "broken.wav is not a WAV file that SciPy can read" in notes
    assert "long.wav lasts 1.5 s, and the model hears 1 s: divide it" in notes
    heard = ("--audio", sounds[0])
    cases = [
        ((base, *heard, "--prompt", "A", "--raw"), "reads no text: leave out --prompt and --raw"),
        ((base, *heard, "--chat"), "reads no text: leave out --chat"),
        ((base, "--prompt", "A"), "reads no text: leave out --prompt"),
        (
            (shared_model("stories260K"), *heard, "--prompt", "A"),
            "a LlamaForCausalLM, does not hear: give a model such",
        ),
        ((base, *heard, "--max-new-tokens", "61"), "--max-new-tokens 61 and a prompt of 4 tokens are more than the 64"),
    ]
    for words, sentence in cases:
        code, _, notes = generate(*words)
        assert (code, notes.count("\n")) == (2, 1)
        assert sentence in notes
    code, _, notes = generate(base, stdin="A text")
    assert (code, notes.count("\n")) == (2, 1)
    assert "reads no text: give --audio FILE" in notes
