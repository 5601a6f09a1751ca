"""What can be split loads again, 4-bit exactly where it was split, with the adapter in its place."""

import json

import bitsandbytes
import pytest
import torch
import transformers

import qsvd
from tests.checkpoints import FAMILIES, REFUSED, WITH_EXPERTS, write_checkpoint
from tests.commands.folders import tensors_of

PEFT_READS_AN_OLD_NAME = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT 0.21, transformers 5


# their layers are those of LlamaForCausalLM, with biases and norms that are not quantized, or of BertForMaskedLM
SAME = {"BertModel", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "RobertaForMaskedLM"}


@pytest.mark.filterwarnings(PEFT_READS_AN_OLD_NAME)
@pytest.mark.parametrize("architecture", sorted(FAMILIES.keys() - REFUSED - WITH_EXPERTS - SAME))
def test_a_family_loads_with_4_bits_where_it_was_split_and_its_adapter(tmp_path, architecture):
    write_checkpoint(tmp_path / "source", architecture)
    out = qsvd.quantize(qsvd.Quantize(str(tmp_path / "source"), out=tmp_path / "out", rank=4, iterations=1))
    weights = json.loads((out / "qsvd.json").read_text())["weights"]
    kind = getattr(transformers, architecture)
    model, loaded = kind.from_pretrained(out, output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    assert not loaded["mismatched_keys"]
    linears = [path for path, module in model.named_modules() if type(module) is bitsandbytes.nn.Linear4bit]
    found = {path.removesuffix(".base_layer") for path in linears}
    assert found == {weight["module"] for weight in weights.values()}
    stored = tensors_of(out)
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(weight["module"]).weight.data, stored[name])
    lora = {name.removesuffix(".lora_A.default.weight") for name, _ in model.named_parameters() if ".lora_A." in name}
    assert lora == found
    up = torch.cat([p.flatten() for name, p in model.named_parameters() if ".lora_B." in name])
    assert (up != 0).all(), "loaded, not a LoRA's zero start"
