"""int4 of qsvd and GPTQ of llm-compressor (W4A16) on one model: same groups, same text, both read back and compared.

    python tools/gptq_contest.py MODEL TEXT OUT --group 64 --gptq OTHER/bin/python

prints for each: KL divergence from the 16-bit model, perplexity, bytes of weights and components, seconds. The first
part of TEXT is for calibration, the last for the measure. --gptq names a Python with llm-compressor and tyro, since it
needs other versions of libraries; without it qsvd is measured alone. In --options, {data} is the file with calibration
texts. Needs compressed-tensors here.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MEASURED = 0.25  # share of the text, its end


@dataclass(frozen=True)
class Contest:
    """The model, the text, and what is done with them.

    Args:
        options: Options of qsvd quantize, one string for each quantized model.
        examples, length: Calibration texts, and their tokens.
        windows: Texts of the measure, each of `length` tokens.
        gptq: Python with llm-compressor.
        only: "gptq" is what this tool calls in that Python.
    """

    model: str
    text: Path
    out: Path
    group: Literal[32, 64, 128] = 128
    options: tuple[str, ...] = ("--rank 0", "--rank 0 --rounding feedback", "--rank 16 --rounding feedback")
    examples: int = 128
    length: int = 256
    windows: int = 32
    gptq: Path | None = None
    only: Literal["all", "gptq"] = "all"


def tokens_of(contest: Contest, *, is_measured: bool) -> torch.Tensor:
    """Return rows of tokens [rows, length] of one part of the text, spread evenly over it."""
    tokenizer = AutoTokenizer.from_pretrained(contest.model)
    ids = torch.tensor(tokenizer(contest.text.read_text(encoding="utf-8"), verbose=False).input_ids)
    border = int(len(ids) * (1 - MEASURED))
    part, count = (ids[border:], contest.windows) if is_measured else (ids[:border], contest.examples)
    rows = part[: len(part) // contest.length * contest.length].view(-1, contest.length)
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


def by_gptq(contest: Contest) -> None:
    """Quantize with llm-compressor to OUT/gptq, and print the seconds."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    model = AutoModelForCausalLM.from_pretrained(contest.model, dtype="auto")
    rows = tokens_of(contest, is_measured=False).tolist()
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": contest.group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    started = time.perf_counter()
    recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"])
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=contest.length,
        num_calibration_samples=len(rows),
        output_dir=str(contest.out / "gptq"),
    )
    print(json.dumps({"seconds": time.perf_counter() - started}))


def by_qsvd(contest: Contest, folder: Path, options: str, data: Path) -> float:
    """Quantize with qsvd; return the seconds, with the start of the program."""
    command = [sys.executable, "-m", "qsvd", "quantize", contest.model, "--out", str(folder)]
    command += ["--codec", f"int4-{contest.group}", *options.replace("{data}", str(data)).split()]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


@torch.no_grad()
def log_probabilities(model: Any, rows_WT: torch.Tensor) -> list[torch.Tensor]:
    """Return the log-probabilities of the next tokens [T - 1, V] of each row, float32."""
    return [model(row_T[None]).logits[0, :-1].float().log_softmax(dim=-1) for row_T in rows_WT]


def compared(model: Any, rows_WT: torch.Tensor, exact: list[torch.Tensor]) -> tuple[float, float]:
    """Return the mean KL divergence from the 16-bit model, and the perplexity."""
    kl, loss = 0.0, 0.0
    for row_T, exact_TV, found_TV in zip(rows_WT, exact, log_probabilities(model, rows_WT), strict=True):
        kl += float((exact_TV.exp() * (exact_TV - found_TV)).sum(dim=-1).mean())
        loss -= float(found_TV.gather(1, row_T[1:, None]).mean())
    return kl / len(rows_WT), float(torch.tensor(loss / len(rows_WT)).exp())


def loaded(folder: str | Path) -> Any:
    """Return a model as stock transformers loads it, with the components if there are any."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def weight_bytes(folder: Path) -> int:
    """Return the bytes of all tensors of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main(contest: Contest) -> None:
    """Quantize by each, and print a line for each."""
    if contest.only == "gptq":
        by_gptq(contest)
        return
    contest.out.mkdir(parents=True, exist_ok=True)
    tokenizer, data = AutoTokenizer.from_pretrained(contest.model), contest.out / "calibration.jsonl"
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens_of(contest, is_measured=False)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    rows = tokens_of(contest, is_measured=True)
    exact = log_probabilities(loaded(contest.model), rows)
    seconds: dict[str, tuple[Path, float]] = {}
    if contest.gptq is not None:
        command = [str(contest.gptq), __file__, contest.model, str(contest.text), str(contest.out)]
        command += ["--only", "gptq", "--group", str(contest.group), "--examples", str(contest.examples)]
        done = subprocess.run(
            [*command, "--length", str(contest.length)], check=True, stdout=subprocess.PIPE, text=True
        )
        line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
        seconds["llm-compressor GPTQ W4A16"] = contest.out / "gptq", json.loads(line)["seconds"]
    for number, options in enumerate(contest.options):
        folder = contest.out / f"qsvd-{number}"
        seconds[f"qsvd {options}"] = folder, by_qsvd(contest, folder, options, data)
    print(f"{contest.model}, groups of {contest.group}, {rows.numel()} tokens of {contest.text}")
    print(f"{'':44} {'KL':>9} {'perplexity':>10} {'MB':>8} {'seconds':>8}")
    _, perplexity = compared(loaded(contest.model), rows[:], exact)
    print(f"{'16-bit model':44} {0:9.5f} {perplexity:10.4f}")
    for name, (folder, took) in seconds.items():
        kl, perplexity = compared(loaded(folder), rows, exact)
        print(f"{name:44} {kl:9.5f} {perplexity:10.4f} {weight_bytes(folder) / 1e6:8.2f} {took:8.1f}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Contest, config=(tyro.conf.PositionalRequiredArgs,)))
