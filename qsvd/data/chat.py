"""Conversations through a tokenizer's chat template, and which of their characters the assistant speaks.

Three ways to know, the first that can be had:
    marks   the template has {% generation %} around what the assistant says
    TRL     knows the template and has a copy with marks (trl.chat_template_utils.get_training_chat_template)
    prefix  an assistant turn is what the conversation with it has over the conversation before it, up to where the
            template would have the model begin; refused where the template rewrites earlier turns
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from qsvd.errors import BadInput, listing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Conversations as data sets spell them -> messages as chat templates take them, {"role", "content", ...}.


Message = dict[str, Any]

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def check_messages(messages: object, column: str) -> list[Message]:
    """The messages without their null fields (a table has a field for all if one message has it).

    Raises:
        BadInput: not a list of at least one object with a role and a content; only a message with tool_calls may
            do without content.
    """
    if not isinstance(messages, list) or not messages:
        raise BadInput(f"{column} is {described(messages)}, not a list of messages")
    return [_check_message(message, f"{column}[{number}]") for number, message in enumerate(messages)]


def from_conversation(conversation: object) -> list[Message]:
    """Messages of [{"from", "value"}, ...]; a conversation in role and content is taken as it is.

    Raises:
        BadInput: not a list of turns, a turn without from or value, or a speaker who is not in SPEAKERS.
    """
    if not isinstance(conversation, list) or not conversation:
        raise BadInput(f"conversations is {described(conversation)}, not a list of turns")
    if all(isinstance(turn, dict) and turn.get("role") is not None for turn in conversation):
        return check_messages(conversation, "conversations")
    return [_from_turn(turn, f"conversations[{number}]") for number, turn in enumerate(conversation)]


def read_tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tools of a row, also where the column holds them as JSON text; None if there are none.

    Raises:
        BadInput: they are no list of JSON schemas.
    """
    tools = row.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) or None
        except ValueError as error:
            raise BadInput(f"tools is a text that is no JSON ({error})") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadInput(f"tools is {described(tools)}, not a list of JSON schemas")
    return tools


def described(value: object) -> str:
    """What stands there instead, short enough for a sentence."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"


def _check_message(message: object, place: str) -> Message:
    if not isinstance(message, dict):
        raise BadInput(f"{place} is {described(message)}, not an object with role and content")
    kept = {name: value for name, value in message.items() if value is not None}
    if not isinstance(kept.get("role"), str) or not kept["role"]:
        raise BadInput(f"{place} has no role")
    if not isinstance(kept.get("content"), str | list) and not kept.get("tool_calls"):
        raise BadInput(f"{place} has no content")
    return kept


def _from_turn(turn: object, place: str) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or not isinstance(turn.get("from"), str):
        raise BadInput(f"{place} is {described(turn)}, not an object with from and value")
    if turn["from"] not in SPEAKERS:
        raise BadInput(f"{place} is from {turn['from']!r}; known are {listing(list(SPEAKERS), limit=len(SPEAKERS))}")
    return {"role": SPEAKERS[turn["from"]], "content": turn["value"]}


MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]  # characters from, to
Tools = list[dict | Callable] | None  # JSON schemas; transformers would take functions too


@dataclass(frozen=True)
class ChatTemplate:
    """The template to train with, for conversations without and with tools; most tokenizers have one for both."""

    tokenizer: "PreTrainedTokenizerBase"
    plain: str
    with_tools: str

    def of(self, tools: Tools) -> str:
        """The template for a conversation."""
        return self.with_tools if tools else self.plain


class Chat(NamedTuple):
    """A conversation as the model reads it; the spans are the assistant's, each with the end of its turn."""

    text: str
    spans: list[Span]


def chat_template(tokenizer: "PreTrainedTokenizerBase") -> ChatTemplate | None:
    """The tokenizer's template, or TRL's copy of it with marks; None if the tokenizer has none."""
    if tokenizer.chat_template is None:
        return None
    anything: list[dict] = [{"type": "function", "function": {"name": "any", "parameters": {}}}]
    plain, with_tools = tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=anything)
    known = None if MARK.search(plain) else _template_of_trl(tokenizer)
    if known is None:
        return ChatTemplate(tokenizer, plain, with_tools)
    return ChatTemplate(tokenizer, known, known if with_tools == plain else with_tools)


def render(template: ChatTemplate, messages: list[Message], tools: Tools = None, *, begin: bool = False) -> str:
    """The conversation as text, with `begin` up to where the model would begin its answer.

    Raises:
        BadInput: the template refuses the conversation, or does not know what is in it.
    """
    import jinja2

    try:
        text = template.tokenizer.apply_chat_template(
            messages, tools, chat_template=template.of(tools), add_generation_prompt=begin, tokenize=False
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise BadInput(f"the chat template refuses it: {error}") from error
    assert isinstance(text, str), "without tokenize, one conversation is one text"
    return text


def render_marked(template: ChatTemplate, messages: list[Message], tools: Tools, first: int) -> Chat:
    """The conversation with the spans of the assistant's turns, from message number `first` on.

    Raises:
        BadInput: as `render`, or the template writes a conversation differently once it goes on.
    """
    text = render(template, messages, tools)
    if not MARK.search(template.of(tools)):
        return Chat(text, _spans_by_prefix(template, messages, tools, first))
    spans = _spans_by_marks(template, messages, tools)
    if first:
        before = render(template, messages[:first], tools)
        if not text.startswith(before):
            raise BadInput("the chat template writes the prompt differently once a completion follows")
        spans = [span for span in spans if span[0] >= len(before)]
    return Chat(text, spans)


def speaks(messages: Sequence[Message]) -> bool:
    """Whether any message is the assistant's and says or calls something."""
    return any(
        message["role"] == "assistant" and (_is_said(message.get("content")) or bool(message.get("tool_calls")))
        for message in messages
    )


def _is_said(content: object) -> bool:
    return bool(content.strip() if isinstance(content, str) else content)


def _template_of_trl(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    import jinja2
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer)
    except (ValueError, TypeError, KeyError, jinja2.TemplateError):  # it tries calls of tools, which not all render
        return None


def _spans_by_marks(template: ChatTemplate, messages: list[Message], tools: Tools) -> list[Span]:
    """Where {% generation %} blocks lie in the text; blocks that touch are one."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens: dict[str, Any] = dict(template.tokenizer.special_tokens_map)
    rendered: Any = render_jinja_template(
        [messages], tools=tools, chat_template=template.of(tools), return_assistant_tokens_mask=True, **tokens
    )
    _, (indices,) = rendered
    spans: list[Span] = []
    for start, end in indices:
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end)
        elif start < end:
            spans.append((start, end))
    return spans


def _spans_by_prefix(template: ChatTemplate, messages: list[Message], tools: Tools, first: int) -> list[Span]:
    text, spans = render(template, messages, tools), []
    for number in range(first, len(messages)):
        if messages[number]["role"] != "assistant":
            continue
        if number == 0:
            raise BadInput("the assistant speaks first, so that nothing shows where its turn begins")
        before = render(template, messages[:number], tools, begin=True)
        after = render(template, messages[: number + 1], tools)
        if not (after.startswith(before) and text.startswith(after)):
            raise BadInput(
                f"message {number + 1}, the assistant's, cannot be told apart: the chat template writes a conversation "
                "differently once it goes on; mark what the assistant says in the template with {% generation %}"
            )
        spans.append((len(before), len(after)))
    return spans
