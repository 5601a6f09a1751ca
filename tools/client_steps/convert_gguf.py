"""Run llama.cpp's convert_hf_to_gguf.py: python convert_gguf.py SOURCE MODEL --outtype f16 --outfile FILE

The script refuses tokenizers that it does not know, such as that of the embedded model. This step then gives it the
rules of gpt-2: the cases compare token ids, which no tokenizer changes.
"""

import runpy
import sys
from pathlib import Path

source = Path(sys.argv.pop(1))
sys.path[:0] = [str(source), str(source / "gguf-py")]

from conversion.base import TextModel  # noqa: E402

known = TextModel.get_vocab_base_pre


def rules(self, tokenizer):
    """Return the name of the tokenizer's rules."""
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        print("the tokenizer is not one that llama.cpp knows: gpt-2's rules instead")
        return "gpt-2"


TextModel.get_vocab_base_pre = rules
runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")
