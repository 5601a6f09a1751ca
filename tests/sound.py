"""A tiny random Whisper with a real feature extractor and tokenizer, and real WAV files."""

import json
from pathlib import Path

import numpy as np
import torch
from scipy.io import wavfile
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor
from transformers import WhisperTokenizer as Tokenizer

import qsvd
from tests.commands.trained_runs import factors_of
from tests.export.cases import residual

RATE, SECONDS, BANDS = 16_000, 1, 16
START, END, QUIET = "<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>"


def processor():
    """A tokenizer of bytes, with the marks of Whisper, and a feature extractor for a second of sound."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    names = [*letters, END, START, "<|en|>", "<|transcribe|>", "<|translate|>", "<|nocaptions|>", QUIET]
    words = Tokenizer(vocab={name: number for number, name in enumerate(names)}, merges=[])
    words.add_tokens(names[len(letters) :], special_tokens=True)
    extractor = WhisperFeatureExtractor(feature_size=BANDS, sampling_rate=RATE, chunk_length=SECONDS)
    return WhisperProcessor(extractor, words)


def write_model(folder):
    """A random model in float32 with its processor, every layer of which changes the loss."""
    made = processor()
    start, end = (made.tokenizer.convert_tokens_to_ids(name) for name in (START, END))
    frames = RATE * SECONDS // made.feature_extractor.hop_length
    config = WhisperConfig(
        vocab_size=len(made.tokenizer),
        num_mel_bins=BANDS,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=frames // 2,
        max_target_positions=64,
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return Path(folder)


def quantized(folder):
    source = write_model(folder / "source")
    return qsvd.quantize(str(source), out=folder / "out", rank=8, iterations=1, device="cpu").path


def dense(base):
    """The model of transformers with Q + B A in float64's rounding to float32."""
    model = WhisperForConditionalGeneration.from_pretrained(base.parent / "source", dtype=torch.float32)
    weights, factors = json.loads((base / "qsvd.json").read_text())["weights"], factors_of(base)
    with torch.no_grad():
        for name, weight in weights.items():
            up, down = factors[weight["module"]]
            value = torch.from_numpy(residual(base, name) + up @ down).float()
            model.get_submodule(weight["module"]).weight.copy_(value)
    return model.eval()


def tone(path, pitch, *, rate=RATE, seconds=0.6, channels=1, dtype="int16"):
    """A WAV file of a tone that swells; its samples from -1 to 1."""
    times = np.arange(int(rate * seconds)) / rate
    wave = 0.5 * np.sin(2 * np.pi * pitch * times) * times / seconds
    scaled = np.round(wave * 2**15).astype(dtype) if dtype == "int16" else wave.astype(dtype)
    wavfile.write(path, rate, np.repeat(scaled[:, None], channels, axis=1) if channels > 1 else scaled)
    return wave


def rows(folder, count=4):
    """Sounds and texts; relative paths."""
    for number in range(count):
        tone(folder / f"{number}.wav", 200 * (number + 1), seconds=0.3 + 0.1 * number)
    return [{"audio": f"{number}.wav", "text": f"a tone of number {number}"} for number in range(count)]


def write_rows(path, given):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in given), encoding="utf-8")
    return str(path)
