"""Train an adapter in a plain PyTorch loop: load, AdamW, loop, save.

python examples/train_loop.py OUT TEXT RUN [STEPS]    (OUT is what qsvd quantize wrote, TEXT a text file)
`qsvd train` adds checkpoints, resuming, data formats and a plan of the memory (qsvd/commands/train.py).
"""

import sys

import torch
from transformers import AutoTokenizer

import qsvd

LENGTH, BATCH, RATE = 128, 4, 3e-3  # tokens, sequences a step, a rate for a very small model


def main(out: str, text: str, run: str, steps: int = 20) -> None:
    """Train the stored components (QPiSSA) on windows of the text; save the adapter in `run`."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    with open(text, encoding="utf-8") as file:
        tokens = torch.tensor(tokenizer(file.read()).input_ids)
    windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)  # [windows, LENGTH]
    model = qsvd.load(out, options=qsvd.AdapterOptions(method="pissa"))
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        rows = torch.randint(len(windows), (BATCH,), generator=generator)
        batch = windows[rows].to(model.device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")
    model.save_pretrained(run)  # the adapter alone; qsvd.load(out, adapter=run) and qsvd export take it


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:5]))
