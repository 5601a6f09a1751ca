"""Two steps of TRL's SFTTrainer on a quantized model, without qsvd: python run_trl.py JOB.json; writes the losses.

The stored components are trained, as docs/guide.md says: PeftModel with is_trainable, and no peft_config.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main(job: dict) -> None:
    """Write float32 [steps]: the loss before each step, of one batch with all texts."""
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    data = Dataset.from_dict({"input_ids": job["tokens"]})
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, max_steps=2, per_device_train_batch_size=len(job["tokens"]), learning_rate=1e-3,
            logging_steps=1, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
            shuffle_dataset=False,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(job["model"])
        trainer = SFTTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    np.save(job["out"], np.array(losses, dtype=np.float32))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
