"""The commands that are attacked, and the files that each of them finds."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

CPU = "--device cpu"
MACHINE = "--gpu 8GB --host 8GB"
SPEED = "--tflops 10 --link 10 --disk 1"
TRAIN = f"--batch-size 1 --accumulate 1 --learning-rate 1e-3 --held-out 0.2 --any-start {CPU}"
SHORT = f"{TRAIN} --max-length 24"
RUN = f"--steps 6 --save-every 2 --keep 3 {SHORT}"
QUANTIZE = f"--rank 4 --shard-size 150KB {CPU}"
CODECS = f"--codecs nf3-64-8x256 nf4-64-8x256 --ranks 0 4 {CPU}"
STATISTICS = f"--examples 40 --max-length 24 --gradient-rank 4 {CPU}"
SHARDS = "--shard-size 100KB"

SEEN_BY_PEOPLE = ("README.md", "report.md", "report.html", "allocation.txt")
TAKEN_OVER = ("generation_config.json", "tokenizer_config.json")  # that people edit in OUT, as in any model
OWN = tuple(f"{folder}/{name}" for folder in ("OUT", "MIXED", "RUN") for name in (*SEEN_BY_PEOPLE, *TAKEN_OVER))
OLD = ("RUN/checkpoint-*", *(f"RUN/{name}" for name in SEEN_BY_PEOPLE))
DATA = ("data.jsonl", *OWN)
TABLE = ("bits.txt*",)
FILE = ("stats.safetensors*",)
SOURCE = ("tiny", "data.jsonl")


@dataclass(frozen=True)
class Command:
    """A command, and the files that it finds.

    Args:
        words: The command line.
        inputs: Name in the place -> name of the subject.
        out: Patterns of what is the command's own and may be changed by it.
        chosen: Patterns of what a user may choose as they like: another result is right for another file.
        kept: Patterns of what an earlier run has finished, and this one does not read: it may stay as it is.
    """

    name: str
    words: str
    inputs: Mapping[str, str]
    out: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def commands(known: Collection[str]) -> list[Command]:
    """Return all commands.

    Args:
        known: The names that qsvd has: verify is attacked if it is there.
    """
    verify = [
        Command("verify", "verify OUT", _same("OUT"), (), OWN),
        Command("verify mixed", "verify MIXED", _same("MIXED"), (), OWN),
        Command("verify run", "verify RUN", _same("OUT", "RUN"), (), OWN),
    ]
    return [*_reading(), *_data(), *_quantizing(), *_training(), *_exporting(), *(verify if "verify" in known else [])]


def _same(*names: str, **others: str) -> dict[str, str]:
    return {name: name for name in names} | others


def _reading() -> list[Command]:
    measure, answer = f"--data data.jsonl --limit 2 --json {CPU}", f"--prompt Once --max-new-tokens 4 {CPU}"
    plan = f"{MACHINE} {SPEED} --json"
    with_data, run = _same("OUT", "data.jsonl"), _same("OUT", "RUN")
    return [
        Command("plan 16-bit", f"plan tiny data.jsonl {plan}", _same(*SOURCE), (), SOURCE),
        Command("plan", f"plan OUT data.jsonl {plan}", with_data, (), DATA),
        Command("plan mixed", f"plan MIXED {plan}", _same("MIXED"), (), OWN),
        Command("eval 16-bit", f"eval tiny {measure}", _same(*SOURCE), (), SOURCE),
        Command("eval", f"eval OUT RUN --base OUT {measure}", run | with_data, (), DATA),
        Command("eval mixed", f"eval MIXED {measure}", _same("MIXED", "data.jsonl"), (), DATA),
        Command("generate", f"generate RUN --base OUT {answer}", run, (), OWN),
        Command("report", "report OUT --json", _same("OUT"), (), OWN),
        Command("report mixed", "report MIXED", _same("MIXED"), (), OWN),
        Command("load", "load OUT", _same("OUT"), (), OWN),
        Command("load mixed", "load MIXED", _same("MIXED"), (), OWN),
    ]


def _data() -> list[Command]:
    preview = f"--out NEW --preview {TRAIN} --max-length 200"
    files = ("data.csv", "data.json", "data.parquet", "data.txt", "folder")
    config = _same("OUT", "data.jsonl", "options.yaml")
    chat, template = _same("OUT", "chat.jsonl"), _same("OUT", "chat.jsonl", "template.jinja")
    zephyr, own = "--chat-template zephyr", "--chat-template template.jinja"
    new, chosen = ("NEW",), ("chat.jsonl", "template.jinja", *OWN)
    return [
        *(
            Command(f"read {file}", f"train OUT {file} {preview}", _same("OUT", file), new, (file, *OWN))
            for file in files
        ),
        Command("read chat", f"train OUT chat.jsonl {zephyr} {preview}", chat, new, ("chat.jsonl", *OWN)),
        Command("template", f"train OUT chat.jsonl {own} {preview}", template, new, chosen),
        Command("config", f"train --config options.yaml {MACHINE} --dry-run", config, new, ("options.yaml", *DATA)),
    ]


def _quantizing() -> list[Command]:
    quantize, bits = f"quantize tiny --out NEW {QUANTIZE}", f"quantize tiny --out NEW --allocation bits.txt {CPU}"
    weighted = "--objective fisher --statistics stats.safetensors"
    budget = f"quantize tiny --out NEW --budget 4.5bits {weighted} {CPU}"
    calibrate = f"calibrate tiny data.jsonl --out stats.safetensors {STATISTICS}"
    allocate = f"allocate tiny --budget 4.5bits --out bits.txt {CODECS}"
    stopped = {"stats.safetensors.unfinished": "stats.unfinished"}
    some, costs = {"bits.txt.costs.jsonl": "some.costs.jsonl"}, _same("bits.txt", "bits.txt.costs.jsonl")
    tiny, new, chosen = _same("tiny"), ("NEW",), ("tiny", "bits.txt")
    return [
        Command("quantize", quantize, tiny, new, SOURCE),
        Command("quantize on", quantize, _same("tiny", NEW="OUT-stopped"), new),
        Command("quantize again", quantize.replace("NEW", "OUT"), _same("tiny", "OUT"), ("OUT",), OWN, ("OUT",)),
        Command("quantize table", bits, _same("tiny", "bits.txt"), new, chosen),
        Command("quantize budget", budget, _same("tiny", "stats.safetensors"), new, SOURCE),
        Command("calibrate", calibrate, _same(*SOURCE), FILE, SOURCE),
        Command("calibrate on", calibrate, _same(*SOURCE) | stopped, FILE),
        Command("calibrate again", calibrate, _same(*SOURCE, "stats.safetensors"), FILE, (), FILE),
        Command("allocate", allocate, tiny, TABLE, SOURCE),
        Command("allocate on", allocate, tiny | some, TABLE),
        Command("allocate again", allocate, tiny | costs, TABLE, ("bits.txt",), ("bits.txt",)),
    ]


def _training() -> list[Command]:
    train, more = f"train OUT data.jsonl --out RUN {RUN}", f"--resume {RUN}".replace("--steps 6", "--steps 8")
    whole = f"train tiny data.jsonl --out NEW --quantized Q --rank 4 --steps 3 --save-every 1 {SHORT}"
    lora = "train MIXED data.jsonl --method lora --rank 4"
    gradients = f"--method lora-ga --gradients stats.safetensors --rank 4 --steps 1 {SHORT}"
    both, mixed = _same("OUT", "data.jsonl"), _same("MIXED", "data.jsonl")
    new, run = ("NEW",), ("RUN",)
    return [
        Command("train", f"train OUT data.jsonl --out NEW --steps 2 {SHORT}", both, new, DATA),
        Command("train 16-bit", whole, _same(*SOURCE), ("NEW", "Q"), SOURCE),
        Command("train mixed", f"{lora} --out NEW --steps 1 {SHORT}", mixed, new, DATA),
        Command("train on", train, both | {"RUN": "RUN-stopped"}, run, OWN, OLD),
        Command("train lora on", f"{lora} --out RUN {RUN}", mixed | {"RUN": "LORA-stopped"}, run, OWN, OLD),
        Command("train more", f"train OUT data.jsonl --out RUN {more}", both | _same("RUN"), run, OWN, OLD),
        Command("train again", train, both | _same("RUN"), run, OWN, run),
        Command(
            "train from",
            f"train OUT data.jsonl --init-from RUN --out NEW --steps 1 {SHORT}",
            both | _same("RUN"),
            new,
            DATA,
        ),
        Command(
            "train gradients",
            f"train OUT data.jsonl --out NEW {gradients}",
            both | _same("stats.safetensors"),
            new,
            DATA,
        ),
    ]


def _exporting() -> list[Command]:
    merged, both, new = f"export RUN --base OUT --to merged --out NEW {SHARDS}", _same("OUT", "RUN"), ("NEW",)
    lora = "export RUN --base OUT --to lora --out NEW --original tiny"
    return [
        Command("export peft", "export RUN --base OUT --to peft --out NEW", both, new, OWN),
        Command("export lora", lora, both | _same("tiny"), new, ("tiny", *OWN)),
        Command("export merged", merged, both, new, OWN),
        Command("export mixed", "export MIXED --to merged --out NEW", _same("MIXED"), new, OWN),
        Command("export on", merged, both | {"NEW": "MERGED-stopped"}, new, OWN),
        Command("export again", merged, both | {"NEW": "MERGED"}, new, OWN, new),
    ]
