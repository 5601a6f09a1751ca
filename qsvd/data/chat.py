"""Conversations: their messages, their text by a tokenizer's chat template, and the assistant's part of that text.

The assistant's part is found in the first of three ways that is possible:
    marks   the template has {% generation %} around the assistant's text
    TRL     has a copy of the template with marks (trl.chat_template_utils.get_training_chat_template)
    prefix  an assistant turn is the text that the conversation gains with it, after the generation prompt; refused if
            the template changes earlier turns
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from qsvd.data.template_names import RAISED, check_length
from qsvd.errors import BadInput, first_line, listing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]  # {"role", "content", ...}, as chat templates take it
Span = tuple[int, int]  # characters from, to
Tools = list[dict | Callable] | None  # JSON schemas; transformers would take functions too

PROBE = "What is 7 x 8?"
PROBE_PART = {"type": "text", "text": PROBE}
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

SPEAKERS = {  # "from" of a turn -> role of a message
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
ROLES = {name: SPEAKERS[name] for name in ("human", "gpt")}  # which no chat template knows


def check_messages(messages: object, column: str) -> list[Message]:
    """Return the messages without their null fields: a table has a field in all messages if it is in one.

    Raises:
        BadInput: messages is not a list of at least one object with role and content. A message with tool_calls needs
            no content.
    """
    if not isinstance(messages, list) or not messages:
        raise BadInput(f"{column} is {described(messages)}, not a list of messages")
    return [_check_message(message, f"{column}[{number}]") for number, message in enumerate(messages)]


def from_conversation(conversation: object) -> list[Message]:
    """Return the messages of [{"from", "value"}, ...]; a conversation with role and content is returned as it is.

    Raises:
        BadInput: conversation is not a list of turns, or a turn lacks from or value, or its from is not in SPEAKERS.
    """
    if not isinstance(conversation, list) or not conversation:
        raise BadInput(f"conversations is {described(conversation)}, not a list of turns")
    if all(isinstance(turn, dict) and turn.get("role") is not None for turn in conversation):
        return check_messages(conversation, "conversations")
    return [_from_turn(turn, f"conversations[{number}]") for number, turn in enumerate(conversation)]


def read_tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tools of a row, a list or its JSON text; None if there are none.

    Raises:
        BadInput: they are not a list of JSON schemas.
    """
    tools = row.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) or None
        except ValueError as error:
            raise BadInput(f"tools is a text, but not JSON ({error})") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadInput(f"tools is {described(tools)}, not a list of JSON schemas")
    return tools


def described(value: object) -> str:
    """Return the type of a value and its repr, shortened for a message."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"


def _check_message(message: object, place: str) -> Message:
    if not isinstance(message, dict):
        raise BadInput(f"{place} is {described(message)}, not an object with role and content")
    kept = {name: value for name, value in message.items() if value is not None}
    if not isinstance(kept.get("role"), str) or not kept["role"]:
        raise BadInput(f"{place} has no role")
    kept["role"] = ROLES.get(kept["role"], kept["role"])
    if not isinstance(kept.get("content"), str | list) and not kept.get("tool_calls"):
        raise BadInput(f"{place} has no content")
    return kept


def _from_turn(turn: object, place: str) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or not isinstance(turn.get("from"), str):
        raise BadInput(f"{place} is {described(turn)}, not an object with from and value")
    if turn["from"] not in SPEAKERS:
        raise BadInput(f"{place} is from {turn['from']!r}; known are {listing(list(SPEAKERS), limit=len(SPEAKERS))}")
    return {"role": SPEAKERS[turn["from"]], "content": turn["value"]}


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer and its templates to train with, for conversations without and with tools."""

    tokenizer: "PreTrainedTokenizerBase"
    plain: str
    with_tools: str

    def of(self, tools: Tools) -> str:
        """Return the template for a conversation with these tools."""
        return self.with_tools if tools else self.plain

    def read(self, messages: list[Message]) -> list[Message]:
        """Return messages as the template reads them.

        Some templates, of models of images, read lists of parts and no texts. Others read texts only, and would show
        a list as Python writes it; its texts are joined.
        """
        return [
            message | {"content": self._content(message["content"])} if message.get("content") else message
            for message in messages
        ]

    def _content(self, content: str | list[dict]) -> str | list[dict]:
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if self.takes_parts else content
        if self.reads_parts:
            return content
        return "".join(part["text"] for part in content)

    def _shown(self, content: str | list[dict]) -> str:
        """Return the template's text for one message with this content; "" if it cannot render it."""
        import jinja2

        try:
            message = {"role": "user", "content": content}
            return str(self.tokenizer.apply_chat_template([message], chat_template=self.plain, tokenize=False))
        except (*RAISED, jinja2.TemplateError):
            return ""

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template leaves out a text, and shows the same text as a part."""
        return PROBE not in self._shown(PROBE) and PROBE in self._shown([PROBE_PART])

    @cached_property
    def reads_parts(self) -> bool:
        """Whether the template shows a part as it shows the same text, or takes nothing else."""
        return self.takes_parts or self._shown([PROBE_PART]) == self._shown(PROBE)


class Chat(NamedTuple):
    """A conversation as text, and the spans of the assistant's turns in it, each with its end-of-turn token."""

    text: str
    spans: list[Span]


def chat_template(tokenizer: "PreTrainedTokenizerBase") -> ChatTemplate | None:
    """Return the tokenizer's template, or TRL's copy of it with marks; None if the tokenizer has no template."""
    if tokenizer.chat_template is None:
        return None
    anything: list[dict] = [{"type": "function", "function": {"name": "any", "parameters": {}}}]
    plain, with_tools = tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=anything)
    known = None if MARK.search(plain) else _template_of_trl(tokenizer)
    if known is None:
        return ChatTemplate(tokenizer, plain, with_tools)
    return ChatTemplate(tokenizer, known, known if with_tools == plain else with_tools)


def render(template: ChatTemplate, messages: list[Message], tools: Tools = None, *, begin: bool = False) -> str:
    """Return the conversation as text; with `begin`, the generation prompt follows it.

    Raises:
        BadInput: the template cannot render the conversation, or leaves out what the user or the system says.
    """
    import jinja2

    try:
        text = template.tokenizer.apply_chat_template(
            template.read(messages),
            tools,
            chat_template=template.of(tools),
            add_generation_prompt=begin,
            tokenize=False,
        )
    except (*RAISED, jinja2.TemplateError) as error:
        raise BadInput(f"the chat template cannot render it: {first_line(error)}") from error
    assert isinstance(text, str), "without tokenize, one conversation is one text"
    check_length(text)
    for number, message in enumerate(messages, start=1):
        lost = next((said for said in _asked(message) if said not in text), None)
        if lost is not None:
            raise BadInput(
                f"the chat template leaves out what message {number} ({message['role']}) says, {lost[:40]!r}: give a "
                "template that shows it (--chat-template), or leave the message out"
            )
    return text


def _asked(message: Message) -> list[str]:
    """Return the texts of a message of the user or the system, without the space around them."""
    content = message.get("content")
    if message["role"] not in ("user", "system") or not content:
        return []
    parts = [content] if isinstance(content, str) else [part.get("text") for part in content if isinstance(part, dict)]
    return [part.strip() for part in parts if isinstance(part, str)]


def render_marked(template: ChatTemplate, messages: list[Message], tools: Tools, first: int) -> Chat:
    """Return the conversation with the spans of the assistant's turns, from message number `first` on.

    Raises:
        BadInput: as `render`, or the template changes earlier messages when more follow.
    """
    text = render(template, messages, tools)
    if not MARK.search(template.of(tools)):
        return Chat(text, _spans_by_prefix(template, messages, tools, first))
    spans = _spans_by_marks(template, messages, tools)
    if first:
        before = render(template, messages[:first], tools)
        if not text.startswith(before):
            raise BadInput("the chat template changes the prompt when a completion follows it")
        spans = [span for span in spans if span[0] >= len(before)]
    return Chat(text, spans)


def speaks(messages: Sequence[Message]) -> bool:
    """Return whether a message of the assistant has content or calls a tool."""
    for message in messages:
        content = message.get("content")
        has_content = content.strip() if isinstance(content, str) else content
        if message["role"] == "assistant" and (has_content or message.get("tool_calls")):
            return True
    return False


def _template_of_trl(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    import jinja2
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer)
    except (*RAISED, jinja2.TemplateError):  # it tries tool calls, which some templates refuse
        return None


def _spans_by_marks(template: ChatTemplate, messages: list[Message], tools: Tools) -> list[Span]:
    """Return the spans of {% generation %} blocks; adjacent blocks are one span."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens: dict[str, Any] = dict(template.tokenizer.special_tokens_map)
    rendered: Any = render_jinja_template(
        [template.read(messages)],
        tools=tools,
        chat_template=template.of(tools),
        return_assistant_tokens_mask=True,
        **tokens,
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
            raise BadInput("the first message is the assistant's, so the start of its turn cannot be found")
        before = render(template, messages[:number], tools, begin=True)
        after = render(template, messages[: number + 1], tools)
        if not (after.startswith(before) and text.startswith(after)):
            raise BadInput(
                f"the assistant's text in message {number + 1} cannot be located: the chat template changes earlier "
                "messages when more follow; mark the assistant's text in the template with {% generation %}"
            )
        spans.append((len(before), len(after)))
    return spans
