"""What a linear layer does in its block, told from the name that transformers gives it.

Fused projections (query, key and value in one matrix; gate and up in one) have no single role and are "other", as are
routers and whatever a new architecture names in its own way. Roles group the lines of a report; nothing else.
"""

from typing import Literal

Role = Literal["q", "k", "v", "o", "gate", "up", "down", "other"]

BY_LAST_NAME: dict[str, Role] = {
    **dict.fromkeys(("q_proj", "query", "query_proj", "q_lin", "q", "q_a_proj", "q_b_proj"), "q"),
    **dict.fromkeys(("k_proj", "key", "key_proj", "k_lin", "k"), "k"),
    **dict.fromkeys(("v_proj", "value", "value_proj", "v_lin", "v"), "v"),
    **dict.fromkeys(("o_proj", "out_proj", "out_lin", "o"), "o"),
    **dict.fromkeys(("gate_proj", "w1", "wi_0"), "gate"),
    **dict.fromkeys(("up_proj", "w3", "wi", "wi_1", "fc1", "fc_in", "lin1", "c_fc", "dense_h_to_4h", "ffn"), "up"),
    **dict.fromkeys(("down_proj", "w2", "fc2", "fc_out", "lin2", "dense_4h_to_h", "ffn_output"), "down"),
}


def role_of(module: str) -> Role:
    """The role of the linear layer at this path, e.g. "o" for "encoder.layer.0.attention.output.dense"."""
    *parents, last = module.split(".")
    in_attention = any("att" in part.lower() for part in parents[-2:])
    if last == "dense" and parents[-1:] == ["intermediate"]:
        return "up"
    if last in ("dense", "wo", "c_proj"):
        feeds_forward = last != "dense" or parents[-1:] == ["output"]
        return "o" if in_attention else "down" if feeds_forward else "other"
    return BY_LAST_NAME.get(last, "other")
