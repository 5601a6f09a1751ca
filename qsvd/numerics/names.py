"""Codecs by name: the one place that turns "nf3-64-8x256" of an option, a table or a config.json into a codec and back.

nf4, nf4+dq             bitsandbytes' NF4 in blocks of 64, with scales in float32 or double-quantized
int4-<group>            whole numbers of 4 bits, as compressed-tensors packs them
nf<bits>-<block>-<s>    NormalFloat; s is the dtype of the scales, fp32, fp16 or bf16, or their nesting, <bits>x<block>

To add a codec, write its class in a file of its own (a subclass of Codec with `FORMS`, `name` and `from_name`), and add
the class to CODECS.
"""

from functools import cache

from qsvd.errors import BadInput
from qsvd.numerics.codec import Codec
from qsvd.numerics.int4 import Int4
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.numerics.normal_float import NormalFloat

CODECS: tuple[type[Codec], ...] = (NormalFloat4, NormalFloat, Int4)
ALLOWED = ", or ".join(kind.FORMS for kind in CODECS)


@cache
def codec_named(name: str) -> Codec:
    """Return the codec with a name, the same object every time.

    Raises:
        BadInput: no codec has the name; the message says what is allowed.
    """
    for kind in CODECS:
        try:
            found = kind.from_name(name)
        except ValueError as error:
            raise BadInput(f"codec {name!r}: {error}; a codec is {ALLOWED}") from error
        if found is not None:
            return found
    raise BadInput(f"codec {name!r} is unknown; a codec is {ALLOWED}")


def spelling(codec: Codec) -> str:
    """Return the name of a codec, by which `codec_named` finds an equal one.

    Raises:
        BadInput: no file can name the codec, because it is NF4 in blocks of another size than 64.
    """
    codec_named(codec.name)
    return codec.name
