"""What is there after a real training step, by item, counted tensor by tensor; shares no code with the plan."""

import torch
from transformers import AutoConfig

import qsvd
from qsvd.adapters.model import split_linears
from qsvd.adapters.pages.buffers import HostStore
from tests.checkpoints import tiny_config, write_checkpoint, write_tokenizer
from tests.drawn import drawn_base
from tests.mixed import modules_of, write_table
from tests.runs import settings, trainer

VOCABULARY = 4096  # of the embedded model's tokenizer


def llama_base(folder, rank, *, double_quant=True, ranks=(), **shape):
    """A random quantized Llama with the embedded model's tokenizer; made if it is not there.

    ranks, where given, and all codecs take turns over the weights, which are split then; else they are drawn.
    """
    source, out = folder / "source", folder / "out"
    if (out / "qsvd.json").exists():
        return out
    shape = {"vocab_size": VOCABULARY, "dtype": torch.bfloat16} | shape
    if not ranks:
        return drawn_base(out, tiny_config("LlamaForCausalLM", **shape), rank, double_quant=double_quant)
    write_checkpoint(source, **shape)
    write_tokenizer(source)
    write_table(folder / "table.txt", modules_of(source), ranks=ranks)
    options = {"rank": rank, "iterations": 1, "device": "cpu", "double_quant": double_quant}
    qsvd.quantize(qsvd.Quantize(str(source), out=out, allocation=folder / "table.txt", **options))
    return out


def config_of(base):
    return AutoConfig.from_pretrained(base)


def size(tensors):
    """Bytes of all tensors, storages that are shared once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def held_after_a_step(base, run, options, placement, changes, *, tokens):
    """Bytes by item at the end of one step, before its gradients go."""
    found = {}

    class Count:
        @classmethod
        def after_step(cls, model, step):
            assert step == 1
            found.update(count(model, made.optimizer, made.hooks.state()))

    ids = torch.randint(VOCABULARY, (4, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    rows = {"input_ids": ids, "labels": ids}
    made = trainer(base, run, rows, settings(**changes), Count, options=options, placement=placement)
    made.train()
    return found


def count(model, optimizer, hooks):
    """Bytes by item, under the names of the plan."""
    named = [*model.named_parameters(), *model.named_buffers()]
    while not hasattr(optimizer, "state") or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    embeddings = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    groups = {
        "residual codes": [t for name, t in named if name.rsplit(".", 1)[-1] == "codes"],
        "residual scales": [
            t for name, t in named if name.rsplit(".", 1)[-1] in ("absmax", "absmax_codes", "offset", "levels")
        ],
        "frozen components": [t for name, t in model.named_buffers() if ".adapter." in name],
        "trained parameters": [p for p in model.parameters() if p.requires_grad],
        "embeddings": [embeddings],
        "output head": [] if head is embeddings else [head],
    }
    cache = next((linear.paged.cache for _, linear in split_linears(model) if linear.paged), None)
    groups["page slots"] = [] if cache is None else [slot.buffer for slot in cache._slots]
    in_memory = cache is not None and isinstance(cache.store, HostStore)
    groups["pages"] = [cache.store.view(page) for page in range(len(cache.store.sizes))] if in_memory else []
    taken = {id(t) for group in groups.values() for t in group}
    groups["norms and the rest"] = [t for _, t in named if id(t) not in taken]
    groups["gradients"] = [p.grad for p in model.parameters() if p.grad is not None]
    groups["optimizer state"] = [
        t for state in (*optimizer.state.values(), hooks) for t in state.values() if isinstance(t, torch.Tensor)
    ]
    return {name: size(tensors) for name, tensors in groups.items()}
