"""What a user without qsvd does with a result; test_loads_without_qsvd runs it in a process of its own.

Usage: plain_transformers.py OUT DENSE AUTO_CLASS [OUT DENSE AUTO_CLASS ...]. DENSE is a float32 checkpoint with Q + B A
in the place of W. Prints one JSON object for each, a line: classes, names, and how far outputs are from DENSE's in
float64, at most over all elements.
"""

import json
import re
import sys
from pathlib import Path

sys.modules["qsvd"] = None  # from here on `import qsvd` is an ImportError

import bitsandbytes  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

IDS = torch.arange(3, 35).reshape(2, 16)


def linears(model):
    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


def outputs(model):
    """Logits, or hidden states of a bare encoder, in float64.

    In eval mode bitsandbytes repacks weights in place on some CPUs, and asserts that out features divide by 32. Its
    modules alone are put into train mode, where nothing else of them changes.
    """
    model.eval()
    for module in linears(model):
        module.train()
    with torch.no_grad():
        return model(input_ids=IDS)[0].double()


def in_float32(model):
    """The model, computing in float32; from_pretrained's dtype misses some tensors of any 4-bit checkpoint."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in linears(model):
        module.compute_dtype = module.weight.quant_state.dtype = torch.float32
    return model


def trained(model):
    """Names of the parameters that one backward pass gives a gradient other than zero."""
    model.train()
    model(input_ids=IDS)[0].float().square().mean().backward()
    return [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]


def readme_models(out):
    """The model that each code block of the README leaves, by the first word of its title."""
    readme = (Path(out) / "README.md").read_text()
    for title, lines in re.findall(r"^## (\w+)[^\n]*\n\n```python\n(.*?)```", readme, flags=re.S | re.M):
        names = {}
        exec(compile(lines, f"README.md, {title}", "exec"), names)
        yield title, names["model"]


def main(out, dense, auto):
    auto = getattr(transformers, auto)
    exact = outputs(auto.from_pretrained(dense, dtype=torch.float64))

    def distance(model):
        return (outputs(model) - exact).abs().max().item()

    whole = in_float32(auto.from_pretrained(out))
    base = in_float32(auto.from_pretrained(out, adapter_kwargs={"subfolder": "none"}))
    found = {
        "whole": distance(whole),
        "dense_in_float32": distance(auto.from_pretrained(dense, dtype=torch.float32)),
        "num_linears": len(linears(base)),
        "base_alone": distance(base),
        "split": distance(in_float32(peft.PeftModel.from_pretrained(base, out))),
    }
    for title, model in readme_models(out):
        found[title] = distance(model)
        if title == "Train":
            found["trained"] = trained(model)
    merged = auto.from_pretrained(f"{out}-merged")
    found["num_merged_linears"] = len(linears(merged))
    found["merged"] = distance(merged)
    found["dense_in_stored_dtype"] = distance(auto.from_pretrained(dense, dtype=merged.dtype))
    found["stored_dtype"] = str(merged.dtype)
    try:
        import qsvd  # noqa: F401
    except ImportError:
        sys.stdout.write(f"\n{json.dumps(found)}\n")


if __name__ == "__main__":
    for first in range(1, len(sys.argv), 3):
        main(*sys.argv[first : first + 3])
