"""What is attacked: a small model, and all that the commands make of it.

Everything is made by the commands themselves, in forks. What is unfinished was killed when a certain file had been
renamed, so that the same bytes are there in every run of the tool.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from attacks.commands import CODECS, CPU, QUANTIZE, RUN, SHARDS, STATISTICS
from attacks.forks import make_place, start

BLOCKS = 2  # of the embedded model
PART = 4  # rows and columns of every matrix are cut to a quarter
LIMIT = 120.0  # seconds for each command that makes a subject
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A: {% generation %}{{ m['content'] + eos_token }}"
    "{% endgeneration %}{% else %}U: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
OPTIONS = """base: OUT
data: data.jsonl
out: NEW
steps: 3
learning_rate: 1.0e-3
max_length: 24
map: []
held_out: 0.2
"""


@dataclass(frozen=True)
class Kill:
    """Ends its own process when the so-manieth file that matches a pattern is renamed into its place."""

    pattern: str
    number: int = 1
    _seen: list[str] = field(default_factory=list, compare=False)

    def __call__(self) -> None:
        """Watch os.replace and os.rename of this process."""
        for name in ("replace", "rename"):
            setattr(os, name, self._watched(getattr(os, name)))

    def _watched(self, move: Callable[..., None]) -> Callable[..., None]:
        def watched(source: str, target: str, **options: int) -> None:
            self._seen.extend([str(target)] if fnmatch(str(target), self.pattern) else [])
            if len(self._seen) == self.number and fnmatch(str(target), self.pattern):
                time.sleep(0.3)  # for the threads that write other files
                os.kill(os.getpid(), signal.SIGKILL)
            move(source, target, **options)

        return watched


def make_large(folder: Path) -> Path:
    """Make subjects of the whole embedded model, with which commands write some megabytes; return their folder."""
    subjects, place = folder / "large", folder / "made"
    if not (subjects / "done").exists():
        shutil.rmtree(subjects, ignore_errors=True)
        subjects.mkdir(parents=True)
        write_model(subjects / "tiny", seed=0, blocks=4, part=1)
        write_data(subjects)
        maker = Maker(subjects, place)
        (subjects / "empty").mkdir()
        maker.make(f"quantize tiny --out OUT --rank 16 {CPU}", "OUT")
        maker.make(f"train OUT data.jsonl --out RUN {RUN}", "RUN")
        (subjects / "done").touch()
    return subjects


def make_subjects(folder: Path) -> Path:
    """Make all subjects in a folder; return theirs. What was made there before is used again."""
    subjects, place = folder / "subjects", folder / "made"
    if (subjects / "done").exists():
        return subjects
    shutil.rmtree(subjects, ignore_errors=True)
    for top, seed in ((subjects, 0), (subjects / "other", 1)):
        top.mkdir(parents=True)
        write_model(top / "tiny", seed)
        write_data(top)
        maker = Maker(top, place)
        maker.make(f"calibrate tiny data.jsonl --out stats.safetensors {STATISTICS} --seed {seed}", "stats.safetensors")
        maker.make(f"allocate tiny --budget 4.5bits --out bits.txt {CODECS}", "bits.txt", "bits.txt.costs.jsonl")
        maker.make(f"quantize tiny --out OUT {QUANTIZE}", "OUT")
        maker.make(f"quantize tiny --out MIXED --allocation bits.txt {CPU}", "MIXED")
        maker.base = subjects  # RUN and RUN of the others belong to one quantized model
        maker.make(f"train OUT data.jsonl --out RUN {RUN} --seed {seed}", "RUN")
    maker = Maker(subjects, place)
    maker.make(f"export RUN --base OUT --to merged --out MERGED {SHARDS}", "MERGED")
    maker.stop(f"quantize tiny --out OUT {QUANTIZE}", "OUT", Kill("*.factors", 8), "OUT-stopped")
    maker.stop(f"train OUT data.jsonl --out RUN {RUN}", "RUN", Kill("*/checkpoint-6"), "RUN-stopped")
    lora = f"train MIXED data.jsonl --out RUN --method lora --rank 4 {RUN}"
    maker.stop(lora, "RUN", Kill("*/checkpoint-6"), "LORA-stopped")
    merged = f"export RUN --base OUT --to merged --out MERGED {SHARDS}"
    maker.stop(merged, "MERGED", Kill("*/model-*.safetensors", 3), "MERGED-stopped")
    calibrate, file = f"calibrate tiny data.jsonl --out stats.safetensors {STATISTICS}", "stats.safetensors.unfinished"
    maker.stop(calibrate, file, Kill("*.unfinished", 2), "stats.unfinished")
    lines = (subjects / "bits.txt.costs.jsonl").read_text().splitlines(keepends=True)
    (subjects / "some.costs.jsonl").write_text("".join(lines[:7]))
    (subjects / "done").touch()
    return subjects


class Maker:
    """Makes subjects by commands.

    Args:
        top: The folder that they are put into.
        place: A place to work in.
    """

    def __init__(self, top: Path, place: Path):
        self.top, self.place, self.base = top, place, top

    def make(self, words: str, *results: str) -> None:
        """Run a command on the subjects that it names and keep these results."""
        self._run(words, results)
        for result in results:
            os.rename(self.place / result, self.top / result)

    def stop(self, words: str, result: str, kill: Kill, name: str) -> None:
        """Run a command until it is killed, and keep what it has left as `name`."""
        self._run(words, (result,), kill)
        os.rename(self.place / result, self.top / name)

    def _run(self, words: str, results: tuple[str, ...], kill: Kill | None = None) -> None:
        named = {word for word in words.split() if not results[0].startswith(word) and (self.base / word).exists()}
        make_place(self.place, self.base, {name: name for name in named})
        ended = start(words.split(), self.place, limit=LIMIT, first=kill).wait()
        wanted = 0 if kill is None else -signal.SIGKILL
        if ended.code != wanted:
            raise RuntimeError(f"qsvd {words} ended with {ended.code}, not {wanted}: {ended.err[-2000:]}")


def write_model(folder: Path, seed: int, blocks: int = BLOCKS, part: int = PART) -> None:
    """Write the first blocks of the embedded model, cut to a part of its width, in two shards.

    Args:
        seed: 0 for the model's own values; other seeds add noise.
        part: What the number of rows and of columns is divided by.
    """
    import safetensors.torch
    import torch

    from qsvd.commands.demo import MODEL

    folder.mkdir()
    for path in MODEL.glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    changes = {name: config[name] // part for name in ("hidden_size", "head_dim", "intermediate_size")}
    (folder / "config.json").write_text(json.dumps(config | changes | {"num_hidden_layers": blocks}, indent=2))
    generator, shards = torch.Generator().manual_seed(seed), ({}, {})
    for name, tensor in safetensors.torch.load_file(MODEL / "model.safetensors").items():
        if ".layers." in name and int(name.split(".")[2]) >= blocks:
            continue
        kept = tensor[tuple(slice(size if size == config["vocab_size"] else size // part) for size in tensor.shape)]
        noise = torch.randn(kept.shape, generator=generator) * (0.01 if seed else 0)
        shards[".layers." in name][name] = (kept + noise).to(torch.bfloat16).contiguous()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for file, shard in zip(files, shards, strict=True):
        safetensors.torch.save_file(shard, folder / file, metadata={"format": "pt"})
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_data(top: Path) -> None:
    """Write the same texts in every form that is read, a file of options and a chat template."""
    import pandas

    from qsvd.commands.demo import FINE_TUNING

    texts = [line[:100] for line in FINE_TUNING.read_text(encoding="utf-8").splitlines() if len(line) > 60][:40]
    table = pandas.DataFrame({"text": texts[:8]})
    table.to_json(top / "data.json", orient="records")
    table.to_csv(top / "data.csv", index=False)
    table.to_parquet(top / "data.parquet")
    (top / "data.txt").write_text("\n\n".join(texts[:8]))
    (top / "data.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    roles = ("user", "assistant")
    chats = [
        {"messages": [{"role": roles[turn % 2], "content": texts[number + turn][:30]} for turn in range(4)]}
        for number in range(6)
    ]
    (top / "chat.jsonl").write_text("".join(f"{json.dumps(chat)}\n" for chat in chats))
    (top / "folder").mkdir()
    for name, rows in {"train": texts[:8], "valid": texts[8:12]}.items():
        (top / "folder" / f"{name}.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in rows))
    (top / "template.jinja").write_text(TEMPLATE)
    (top / "options.yaml").write_text(OPTIONS)
