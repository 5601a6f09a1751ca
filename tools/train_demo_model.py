"""Train the demo model of the package: a 4 M parameter Llama, from an archive of novels to a finished folder.

With --experts N the model is a Qwen3-MoE with N experts in each layer instead; 8 give 3.6 M parameters.

The same command continues a stopped run from its last checkpoint. Needs a C++ compiler on a CPU.
Shape suffixes: B = rows of a batch, T = tokens of a row.
"""

import math
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles
from typing import Annotated

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

LATEST_YEAR = 1928  # later novels may still be protected in the United States
PROTECTED = ("Forster_Angels_1905", "Forster_View_1908")  # elsewhere: their author died in 1970
HELD_OUT = ("Cbronte_Jane_1847", "Stevenson_Treasure_1883", "Trollope_Warden_1855")
HELD_OUT_BYTES = 60_000  # of each
FINE_TUNE = "Morris_Wood_1894"
FINE_TUNE_BYTES = 200_000
SAME_STYLE = ("Morris_Roots_1890", "Morris_Water_1897")  # left out too, so that the style of FINE_TUNE is new
UNSEEN = (*HELD_OUT, FINE_TUNE, *SAME_STYLE)

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BOS_ID, EOS_ID, PAD_ID = range(3)
VOCABULARY = 4096
CONTEXT = 512
WIDTH, FEED_FORWARD, LAYERS, HEADS, KV_HEADS = 256, 768, 4, 8, 4
MOE_WIDTH, MOE_FEED_FORWARD, MOE_HEADS, MOE_KV_HEADS = 192, 128, 6, 3  # with experts; the feed-forward width of one
EXPERTS_OF_TOKEN = 2
BALANCE = 0.01  # weight of the loss that keeps the experts equally used (Switch Transformer, arXiv:2101.03961)

BATCH = 8
PEAK_RATE = 2e-3
WARM_UP = 0.02  # of the run
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
CLIP = 1.0
LONGEST_STEP_SECONDS = 10.0  # a longer step compiled or was suspended; the rest of it is not training time
CHECKPOINT_SECONDS = 180.0


@dataclass(frozen=True)
class Options:
    novels: Annotated[Path, "tar.xz of UTF-8 texts, Author_Title_Year.txt"] = Path("../shared/data/novels90.tar.xz")
    out: Annotated[Path, "folder of the finished model; the two texts are written next to it"] = Path("qsvd/demo/model")
    scratch: Annotated[Path, "folder of checkpoints, kept out of git"] = Path("build/demo-model")
    minutes: Annotated[float, "end after this many minutes of training, or after --steps"] = 58.0
    steps: Annotated[int, "end after this many steps, or after --minutes"] = 20_000
    experts: Annotated[int, "experts of each layer; 0 is the dense model"] = 0
    seed: Annotated[int, "random seed (weights, order of the text)"] = 0
    device: Annotated[str, "a torch device"] = "cpu"
    threads: Annotated[int, "CPU threads"] = 2


@dataclass
class Run:
    """Progress of the run, in the checkpoint next to weights and moments."""

    steps: int = 0
    seconds: float = 0.0

    def progress(self, options: Options) -> float:
        """Return the finished fraction of the run, by steps or by time, whichever is larger."""
        return max(self.steps / options.steps, self.seconds / (60 * options.minutes))


def read_novels(archive: Path) -> dict[str, str]:
    """Return the cleaned text of each public-domain novel of the archive, by name, in alphabetical order."""
    novels = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = Path(member.name).stem
            if member.isfile() and int(name.rsplit("_", 1)[1]) <= LATEST_YEAR and name not in PROTECTED:
                novels[name] = clean(tar.extractfile(member).read().decode("utf-8-sig"))
    missing = [name for name in UNSEEN if name not in novels]
    if missing:
        raise ValueError(f"{archive} lacks {missing}")
    return dict(sorted(novels.items()))


def clean(text: str) -> str:
    """Return the text with one paragraph per line, single spaces and no empty lines.

    A line break is a wrap, not the end of a paragraph, if the next word would not have fitted on the line.
    """
    lines = text.replace("\f", " ").splitlines()
    page = quantiles([len(line) for line in lines if line.strip()], n=10)[-1]
    paragraphs = [""]
    last = ""
    for line in lines:
        first_word = line.split(maxsplit=1)[0] if line.strip() else ""
        wrapped = first_word and not line[0].isspace() and len(last) + 1 + len(first_word) > 0.85 * page
        if not (wrapped and last.strip() and page < 100):
            paragraphs.append("")
        paragraphs[-1] += " " + line
        last = line
    return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()) + "\n"


def passage(text: str, num_bytes: int) -> str:
    """Return whole paragraphs of about num_bytes from the middle of the text."""
    lines = text.splitlines(keepends=True)
    skip = (len(text.encode()) - num_bytes) // 2
    chosen, position = [], 0
    for line in lines:
        if skip <= position < skip + num_bytes:
            chosen.append(line)
        position += len(line.encode())
    return "".join(chosen)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on the texts; it adds BOS before a text and is lossless."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Return int16 [tokens]: the texts one after the other, EOS after each, no BOS."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.cat([torch.tensor([*encoding.ids, EOS_ID], dtype=torch.int16) for encoding in encodings])


def batch_at(tokens: Tensor, step: int, seed: int) -> Tensor:
    """Return int64 [B, T + 1]: each epoch has every window of T tokens once, in its own order and at its own offset.

    Every other row starts with BOS, so that the model learns beginnings of texts and windows from their middle.
    """
    num_rows = (len(tokens) - 1) // CONTEXT - 1
    epoch, place = divmod(step, num_rows // BATCH)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    offset = int(torch.randint(CONTEXT, (1,), generator=generator))
    rows_B = torch.randperm(num_rows, generator=generator)[place * BATCH : (place + 1) * BATCH]
    batch_BT = tokens[offset + rows_B[:, None] * CONTEXT + torch.arange(CONTEXT + 1)].long()
    batch_BT[::2, 0] = BOS_ID
    return batch_BT


def new_model(experts: int, seed: int) -> PreTrainedModel:
    """Return the untrained model, float32."""
    torch.manual_seed(seed)  # transformers draws the weights from the global generator
    common = {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }
    if not experts:
        config = LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=FEED_FORWARD,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            **common,
        )
        return LlamaForCausalLM(config)
    config = Qwen3MoeConfig(
        hidden_size=MOE_WIDTH,
        moe_intermediate_size=MOE_FEED_FORWARD,
        num_attention_heads=MOE_HEADS,
        num_key_value_heads=MOE_KV_HEADS,
        head_dim=MOE_WIDTH // MOE_HEADS,
        num_experts=experts,
        num_experts_per_tok=EXPERTS_OF_TOKEN,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE,
        **common,
    )
    return Qwen3MoeForCausalLM(config)


def new_optimizer(model: PreTrainedModel) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the matrices only."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]  # experts are 3-D
    gains = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=BETAS, fused=True)


def rate_at(progress: float) -> float:
    """Return the learning rate: a linear warm-up, then a cosine down to zero."""
    if progress < WARM_UP:
        return PEAK_RATE * (progress / WARM_UP + 0.01)
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


def mean_loss(model: PreTrainedModel, batch_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of nats per token, float32, with products in bfloat16; and the loss of unequal use of experts."""
    routed = {"output_router_logits": True} if model.config.model_type == "qwen3_moe" else {}
    with torch.autocast(batch_BT.device.type, torch.bfloat16):
        output = model(batch_BT[:, :-1], use_cache=False, **routed)
    nats = cross_entropy(output.logits.flatten(0, 1).float(), batch_BT[:, 1:].flatten())
    return nats, BALANCE * output.aux_loss if routed else torch.zeros_like(nats)


def train(model: PreTrainedModel, tokens: Tensor, options: Options) -> Run:
    """Train the model in place from its last checkpoint, if any, to the end of the run."""
    checkpoint = options.scratch / "checkpoint.pt"
    optimizer, run = new_optimizer(model), Run()
    if checkpoint.exists():
        run = load_checkpoint(checkpoint, model, optimizer, options)
    loss_of: Callable = torch.compile(mean_loss)
    saved_at, average = time.monotonic(), math.nan
    while run.progress(options) < 1:
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(run.progress(options))
        loss, unbalanced = loss_of(model, batch_at(tokens, run.steps, options.seed).to(options.device))
        (loss + unbalanced).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
        seconds = time.monotonic() - started
        run.steps += 1
        run.seconds += min(seconds, LONGEST_STEP_SECONDS)
        if run.steps % 50 == 0:
            print(f"step {run.steps} {run.progress(options):.1%} loss {average:.4f} {seconds:.2f} s", flush=True)
        if time.monotonic() - saved_at > CHECKPOINT_SECONDS or run.progress(options) >= 1:
            save_checkpoint(checkpoint, model, optimizer, run, options)
            saved_at = time.monotonic()
    return run


def save_checkpoint(
    path: Path, model: PreTrainedModel, optimizer: torch.optim.AdamW, run: Run, options: Options
) -> None:
    """Write the state of the run; the old file is replaced after the new one is complete."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": asdict(run), "seed": options.seed}
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(path)


def load_checkpoint(path: Path, model: PreTrainedModel, optimizer: torch.optim.AdamW, options: Options) -> Run:
    """Load the state of a stopped run of the same seed into model and optimizer."""
    state = torch.load(path, weights_only=True, map_location=options.device)
    if state["seed"] != options.seed:
        raise ValueError(f"{path} has seed {state['seed']}, this run {options.seed}: give another --scratch")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return Run(**state["run"])


@torch.no_grad()
def total_nats(model: PreTrainedModel, tokens: Tensor) -> float:
    """Return the nats of all tokens, BOS before the first, in windows of T tokens that do not overlap."""
    stream = torch.cat([torch.tensor([BOS_ID]), tokens.long()]).to(model.device)
    nats = 0.0
    for start in range(0, len(stream) - 1, CONTEXT):
        window_T = stream[start : start + CONTEXT + 1]
        logits_TV = model(window_T[None, :-1], use_cache=False).logits[0]
        nats += cross_entropy(logits_TV.float(), window_T[1:], reduction="sum").item()
    return nats


def write_card(path: Path, facts: dict[str, str], novels: list[str]) -> None:
    """Write the model card: the measured facts as a table, then how to use the model, its data, recipe and licence."""
    table = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())
    path.write_text(f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# Demo model of qsvd

A small language model, trained on {len(novels)} English novels by `tools/train_demo_model.py`. It shows the error of
4-bit quantization with and without components on any laptop. It writes sentences in the style of Victorian novels and
has no knowledge.

| | |
|---|---|
{table}

Held-out perplexity: the weights as saved (bfloat16), evaluated in float32 on `heldout.txt`, windows of {CONTEXT} tokens
that do not overlap, every token counted once. Nothing was chosen by it.

## Data

The novels of github.com/computationalstylistics/100_english_novels published up to {LATEST_YEAR}, except
{" and ".join(PROTECTED)}; one paragraph per line, otherwise as found there. The model and
its tokenizer were not trained on these:

- held out, a passage of about {HELD_OUT_BYTES // 1000} kB of each in `heldout.txt`: {", ".join(HELD_OUT)};
- kept for fine-tuning, about {FINE_TUNE_BYTES // 1000} kB in `finetune.txt`: {FINE_TUNE};
- left out because they are in the style of the last: {", ".join(SAME_STYLE)}.

Other novels by the authors of the first group were trained on. Trained on: {", ".join(novels)}.

## Recipe

AdamW (betas {BETAS[0]}, {BETAS[1]}; weight decay {WEIGHT_DECAY} on matrices), learning rate {PEAK_RATE} after a
warm-up over {WARM_UP:.0%} of the run, then a cosine to zero; {BATCH} windows of {CONTEXT} tokens per step; gradient
norm clipped at {CLIP}; products in bfloat16, weights and moments in float32. With experts, a loss of weight {BALANCE}
for their equal use. Half of the windows start with `{BOS}`, half in the middle of a text. Byte-level BPE, no
normalization: every UTF-8 text decodes to itself. The schedule follows steps or minutes, whichever is further, and
other work may slow the machine, so no two runs are equal.

## Licence

Weights, tokenizer and card: Apache-2.0. The novels, and so the passages in `heldout.txt` and `finetune.txt`, are in the
public domain: published before {LATEST_YEAR + 1}, by authors who died more than 70 years ago.
""")


def finish(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, options: Options) -> dict[str, str]:
    """Round the model to bfloat16 and save it; return its size and its held-out loss."""
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    held_out = (options.out.parent / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer(held_out, add_special_tokens=False, verbose=False)["input_ids"]
    nats = total_nats(model.float().eval(), torch.tensor(ids))
    shape = f"width {WIDTH}, feed-forward {FEED_FORWARD}, {HEADS} heads, {KV_HEADS} KV heads"
    if options.experts:
        shape = (
            f"width {MOE_WIDTH}, {options.experts} experts of feed-forward {MOE_FEED_FORWARD}, {EXPERTS_OF_TOKEN} of "
            f"them per token, {MOE_HEADS} heads, {MOE_KV_HEADS} KV heads"
        )
    return {
        "parameters": f"{model.num_parameters():,}, embeddings tied",
        "class": type(model).__name__,
        "shape": f"{LAYERS} layers, {shape}",
        "vocabulary, context": f"{VOCABULARY} byte-level BPE tokens, {CONTEXT} positions",
        "held-out text": f"{len(held_out.encode()):,} bytes, {len(ids):,} tokens",
        "held-out loss": f"{nats / len(ids):.4f} nats per token",
        "**held-out perplexity**": f"**{math.exp(nats / len(ids)):.3f}** per token",
        "held-out bits per byte": f"{nats / math.log(2) / len(held_out.encode()):.4f}",
    }


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    options.scratch.mkdir(parents=True, exist_ok=True)
    (options.scratch / ".gitignore").write_text("*\n")
    options.out.mkdir(parents=True, exist_ok=True)
    novels = read_novels(options.novels)
    held_out = "".join(passage(novels[name], HELD_OUT_BYTES) for name in HELD_OUT)
    (options.out.parent / "heldout.txt").write_text(held_out, encoding="utf-8")
    (options.out.parent / "finetune.txt").write_text(passage(novels[FINE_TUNE], FINE_TUNE_BYTES), encoding="utf-8")
    texts = {name: text for name, text in novels.items() if name not in UNSEEN}
    tokenizer = train_tokenizer(list(texts.values()))
    tokens = encode(tokenizer, list(texts.values()))
    print(f"{len(texts)} novels, {len(tokens):,} tokens", flush=True)
    model = new_model(options.experts, options.seed).to(options.device)
    run = train(model, tokens, options)
    num_seen = run.steps * BATCH * CONTEXT
    hardware = f"{options.threads} CPU cores" if options.device == "cpu" else f"one {options.device} device"
    speed = f"{num_seen / run.seconds:,.0f} tokens per second"
    facts = finish(model, tokenizer, options) | {
        "training text": f"{sum(len(text.encode()) for text in texts.values()):,} bytes, {len(tokens):,} tokens",
        "trained on": f"{num_seen:,} tokens ({num_seen / len(tokens):.2f} epochs), {run.steps:,} steps",
        "training time": f"{run.seconds / 60:.0f} minutes on {hardware}, {speed}",
    }
    write_card(options.out / "README.md", facts, list(texts))
    print("\n".join(f"{name}: {fact}" for name, fact in facts.items()), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
