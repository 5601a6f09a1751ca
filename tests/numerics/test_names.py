"""Codecs by name: what a name says, and names of codecs that are not there."""

from itertools import product

import pytest
import torch

from qsvd.numerics import names
from qsvd.numerics.codec import Codec
from qsvd.numerics.names import codec_named, spelling
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.numerics.normal_float import Nesting, NormalFloat

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize(("name", "double_quant"), [("nf4", False), ("nf4+dq", True)])
def test_bitsandbytes_codec_has_two_names(name, double_quant):
    codec = codec_named(name)
    assert isinstance(codec, NormalFloat4)
    assert (codec.double_quant, codec.block_size, codec.bits) == (double_quant, 64, 4)
    assert spelling(NormalFloat4(double_quant=double_quant)) == name


def test_a_name_says_bits_block_scales_and_fit():
    for bits, block, fit in product((2, 3, 4, 8), (16, 32, 64, 128), (False, True)):
        end = "-fit" if fit else ""
        for word, scales in DTYPES.items() | {("2x16", Nesting(2, 16)), ("8x256", Nesting(8, 256))}:
            name = f"nf{bits}-{block}-{word}{end}"
            codec = codec_named(name)
            assert isinstance(codec, NormalFloat)
            assert (codec.bits, codec.block_size, codec.fit) == (bits, block, fit)
            assert scales == (codec.nesting or codec.scale_dtype)
            assert spelling(NormalFloat(bits=bits, block_size=block, scales=scales, fit=fit)) == name
            assert codec_named(name) is codec


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_in_blocks_of_another_size_cannot_be_named_in_a_file(double_quant):
    with pytest.raises(ValueError, match=r"codec 'nf4-128(\+dq)?' is unknown; a codec is nf4 or nf4\+dq"):
        spelling(NormalFloat4(double_quant=double_quant, block_size=128))


@pytest.mark.parametrize("name", ["", "nf", "int4", "nf3", "nf3-64", "nf3-64-fp8", "nf4+dq+dq", "NF4", "nf3-64-8x256-"])
def test_an_unknown_name_is_refused_with_all_that_are_allowed(name):
    with pytest.raises(ValueError, match=r"is unknown; a codec is nf4 or nf4\+dq .*, or nf<bits>-<block>-<scales>"):
        codec_named(name)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nf5-64-fp32", "codes have 2, 3, 4 or 8 bits, not 5"),
        ("nf3-48-fp32", "blocks have 16, 32, 64 or 128 elements, not 48"),
        ("nf3-64-8x32", "blocks of scales have 16, 64 or 256 scales, not 32"),
    ],
)
def test_a_name_with_a_value_that_is_not_allowed_says_which(name, problem):
    with pytest.raises(ValueError, match=f"^codec '{name}': {problem}; a codec is nf4"):
        codec_named(name)


def test_a_codec_of_others_needs_one_line(monkeypatch):
    class Sign(NormalFloat4):
        FORMS = "sign"

        @classmethod
        def from_name(cls, name: str) -> Codec | None:
            return cls(double_quant=False) if name == "sign" else None

    monkeypatch.setattr(names, "CODECS", (*names.CODECS, Sign))
    assert isinstance(codec_named.__wrapped__("sign"), Sign)
