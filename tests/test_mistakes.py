"""Typical mistakes, of people who come from other tools too: one sentence with the remedy, and nothing is written."""

import json
import os
import shlex
import shutil

import pytest

from qsvd.cli import run
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.runs import BERT, labelled_rows, language_base, text_rows, training, words, write_rows

pytestmark = pytest.mark.slow

CONVERSATION = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
FILES = {
    "columns.jsonl": [{"query": "Why?", "reply": "So."}],
    "preferences.jsonl": [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}],
    "chats.jsonl": [{"messages": CONVERSATION}],
    "labels.jsonl": labelled_rows(),
    "texts.jsonl": text_rows(),
    "empty.jsonl": [],
}
MISTAKES = r"""
# Names and commands of other tools, and misspelt ones
$ finetune model texts.jsonl
  no command 'finetune': use qsvd train MODEL DATA --out RUN
$ merge RUN
  use qsvd export RUN --to merged --out DIR
$ chat RUN
  use qsvd generate MODEL --chat
$ trian OUT
  there is no command 'trian' (did you mean train?)
$ train --model model --dataset texts.jsonl -o R
  takes MODEL and DATA without --model and --dataset: qsvd train M
$ train -m model texts.jsonl -o R
  qsvd train takes MODEL without -m: qsvd train MODEL DATA --out RUN
$ generate --model model -p x
  qsvd generate takes MODEL without --model: qsvd generate MODEL
$ train model texts.jsonl R
  takes MODEL DATA, and 'R' is one argument too many (did you mean --out R?)
$ TRAIN --gradient-checkpointing maybe
  qsvd: --gradient-checkpointing 'maybe' is not one of auto, yes, no; see
$ train --gradient-checkpointing=maybe model texts.jsonl --out R
  qsvd: --gradient-checkpointing 'maybe' is not one of auto, yes, no; see
$ train --gradient-checkpointing maybe model texts.jsonl --out R
  qsvd: --gradient-checkpointing 'maybe' is not one of auto, yes, no; see
$ TRAIN --packing nope
  qsvd: --packing 'nope' is not one of yes, no (did you mean no?); see
$ train --packing model texts.jsonl R
  takes MODEL DATA, and 'R' is one argument too many (did you mean --out R?)
$ generate model 'Once upon'
  takes MODEL, and 'Once upon' is one argument too many (did you mean --prompt 'Once
$ TRAIN --load-in-4bit
  has no option --load-in-4bit (4 bits are the default: leave it out)
$ TRAIN --load_in_8bit
  has no option --load-in-8bit (give --budget 8bits for 8 bits per weight
$ quantize model --out Q --bits 3
  has no option --bits (give --budget 3bits for an average of 3 bits
$ TRAIN --fp16
  has no option --fp16 (give --dtype bfloat16 or float32)
$ TRAIN --use-dora
  has no option --use-dora (give --method dora)
$ TRAIN --deepspeed zero3.json
  has no option --deepspeed (leave it out; start the command with torchrun
$ TRAIN --overwrite-output-dir
  qsvd overwrites nothing: give --out another folder, or delete this one
$ TRAIN --logging-steps 1
  every step is logged in RUN/steps.jsonl: leave it out
$ TRAIN --lerning-rate 1 --stesp 2
  has no option --lerning-rate (did you mean --learning-rate?); qsvd train has
$ eval OUT --data texts.jsonl --epochs 3
  qsvd eval has no option --epochs; see qsvd eval --help
$ quantize model --out Q --ranks 8
  has no option --ranks (did you mean --rank?)
$ TRAIN --config other.yaml
  other.yaml: unknown option 'model_name_or_path' (did you mean model?)
# Values
$ TRAIN --lr 2e-4,
  --learning-rate '2e-4,' is not a number
$ TRAIN --steps many --alpha x
  --steps 'many' is not a whole number; --alpha 'x' is not a number
$ TRAIN --gpu 24 GB
  write a size as one word, such as 24GB
$ plan model --gpu rtx4090
  --gpu 'rtx4090' is not a size: give a number of GB, or one and KB, MB, GB or TB
$ TRAIN --method pisa
  (did you mean pissa?)
$ TRAIN --method full
  : qsvd trains adapters only
$ TRAIN --resident most
  --resident 'most' is not one of auto and is not a number
$ plan model --for trian
  is not one of auto, all, quantize, train, serve (did you mean train?)
$ export RUN --to gguf --out X
  for GGUF give --to merged, then run llama.cpp's convert_hf_to_gguf.py
$ eval OUT --data texts.jsonl --task mmlu
  for such benchmarks run lm_eval on OUT, as docs/guide.md shows
$ train model texts.jsonl --out R --rank 0 --method pissa
  --rank 0 is below 1; a rank of 0 trains nothing: for QLoRA
$ TRAIN --rank 8
  rank 8 is not the stored rank 16, the only one that pissa can train; leave out --rank, quan
$ TRAIN --max-length 4096
  --max-length 4096 is above 512, the context length of OUT
$ TRAIN --dropout 0.1
  dropout is an option of the method lora or r-lora or weightlora, and the method is pissa: choose lora
$ TRAIN --eval-every 2 --held-out 0
  --eval-every needs held-out examples: give --valid DATA, or a larger --held
$ TRAIN --keep-best
  --keep-best cannot be used without held-out losses to compare: give --eval-every N too
$ TRAIN --target-modules query_key_value
  no quantized layer is called query_key_value; give names such as q_proj
$ TRAIN --report-to none
  --report-to none is the default: leave it out
$ TRAIN --chat-template llama-3
  neither a file nor one of alpaca, chatml, gemma, llama3, mistral, vicuna, zephyr
$ train model texts.jsonl
  qsvd train needs --out RUN (folder for checkpoints, adapter and summary)
$ TRAIN --out
  --out needs a value: --out RUN
$ train model --out R
  qsvd train needs DATA (JSON, JSONL, CSV, Parquet or text file
$ eval OUT
  qsvd eval needs --data DATA (a text, or examples in any form that qsvd train takes)
$ export RUN --out X
  qsvd export needs --to peft|lora|merged|compressed-tensors (peft: adapter for the residual
$ quantize model --out Q --rank -1
  --rank -1 is below 0
$ quantize model --out Q --budget 3
  --budget '3' is not a budget: give bits per number of the weights, such as
# Models
$ train owner/typo texts.jsonl --out R
  no folder 'owner/typo' here, and the hub cannot be reached
$ train ./typo texts.jsonl --out R
  no folder './typo' here, and a Hub id looks like 'owner/name'
$ train texts.jsonl model --out R
  texts.jsonl is a file, and a model is a folder with config.json: give MODEL first
$ train gguf texts.jsonl --out R
  gguf holds GGUF files (m.gguf), which are quantized or for llama.cpp only; give the
$ quantize gguf/m.gguf --out Q
  'gguf/m.gguf' is a file; give the folder that holds it and config.json
$ quantize bnb --out Q
  this checkpoint is already quantized: config.json has a quantization_config
$ train bnb texts.jsonl --out R
  bnb is quantized already; give the 16-bit model
$ quantize OUT --out Q
  give the model that this one was made from
$ train adapter texts.jsonl --out R
  this is an adapter of PEFT: give its base model, owner/name
$ generate empty --prompt x
  empty is not a 16-bit model (config.json), a quantized model (qsvd.json) or a run of
$ plan empty
  empty is not a 16-bit model (config.json), a quantized model (qsvd.json) or a run of qsvd train; give
$ train interrupted texts.jsonl --out R
  interrupted is not finished; run the command that writes it again
$ report interrupted
  interrupted is not finished; run the same qsvd quantize command again
$ train RUN texts.jsonl --out R
  RUN is a run of qsvd train: give its quantized model, and --init-from RUN to start
$ report RUN
  for the quantization error give its quantized model: qsvd report
$ report model
  model is not a quantized model: it has no qsvd.json; qsvd quantize MODEL --out OUT makes one
$ export model --to merged --out X
  model is a 16-bit model, and needs no export; give a run of qsvd train
$ generate bert --prompt x
  bert is a BertModel, which generates no text; give a language model
$ train bert texts.jsonl --out R
  it can only be trained to classify, from the columns text and label
$ generate model --chat
  --chat needs a chat template, and the tokenizer of model has none: use a chat model
$ generate model --prompt x --max-new-tokens 999
  more than the 512 that model reads: give at most 510
$ eval OUT --data labels.jsonl
  OUT has no classification head, which labelled examples need; give a run trained on
# Data
$ train model typo.jsonl --out R
  no such file or folder: typo.jsonl
$ train model table.tsv --out R
  no such file or folder: table.tsv
$ train model owner/typo --out R
  no file or folder 'owner/typo' here, and no data set of that name on the hub
$ train OUT model --out R
  model is a model, and DATA is a file, a folder or a data set of the Hub
$ train model columns.jsonl --out R
  for example --map query=prompt reply=completion
$ train model preferences.jsonl --out R
  use TRL's DPOTrainer on qsvd.load(OUT), as docs/guide.md shows
$ train model empty.jsonl --out R
  empty.jsonl is empty: it has no rows
$ train model broken.jsonl --out R
  broken.jsonl: 1 broken line: line 2 (not JSON
$ train model chats.jsonl --out R
  has no chat template: give qsvd train --chat-template NAME (zephyr goes with any
$ train model labels.jsonl --out R
  give --task classification to train a classifier of the labels, or --task causal
$ TRAIN --map text
  --map text is not COLUMN=NAME, such as --map query=question reply=answer
$ TRAIN --split validation
  texts.jsonl is one file and has no split 'validation'; leave the split out
# Output folders
$ train OUT texts.jsonl --out OUT
  --out OUT is a quantized model, and a run needs its own folder; give --out another
$ train model texts.jsonl --out model
  model is not empty and was not written by qsvd train; give --out another folder
$ quantize model --out adapter
  adapter is not empty and was not written by qsvd quantize; give --out another folder
$ TRAIN --resume
  --resume: there is no run in R to continue; leave out --resume to start one
$ TRAINUN --resume --epochs 2
  RUN was written with other options: accumulate 2 there, 4 now
$ calibrate model texts.jsonl --out empty
  --out empty is a folder; give a file, such as empty/statistics.safetensor
"""
TRAIN = "train OUT texts.jsonl --out R"
LINES = [line for line in MISTAKES.splitlines() if line[:1] in ("$", " ")]
TABLE = list(zip([line[2:].replace("TRAIN", TRAIN) for line in LINES[::2]], map(str.strip, LINES[1::2]), strict=True))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with models, quantized ones and runs, whole and wrong, and with data."""
    folder = tmp_path_factory.mktemp("home")
    base = language_base(folder)
    base.rename(folder / "OUT")
    (folder / "source").rename(folder / "model")
    for name, rows in FILES.items():
        write_rows(folder / name, rows)
    assert run(words(training(folder / "OUT", str(folder / "texts.jsonl"), folder / "RUN", steps=1))) == 0
    for name in ("empty", "gguf", "adapter"):
        (folder / name).mkdir()
    (folder / "gguf" / "m.gguf").write_bytes(b"GGUF")
    (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name"}')
    (folder / "interrupted" / "unfinished").mkdir(parents=True)
    shutil.copytree(folder / "model", folder / "bnb")
    config = json.loads((folder / "bnb" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "bnb" / "config.json").write_text(json.dumps(config))
    write_checkpoint(folder / "bert", "BertModel", **BERT)
    write_tokenizer(folder / "bert")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    (folder / "other.yaml").write_text("model_name_or_path: model\n")
    return folder


def everything(folder):
    """Relative path and time of change of every file."""
    return {(name, os.stat(f"{place}/{name}").st_mtime_ns) for place, _, files in os.walk(folder) for name in files}


@pytest.mark.parametrize(("line", "sentence"), TABLE, ids=[line for line, _ in TABLE])
def test_a_mistake_gets_one_sentence_with_its_remedy_and_nothing_is_written(home, monkeypatch, capsys, line, sentence):
    monkeypatch.chdir(home)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "cache"))
    before = everything(home)
    capsys.readouterr()
    try:
        code = run(shlex.split(line))
    except SystemExit as ended:  # of an unknown command, as argparse ends
        code = ended.code
    shown = capsys.readouterr()
    assert (code, shown.out, shown.err.count("\n")) == (2, "", 1), shown.err
    assert shown.err.startswith("qsvd: ")
    assert sentence in shown.err
    assert everything(home) == before
