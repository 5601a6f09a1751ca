"""Chat templates by name, in templates/NAME.jinja, and from a file. Nothing here imports torch.

Each is the format that the model of its name was published with, and marks the assistant's text for training.
"""

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from qsvd.arguments import meant
from qsvd.errors import BadInput, listing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# by templates and processors, which are programs of others; jinja2.TemplateError beside them
RAISED = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, StopIteration)
MOST_CHARACTERS = 10**7  # of a conversation
TOKENS: dict[str, tuple[str, ...]] = {  # name -> tokens that the template writes and a tokenizer must have
    "alpaca": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (),
    "vicuna": (),
    "zephyr": (),
}


def read_template(name: str) -> str:
    """Return the Jinja text of a template.

    Args:
        name: One of TOKENS, or the path of a file.

    Raises:
        BadInput: there is neither such a name nor such a file, or the file is empty or not a text.
    """
    if name in TOKENS:
        return (files("qsvd.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")
    path = Path(name).expanduser()
    if not path.is_file():
        raise BadInput(f"--chat-template {name} is neither a file nor one of {', '.join(TOKENS)}{meant(name, TOKENS)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--chat-template {name} cannot be read as a text: {error}") from error
    if not text.strip():
        raise BadInput(f"--chat-template {name} is empty")
    return text


def check_length(text: str) -> None:
    """Refuse a rendered conversation that no model reads, and whose tokens would take minutes, by BadInput."""
    if len(text) > MOST_CHARACTERS:
        raise BadInput(f"the chat template makes {len(text):,} characters of it; at most {MOST_CHARACTERS:,} are read")


def check_tokens(name: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a named template whose marks are not tokens of the tokenizer, by BadInput."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in TOKENS.get(name, ()) if token not in vocabulary]
    if missing:
        others = [other for other, tokens in TOKENS.items() if all(token in vocabulary for token in tokens)]
        raise BadInput(
            f"--chat-template {name} needs the tokens {listing(missing)}, which the tokenizer of this model does not "
            f"have; it can use {', '.join(others)}"
        )
