"""LoRA-XS: a core between the singular directions of the stored components is trained."""

from qsvd.adapters.adapter import Defaults
from qsvd.adapters.methods.core import Core


class LoraXs(Core):
    """LoRA-XS (arXiv:2405.17604): W' = Q + U (I + (alpha / K) R) S V^T, with R [K, K] trained. Parameters: K^2.

    The authors draw R from N(0, 1e-5); zero starts at the quantized model, and has a gradient. They decompose the
    16-bit weight; here U S V^T are the stored components, which are not decomposed a second time.
    """

    paper = "2405.17604"
    starts_as = "the components, core 0"
    defaults = Defaults(
        rank=None, scale=1.0, learning_rate=4e-3, reason="the authors' rate and scale for Mistral-7B, at rank 64"
    )


METHOD = LoraXs
