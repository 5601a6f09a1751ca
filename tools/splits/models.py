"""The models of the comparison: their texts, the statistics of every linear layer, and the quality of the whole model.

Statistics come from forward and backward hooks over the whole model in float32, summed in float64. For a token with
the input x of a layer and the gradient g of the loss at its output:
    H = mean of x x^T,  G = mean of g g^T,
    and the row and column means of the Fisher information: mean of g_i^2 ||x||^2 and of ||g||^2 x_j^2.
The loss of a language model is the sum over the positions of a sequence, with labels drawn from the model's own
predictions (the true Fisher information). An encoder has no loss: its gradient begins with Gaussian noise at the final
hidden states, which gives the Gauss-Newton matrix of their squared error.

Shape suffixes: O = out features, I = in features, T = tokens of a batch, V = vocabulary, N = sequences, P = positions.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from qsvd.commands.demo import FINE_TUNING, HELD_OUT, MODEL

WINDOW, STORY = 256, 512  # tokens of a sequence, at most
BATCH = 8  # sequences of equal length that run together
CALIBRATION, HELD_OUT_TOKENS = 32768, 16384  # tokens, about
STORIES = 70  # of the 100: for calibration; the others are held out
Sequences = list[list[int]]


@dataclass
class Statistics:
    """Of one linear layer, float64; see the head of this file. G is relative: its scale changes no split."""

    inputs_II: Tensor
    outputs_OO: Tensor
    rows_O: Tensor
    columns_I: Tensor

    @classmethod
    def zeros(cls, rows: int, columns: int) -> "Statistics":
        """Return sums over no tokens."""
        sizes = ((columns, columns), (rows, rows), (rows,), (columns,))
        return cls(*(torch.zeros(size, dtype=torch.float64) for size in sizes))

    def add(self, inputs_TI: Tensor, gradients_TO: Tensor) -> None:
        """Add the tokens of a batch."""
        self.inputs_II += inputs_TI.T @ inputs_TI
        self.outputs_OO += gradients_TO.T @ gradients_TO
        input_T1 = inputs_TI.square().sum(dim=1, keepdim=True)
        gradient_T1 = gradients_TO.square().sum(dim=1, keepdim=True)
        self.rows_O += (gradients_TO.square() * input_T1).sum(dim=0)
        self.columns_I += (inputs_TI.square() * gradient_T1).sum(dim=0)


@dataclass(frozen=True)
class Quality:
    """Of a model with quantized layers, on held-out text; of an encoder only `hidden`.

    Args:
        divergence: Mean KL divergence from the 16-bit model, nats a token.
        agreement: Share of the tokens for which both find the same token most probable.
        perplexity: On the text.
        hidden: Relative error of the final hidden states.
    """

    divergence: float | None = None
    agreement: float | None = None
    perplexity: float | None = None
    hidden: float | None = None


class Subject:
    """A 16-bit model in float32, its linear layers, and its texts as token ids."""

    def __init__(self, name: str, shared: Path):
        path = MODEL if name == "demo" else str(shared / "models" / name)
        self.is_encoder = name == "minilm-l6"
        kind = AutoModel if self.is_encoder else AutoModelForCausalLM
        self.model: Any = kind.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        self.model.requires_grad_(False)
        self.layers = linear_layers(self.model)
        self.weights = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        tokenizer = AutoTokenizer.from_pretrained(path)
        self.calibration, self.held_out = TEXTS[name](tokenizer, shared)
        self.reference: list[Tensor] = []

    @property
    def width(self) -> int:
        """Features of a hidden state."""
        return self.model.config.hidden_size

    def statistics(self, sequences: Sequences, seed: int) -> dict[str, Statistics]:
        """Return the statistics of every linear layer on some text."""
        found = {name: Statistics.zeros(*weight.shape) for name, weight in self.weights.items()}
        inputs: dict[str, Tensor] = {}

        def keep(name: str, given: Tensor, output: Tensor) -> None:
            inputs[name] = given.detach()
            output.register_hook(lambda gradient: found[name].add(inputs[name].flatten(0, 1), gradient.flatten(0, 1)))

        hooks = [
            layer.register_forward_hook(lambda _, given, output, name=name: keep(name, given[0], output))
            for name, layer in self.layers.items()
        ]
        generator = torch.Generator().manual_seed(seed)
        embeddings = self.model.get_input_embeddings()
        for tokens_NP in batches(sequences):
            vectors_NPI = embeddings(tokens_NP).requires_grad_()
            self._loss(self.model(inputs_embeds=vectors_NPI), generator).backward()
        for hook in hooks:
            hook.remove()
        tokens = sum(map(len, sequences))
        for one in found.values():
            for sums in vars(one).values():
                sums /= tokens
        return found

    def _loss(self, output: Any, generator: torch.Generator) -> Tensor:
        """Return what is differentiated: a sum over all positions."""
        if self.is_encoder:
            hidden_NPI = output.last_hidden_state
            return (hidden_NPI * torch.randn(hidden_NPI.shape, generator=generator)).sum()
        logits_TV = output.logits.flatten(0, 1)
        labels_T = torch.multinomial(logits_TV.detach().softmax(-1), 1, generator=generator)[:, 0]
        return nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")

    @torch.inference_mode()
    def quality(self, replaced: dict[str, Tensor]) -> Quality:
        """Return the quality of the model with other weights on the held-out text; its own weights are put back."""
        if not self.reference:
            self.reference = list(self._outputs())
        self._put(replaced)
        measure = self._hidden if self.is_encoder else self._predictions
        result = measure()
        self._put(self.weights)
        return result

    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.layers[name].weight.copy_(weight)

    def _outputs(self) -> Iterator[Tensor]:
        """Yield logits or final hidden states of every batch of held-out text."""
        for tokens_NP in batches(self.held_out):
            output = self.model(input_ids=tokens_NP)
            yield output.last_hidden_state if self.is_encoder else output.logits

    def _hidden(self) -> Quality:
        error = whole = 0.0
        for found, wanted in zip(self._outputs(), self.reference, strict=True):
            error += float((found - wanted).double().square().sum())
            whole += float(wanted.double().square().sum())
        return Quality(hidden=math.sqrt(error / whole))

    def _predictions(self) -> Quality:
        divergence = agreement = nats = 0.0
        tokens = labels = 0
        for tokens_NP, found, wanted in zip(batches(self.held_out), self._outputs(), self.reference, strict=True):
            for ours_PV, theirs_PV, ids_P in zip(found, wanted, tokens_NP, strict=True):
                log_q_PV, log_p_PV = ours_PV.double().log_softmax(-1), theirs_PV.double().log_softmax(-1)
                divergence += float((log_p_PV.exp() * (log_p_PV - log_q_PV)).sum())
                agreement += int((ours_PV.argmax(-1) == theirs_PV.argmax(-1)).sum())
                nats -= float(log_q_PV[:-1].gather(1, ids_P[1:, None]).sum())
                tokens, labels = tokens + len(ids_P), labels + len(ids_P) - 1
        return Quality(divergence / tokens, agreement / tokens, math.exp(nats / labels))


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of the blocks, by name."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, nn.Linear) and "layer" in name}


def batches(sequences: Sequences) -> Iterator[Tensor]:
    """Yield sequences of equal length together [N, P], so that nothing is padded."""
    for _, group in groupby(sorted(sequences, key=len), key=len):
        alike = torch.tensor(list(group))
        yield from alike.split(max(BATCH, BATCH * WINDOW // 4 // alike.shape[1]))


def demo_texts(tokenizer: Any, _shared: Path) -> tuple[Sequences, Sequences]:
    """Return windows of the novel for fine-tuning, and of three other novels, spread evenly."""
    both = []
    for path, most in ((FINE_TUNING, CALIBRATION), (HELD_OUT, HELD_OUT_TOKENS)):
        ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False).input_ids
        windows = [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]
        both.append(windows[:: max(1, round(len(windows) * WINDOW / most))])
    return both[0], both[1]


def stories_texts(tokenizer: Any, shared: Path) -> tuple[Sequences, Sequences]:
    """Return two parts of the stories, each alone."""
    stories = [tokenizer(text).input_ids[:STORY] for text in texts_of(shared / "data/tinystories-100.jsonl")]
    return stories[:STORIES], stories[STORIES:]


def minilm_texts(tokenizer: Any, shared: Path) -> tuple[Sequences, Sequences]:
    """Return sentences of the training part and of the development part of SST-2."""
    both = []
    for part, most in (("train", CALIBRATION), ("dev", HELD_OUT_TOKENS)):
        sentences, tokens = [], 0
        for text in texts_of(shared / f"data/sst2-{part}.jsonl"):
            if tokens >= most:
                break
            sentences.append(tokenizer(text).input_ids[:WINDOW])
            tokens += len(sentences[-1])
        both.append(sentences)
    return both[0], both[1]


def texts_of(path: Path) -> Iterator[str]:
    """Yield the texts of a JSONL file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["text"]


TEXTS = {"demo": demo_texts, "stories260K": stories_texts, "minilm-l6": minilm_texts}
