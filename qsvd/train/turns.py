"""Conversations as data sets spell them -> messages as chat templates take them, {"role", "content", ...}."""

import json
from typing import Any

from qsvd.plan.listing import listing

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
        ValueError: not a list of at least one object with a role and a content; only a message with tool_calls may
            do without content.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{column} is {described(messages)}, not a list of messages")
    return [_check_message(message, f"{column}[{number}]") for number, message in enumerate(messages)]


def from_conversation(conversation: object) -> list[Message]:
    """Messages of [{"from", "value"}, ...]; a conversation in role and content is taken as it is.

    Raises:
        ValueError: not a list of turns, a turn without from or value, or a speaker who is not in SPEAKERS.
    """
    if not isinstance(conversation, list) or not conversation:
        raise ValueError(f"conversations is {described(conversation)}, not a list of turns")
    if all(isinstance(turn, dict) and turn.get("role") is not None for turn in conversation):
        return check_messages(conversation, "conversations")
    return [_from_turn(turn, f"conversations[{number}]") for number, turn in enumerate(conversation)]


def read_tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tools of a row, also where the column holds them as JSON text; None if there are none.

    Raises:
        ValueError: they are no list of JSON schemas.
    """
    tools = row.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) or None
        except ValueError as error:
            raise ValueError(f"tools is a text that is no JSON ({error})") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"tools is {described(tools)}, not a list of JSON schemas")
    return tools


def described(value: object) -> str:
    """What stands there instead, short enough for a sentence."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"


def _check_message(message: object, place: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{place} is {described(message)}, not an object with role and content")
    kept = {name: value for name, value in message.items() if value is not None}
    if not isinstance(kept.get("role"), str) or not kept["role"]:
        raise ValueError(f"{place} has no role")
    if not isinstance(kept.get("content"), str | list) and not kept.get("tool_calls"):
        raise ValueError(f"{place} has no content")
    return kept


def _from_turn(turn: object, place: str) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or not isinstance(turn.get("from"), str):
        raise ValueError(f"{place} is {described(turn)}, not an object with from and value")
    if turn["from"] not in SPEAKERS:
        raise ValueError(f"{place} is from {turn['from']!r}; known are {listing(list(SPEAKERS), limit=len(SPEAKERS))}")
    return {"role": SPEAKERS[turn["from"]], "content": turn["value"]}
