"""What people type who come from PEFT, TRL, Unsloth, axolotl, mlx-lm or llama.cpp, and what qsvd calls it.

NAMES, SHORT and VALUES are taken as ours. All else here has no equal in qsvd, and gets a sentence on what to do.
"""

NAMES = {  # other tools' options -> ours; used where a command has the option
    "lr": "learning-rate",
    "r": "rank",
    "lora-r": "rank",
    "lora-rank": "rank",
    "lora-alpha": "alpha",
    "lora-dropout": "dropout",
    "use-rslora": "rslora",
    "lora-target-modules": "target-modules",
    "num-train-epochs": "epochs",
    "num-epochs": "epochs",
    "max-steps": "steps",
    "iters": "steps",
    "per-device-train-batch-size": "batch-size",
    "per-device-eval-batch-size": "batch-size",
    "micro-batch-size": "batch-size",
    "gradient-accumulation-steps": "accumulate",
    "grad-accumulation-steps": "accumulate",
    "max-seq-length": "max-length",
    "max-seq-len": "max-length",
    "sequence-len": "max-length",
    "lr-scheduler-type": "schedule",
    "lr-scheduler": "schedule",
    "warmup-ratio": "warmup",
    "optim": "optimizer",
    "use-gradient-checkpointing": "gradient-checkpointing",
    "grad-checkpoint": "gradient-checkpointing",
    "bnb-4bit-use-double-quant": "double-quant",
    "use-double-quant": "double-quant",
    "val-set-size": "held-out",
    "save-steps": "save-every",
    "save-total-limit": "keep",
    "eval-steps": "eval-every",
    "steps-per-eval": "eval-every",
    "output-dir": "out",
    "output": "out",
    "samples": "examples",
    "num-samples": "examples",
    "resume-from-checkpoint": "resume",
    "hub-model-id": "push-to-hub",
    "max-tokens": "max-new-tokens",
    "temp": "temperature",
    "system-prompt": "system",
}
SHORT = {"-o": "--out", "-p": "--prompt"}
VALUES = {
    "method": {"qlora": "lora", "qpissa": "pissa"},
    "gradient_checkpointing": {"unsloth": "yes"},
}

PLACES = {  # names of what qsvd takes without a flag -> its options
    **dict.fromkeys(
        ("m", "model", "model-name", "model-name-or-path", "model-path", "base-model", "pretrained"),
        ("model", "base", "models", "run", "folder"),
    ),
    **dict.fromkeys(
        ("d", "data", "dataset", "datasets", "dataset-name", "data-path", "dataset-path", "train-file"), ("data",)
    ),
}

COMMANDS = {  # other tools' commands -> the command line that does it
    **dict.fromkeys(("finetune", "fine-tune", "sft", "lora", "qlora"), "qsvd train MODEL DATA --out RUN"),
    **dict.fromkeys(("merge", "fuse", "merge-lora"), "qsvd export RUN --to merged --out DIR"),
    **dict.fromkeys(("chat", "cli-chat"), "qsvd generate MODEL --chat"),
    **dict.fromkeys(("inference", "infer", "run", "complete", "predict"), "qsvd generate MODEL --prompt TEXT"),
    **dict.fromkeys(("inspect", "show", "info"), "qsvd report OUT"),
    **dict.fromkeys(("estimate", "estimate-memory", "memory"), "qsvd plan MODEL"),
    **dict.fromkeys(("convert", "compress"), "qsvd quantize MODEL --out OUT"),
    "perplexity": "qsvd eval MODEL --data DATA",
    "serve": "qsvd export RUN --to merged --out DIR, then vllm serve DIR",
}

_FOUR = "4 bits are the default: leave it out"
_GPUS = "leave it out; start the command with torchrun for several GPUs; --resident offloads weights"
_STRATEGY = "give --eval-every N for a held-out loss every N steps"
_ANSWERS = "it is the default: leave it out, or give --loss-on all to train on prompts too"
_OUTPUT = "qsvd overwrites nothing: give --out another folder, or delete this one"
REMEDIES = {  # options that no command has -> what to do
    **dict.fromkeys(("load-in-4bit", "use-4bit", "bnb-4bit-quant-type", "quantization-bit"), _FOUR),
    "load-in-8bit": "give --budget 8bits for 8 bits per weight, or leave it out for 4",
    **dict.fromkeys(
        ("bits", "q-bits", "wbits", "w-bit", "qlora-bits"),
        "give --budget 3bits for an average of 3 bits, or leave it out for 4",
    ),
    **dict.fromkeys(("fp16", "bnb-4bit-compute-dtype", "torch-dtype", "precision"), "give --dtype bfloat16 or float32"),
    **dict.fromkeys(("use-peft", "use-lora", "adapter", "train-type"), "give --method lora for LoRA"),
    **dict.fromkeys(("use-dora", "dora"), "give --method dora"),
    **dict.fromkeys(("deepspeed", "fsdp", "num-gpus", "num-processes", "ddp"), _GPUS),
    **dict.fromkeys(("eval-strategy", "evaluation-strategy"), _STRATEGY),
    "save-strategy": "give --save-every N for a checkpoint every N steps",
    "logging-steps": "every step is logged in RUN/steps.jsonl: leave it out",
    **dict.fromkeys(("do-train", "do-eval", "trust-remote-code"), "qsvd does not need it: leave it out"),
    **dict.fromkeys(("overwrite", "overwrite-output-dir", "force"), _OUTPUT),
    "dataset-text-field": "give --map COLUMN=text",
    "train-on-inputs": "give --loss-on all to train on prompts too",
    **dict.fromkeys(
        ("completion-only-loss", "assistant-only-loss", "train-on-responses-only", "mask-prompt"), _ANSWERS
    ),
    **dict.fromkeys(
        ("adapter-path", "lora-path", "peft-model"), "give the run instead of the model: it holds the adapter"
    ),
}

WRONG_VALUES = {  # option -> value -> what to do
    "to": dict.fromkeys(
        ("gguf", "ollama", "llama.cpp"), "for GGUF give --to merged, then run llama.cpp's convert_hf_to_gguf.py"
    ),
    "method": {
        "full": "qsvd trains adapters only, and the residual stays frozen",
        "loftq": "LoftQ is how a model is quantized: qsvd quantize --order quantize, then --method pissa",
    },
    "task": dict.fromkeys(
        ("mmlu", "gsm8k", "hellaswag", "arc_easy", "arc_challenge", "winogrande"),
        "for such benchmarks run lm_eval on OUT, as docs/guide.md shows",
    ),
}
