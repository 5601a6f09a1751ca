"""A tiny random model of a family, and every command on it: which steps work, why others fail, what stays in 16 bits.

The judge is transformers: its own model with the dense weights Q + B A, its own generate, its own reading of an export.
"""

import importlib.util
import json
import shutil
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scipy.io import wavfile
from torch import Tensor, nn

import qsvd
from qsvd.commands.generate import main as generate
from qsvd.commands.report import main as report
from qsvd.files.split_folder import open_split
from qsvd.options import Generate, Report
from qsvd.plan.weights import coverage, plan_model

STEPS = ("plan", "quantize", "report", "plain load", "load", "generate", "train", "eval", "export")
TEXT = ("lm", "vlm", "s2s")  # groups that are trained on texts
LEARN = (*TEXT, "enc", "whisper")  # and on labels, and on sounds
RATE = 16_000  # samples of a second of sound
RANK, TOKENS, LONGEST = 4, 16, 32
CLOSE = 2e-4  # of the spread of the logits: float32 sums in another order
FIRST_RESERVED = 500  # token ids from here on stand for images and sound in the families of `vlm`


@dataclass(frozen=True)
class Family:
    """A row of families.py: name, group, class in transformers, class of the config, and its options."""

    name: str
    group: str
    architecture: str
    config: str
    options: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """A name for a folder."""
        return "".join(c if c.isalnum() else "-" for c in self.name).strip("-")


@dataclass
class Outcome:
    """What was tried with a family.

    Args:
        steps: Step -> "" if it works, "-" if it does not apply, else the first sentence of the failure.
        left: Groups of linear layers that stay in 16 bits, each with the reason.
        share: Of all parameters, how many are split.
    """

    family: Family
    steps: dict[str, str] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    share: float = 0.0

    @property
    def works(self) -> bool:
        """Whether every step that applies works."""
        return set(self.steps) == set(STEPS) and not any(said not in ("", "-") for said in self.steps.values())


def read_families(file: Path) -> list[Family]:
    """Return the families of a families.py."""
    spec = importlib.util.spec_from_file_location("families", file)
    assert spec is not None, "a Python file"
    assert spec.loader is not None, "a Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [Family(*row) for row in module.F]


def _config(family: Family) -> Any:
    options = family.options() if callable(family.options) else family.options
    return getattr(transformers, family.config)(**options, architectures=[family.architecture])


def make_model(family: Family, folder: Path, tokenizer: Path, seed: int = 0) -> None:
    """Write a random model. Its weights are large enough for every layer to change the logits."""
    config = _config(family)
    torch.manual_seed(seed)
    model = getattr(transformers, family.architecture)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and parameter.std() < 0.05:
                parameter.mul_(4)
            if parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    if model.can_generate():
        model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    if family.group == "whisper":
        _save_processor(folder, config)
    elif family.group != "vit":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / name, folder / name)


def _save_processor(folder: Path, config: Any) -> None:
    """Write a tokenizer of bytes, and a feature extractor for as much sound as the model hears."""
    from tokenizers.pre_tokenizers import ByteLevel

    names = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>"]
    names += ["<|translate|>", "<|nocaptions|>", "<|notimestamps|>"]
    words = transformers.WhisperTokenizer(vocab={name: number for number, name in enumerate(names)}, merges=[])
    seconds = 2 * config.max_source_positions * 160 // RATE  # 160 samples a frame
    extractor = transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=seconds)
    transformers.WhisperProcessor(extractor, words).save_pretrained(folder)


def _sounds(folder: Path, texts: list[str]) -> list[dict[str, str]]:
    """Write a short noise for each text."""
    rows = []
    for number, text in enumerate(texts):
        noise = np.random.default_rng(number).normal(0, 1000, RATE // 2).astype(np.int16)
        wavfile.write(folder / f"{number}.wav", RATE, noise)
        rows.append({"audio": f"{number}.wav", "text": text[:20]})
    return rows


def inputs_of(family: Family, config: Any) -> dict[str, Tensor]:
    """Return what the model reads: tokens, pixels or sound."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, FIRST_RESERVED, (2, TOKENS), generator=draw)
    vision = getattr(config, "vision_config", config)
    if family.group == "vit":
        return {"pixel_values": torch.randn(2, 3, vision.image_size, vision.image_size, generator=draw)}
    if family.group == "clip":
        pixels = torch.randn(2, 3, vision.image_size, vision.image_size, generator=draw)
        return {"input_ids": tokens, "pixel_values": pixels}
    if family.group == "whisper":
        sound = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=draw)
        return {"input_features": sound, "decoder_input_ids": tokens}
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens.flip(1)} if family.group == "s2s" else {})


@torch.no_grad()
def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the first output."""
    outputs = model(**inputs, **({"use_cache": False} if model.can_generate() else {}))
    return next(value for value in outputs.to_tuple() if isinstance(value, Tensor)).float()


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, in units of the spread of the logits."""
    return ((found - wanted).abs().max() / wanted.std()).item()


class Trial:
    """The steps of one family, in a folder.

    Args:
        family: What to try.
        folder: Empty; for the models.
        tokenizer: Folder of a tokenizer of at most 512 tokens.
        texts: Texts for training and evaluation.
        include_towers, exclude: Options of qsvd quantize.
    """

    def __init__(self, family: Family, folder: Path, tokenizer: Path, texts: list[str], **options: Any):
        self.family, self.folder, self.options = family, folder, options
        self.source, self.out, self.run, self.merged = (folder / name for name in ("model", "out", "run", "merged"))
        self.model_class = getattr(transformers, family.architecture)
        self._found: dict[Path, Tensor] = {}
        make_model(family, self.source, tokenizer)
        rows = [{"prompt": text[:20], "completion": text[20:60]} for text in texts]
        if family.group == "enc":
            rows = [{"text": text[:40], "label": "ab"[n % 2]} for n, text in enumerate(texts)]
        if family.group == "whisper":
            rows = _sounds(folder, texts)
        self.data = folder / "data.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.inputs = inputs_of(family, self.model_class.config_class.from_pretrained(self.source))

    def outcome(self, steps: Sequence[str] = STEPS) -> Outcome:
        """Try these steps."""
        outcome = Outcome(self.family)
        tries: dict[str, Callable[[], str]] = {
            "plan": self._plan,
            "quantize": self._quantize,
            "report": self._report,
            "plain load": self._plain_load,
            "load": self._load,
            "generate": self._generate,
            "train": self._train,
            "eval": self._eval,
            "export": self._export,
        }
        for step in steps:
            needs = {"plan": self.source, "quantize": self.source, "eval": self.out}.get(step, self.out)
            if not (needs / "config.json").is_file():
                outcome.steps[step] = "not tried"
                continue
            with _quiet():
                try:
                    outcome.steps[step] = tries[step]()
                except (SystemExit, Exception) as error:  # noqa: BLE001  # a step may fail in any way: that is the result
                    outcome.steps[step] = _first_sentence(error)
        if (self.out / "qsvd.json").is_file():
            coverage = json.loads((self.out / "qsvd.json").read_text())["header"]["coverage"]
            outcome.share, outcome.left = coverage["elements_split"] / coverage["elements"], _left(coverage)
        return outcome

    @cached_property
    def wanted(self) -> Tensor:
        """Logits of transformers' own model with the dense weights Q + B A in it."""
        split = open_split(self.out)
        model = self.model_class.from_pretrained(self.source, dtype=torch.float32)
        for name, weight in split.weights.items():
            put_dense(model, weight["module"], split.dense(name))
        return logits(model.eval(), self.inputs)

    def _plan(self) -> str:
        answer = qsvd.plan(self.source, rank=RANK, max_length=LONGEST, device="cpu", **self.options)
        return "" if answer.fits else "does not fit"

    def _quantize(self) -> str:
        qsvd.quantize(self.source, out=self.out, rank=RANK, device="cpu", iterations=1, **self.options)
        return ""

    def _report(self) -> str:
        report(Report([self.out]))
        return ""

    def _plain_load(self) -> str:
        if "codecs" in json.loads((self.out / "config.json").read_text())["quantization_config"]:
            return "-"
        model = self.model_class.from_pretrained(self.out, dtype=torch.float32).eval()
        for module in model.modules():
            if type(module).__name__ == "Linear4bit":
                module.train()  # in eval mode bitsandbytes computes in bfloat16 on a CPU that has it
        found = logits(model, self.inputs)
        if self._is_decoded_wrongly():
            return ""
        return _compared(found, self.wanted)

    def _is_decoded_wrongly(self) -> bool:
        """Tell whether bitsandbytes 0.50 may decode wrongly on this CPU: in-features that 64 does not divide."""
        return any(weight["shape"][1] % 64 for weight in open_split(self.out).weights.values())

    def _load(self) -> str:
        return _compared(self._loaded(self.out), self.wanted)

    def _loaded(self, folder: Path) -> Tensor:
        """Return the logits of `qsvd.load` of a folder, which is loaded once."""
        if folder not in self._found:
            model = qsvd.load(folder, device="cpu", dtype=torch.float32)
            self._found[folder] = logits(model, self.inputs)
        return self._found[folder]

    def _generate(self) -> str:
        if self.family.group == "whisper":
            told: dict[str, Any] = {"audio": (str(self.folder / "0.wav"),)}
        elif self.family.group in TEXT:
            told = {"prompt": ("Once upon a time",), "raw": True}
        else:
            return "-"
        generate(Generate(str(self.out), max_new_tokens=4, device="cpu", **told))
        return ""

    def _train(self) -> str:
        if self.family.group not in LEARN:
            return "-"
        before = json.loads((self.out / "qsvd.json").read_text())["fingerprint"]
        done = qsvd.train(
            self.out, self.data, out=self.run, steps=2, batch_size=2, accumulate=1, max_length=LONGEST, held_out=0.1,
            any_start=True, device="cpu", learning_rate=1e-3,
        )  # fmt: skip
        record = json.loads((self.run / "qsvd_adapter.json").read_text())
        assert done.steps == 2
        assert record["fingerprint"] == before
        return "" if self._changed() else "training changed no logits"

    def _changed(self) -> bool:
        if self.family.group == "enc":
            return True
        return difference(self._loaded(self.run), self._loaded(self.out)) > 1e-6

    def _eval(self) -> str:
        if self.family.group not in LEARN:
            return "-"
        model = self.run if self.family.group == "enc" else self.out
        qsvd.evaluate(model, data=self.data, device="cpu", batch_size=2, limit=2)
        return ""

    def _export(self) -> str:
        run = self.run if (self.run / "qsvd_adapter.json").is_file() else self.out
        qsvd.export(run, to="merged", out=self.merged, dtype="float32")
        architecture = json.loads((self.merged / "config.json").read_text())["architectures"][0]
        plain, info = getattr(transformers, architecture).from_pretrained(
            self.merged, dtype=torch.float32, output_loading_info=True
        )
        odd = {kind: sorted(info[kind]) for kind in ("missing_keys", "mismatched_keys") if info[kind]}
        if odd:
            return f"the export has {odd}"
        return _compared(logits(plain.eval(), self.inputs), self._loaded(run))


def put_dense(model: nn.Module, path: str, weight_OI: Tensor) -> None:
    """Write a dense weight into transformers' own model, in place; "...experts.down_proj.3" is an expert of a stack."""
    owner, _, number = path.rpartition(".")
    with torch.no_grad():
        if number.isdigit() and not isinstance(_found(model, path), nn.Module):
            parent, _, name = owner.rpartition(".")
            experts = model.get_submodule(parent)
            place = experts.get_parameter(name)[int(number)]
            turned = place.shape != weight_OI.shape or bool(getattr(experts, "is_transposed", False))
            place.copy_(weight_OI.T if turned else weight_OI)
            return
        module = model.get_submodule(path)
        turned = type(module).__name__ == "Conv1D"
        module.get_parameter("weight").copy_(weight_OI.T if turned else weight_OI)


def _found(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _compared(found: Tensor, wanted: Tensor) -> str:
    far = difference(found, wanted)
    return "" if far <= CLOSE else f"logits differ by {far:.2g} of their spread"


def _first_sentence(error: BaseException) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    known = isinstance(error, (ValueError, SystemExit)) and "qsvd" in type(error).__module__
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if known else f" [{type(error).__name__} {Path(place.filename).name}:{place.lineno}]"
    return said[:220] + where


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        yield


def row(outcome: Outcome) -> str:
    """Return a line for a terminal: the family, and its failures or "works"."""
    words = ", ".join(f"{step}: {said}" for step, said in outcome.steps.items() if said not in ("", "-", "not tried"))
    marks = "".join({"": "+", "-": ".", "not tried": " "}.get(outcome.steps.get(step, " "), "x") for step in STEPS)
    return f"{marks} {outcome.family.name:24} {words or 'works'}"


def _left(coverage: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what stays in 16 bits by a rule: the reason, and the names of the layers."""
    reasons: dict[str, list[str]] = {}
    for group in coverage["left"]:
        if group["reason"]:
            reasons.setdefault(group["reason"], []).append(group["pattern"].removesuffix(".weight").rpartition(".")[2])
    return tuple(f"{reason}: {', '.join(sorted(set(names)))}" for reason, names in sorted(reasons.items()))


def in_16_bits(family: Family) -> str:
    """Return what the last column of the table says, from the config alone."""
    return "; ".join(_left(asdict(coverage(plan_model(_config(family))))))


# docs/models.md

HEAD = """\
# Models

Every command on a tiny random model of each family (`tools/families --write docs/models.md`).

- *quantize* includes the report.
- *load* compares the logits of `qsvd.load` with those of transformers' own model with the dense weights Q + B A.
- *from_pretrained* compares plain transformers with them, where the format is that of bitsandbytes.
- *generate* continues a text, or writes what is said in a sound.
- *train* is two steps on text, or on sound; *export* a merged export, which plain transformers opens with equal logits.
- yes: works; no: does not work; -: does not apply.

A mixture of experts that was really trained: [errors and perplexities](results/2026-11-28-moe-cpu.md).
"""
SHOWN = {"plan": "plan", "quantize": "quantize", "load": "load", "plain load": "from_pretrained"}
SHOWN |= {step: step for step in ("generate", "train", "eval", "export")}


def table_row(outcome: Outcome) -> str:
    """Return the row of a family in docs/models.md."""
    words = {"": "yes", "-": "-"}
    cells = [words.get(outcome.steps.get(step, "no"), "no") for step in SHOWN]
    name = f"{outcome.family.name} | {outcome.family.architecture}"
    return f"| {name} | {' | '.join(cells)} | {'; '.join(outcome.left)} |"


def updated(page: str, outcomes: Iterable[Outcome]) -> str:
    """Return docs/models.md with the rows of these families new, in the order of the rows that are there."""
    rows = dict(_rows(page))
    for outcome in outcomes:
        rows[outcome.family.name] = table_row(outcome)
    head = f"| family | class | {' | '.join(SHOWN.values())} | in 16 bits by a rule |"
    rule = "|".join(["", *[" --- "] * (len(SHOWN) + 3), ""])
    return "\n".join([HEAD, head, rule, *rows.values()]) + "\n"


def _rows(page: str) -> Iterator[tuple[str, str]]:
    for line in page.splitlines():
        if line.startswith("| ") and not line.startswith(("| family", "| ---")):
            yield line.split("|")[1].strip(), line


def texts_of(shared: Path) -> list[str]:
    """Return a few short texts."""
    lines = (shared / "data" / "tinystories-100.jsonl").read_text().splitlines()[:10]
    return [json.loads(line)["text"] for line in lines]
