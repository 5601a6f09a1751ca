"""qsvd's quantization method for transformers: from_pretrained opens models of mixed bits with it (docs/format.md).

transformers keeps a list of methods. The import of this module adds ours to it (qsvd/hf.py imports it in time).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qsvd.adapters.packed_linear import PackedLinear
from qsvd.errors import BadInput, listing
from qsvd.files.layout import METHOD
from qsvd.numerics.names import codec_named, spelling
from qsvd.numerics.normal_float import NormalFloat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16")


class PackedConfig(QuantizationConfigMixin):
    """The quantization_config of a config.json.

    Args:
        codecs: Name of a codec (numerics/names.py) -> paths of the modules whose weight it packs.
        dtype: What these weights were stored in before: float32, bfloat16 or float16.
        quant_method: "qsvd".

    Raises:
        BadInput: a codec is unknown or not of the NormalFloat family, a path has two codecs, or dtype is another.
    """

    def __init__(self, codecs: Mapping[str, Sequence[str]], dtype: str, quant_method: str = METHOD):
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue]  # an enum of transformers' own
        self.codecs = {name: list(paths) for name, paths in codecs.items()}
        self.dtype = dtype
        wrong = [] if dtype in DTYPES else [f"dtype {dtype!r} is none of {', '.join(DTYPES)}"]
        for name in codecs:
            try:
                if not isinstance(codec_named(name), NormalFloat):
                    wrong.append(f"codec {name!r} is bitsandbytes' and has its quantization method")
            except ValueError as error:
                wrong.append(str(error))
        paths = [path for listed in self.codecs.values() for path in listed]
        if twice := sorted({path for path in paths if paths.count(path) > 1}):
            wrong.append(f"{listing(twice)} stand twice in it")
        if wrong:
            raise BadInput(f"the quantization_config of method {METHOD!r} cannot be used: {'; '.join(wrong)}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config that a config.json has; the arguments are transformers' own.

        Raises:
            BadInput: it has other keys than those of the method, and what __init__ refuses.
        """
        if sorted(config_dict) != ["codecs", "dtype", "quant_method"]:
            raise BadInput(
                f"a quantization_config of method {METHOD!r} has codecs, dtype and quant_method, not "
                f"{listing(sorted(config_dict))}"
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def packing(self) -> dict[str, NormalFloat]:
        """The codec of every path."""
        found: dict[str, NormalFloat] = {}
        for name, paths in self.codecs.items():
            codec = codec_named(name)
            assert isinstance(codec, NormalFloat), "checked when it was made"
            found |= dict.fromkeys(paths, codec)
        return found

    def at(self, packing: Mapping[str, NormalFloat]) -> "PackedConfig":
        """The same with these paths alone."""
        codecs: dict[str, list[str]] = {}
        for path, codec in packing.items():
            codecs.setdefault(spelling(codec), []).append(path)
        return PackedConfig(codecs, self.dtype)


class PackedQuantizer(HfQuantizer):
    """Puts a PackedLinear in the place of every linear layer that the config names; transformers then fills them.

    Raises:
        BadInput: the checkpoint is not packed, so that it would have to be quantized while it is loaded.
    """

    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, *, pre_quantized: bool = True):
        super().__init__(quantization_config, pre_quantized=pre_quantized)
        self.missing = set[str]()  # tensors of packed layers that are still to come from the files
        if not pre_quantized:
            raise BadInput(
                f"from_pretrained does not quantize by the method {METHOD!r}: leave quantization_config out, make OUT "
                "with `qsvd quantize MODEL --out OUT`, and load it with from_pretrained(OUT)"
            )

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]  # abstract: no type
        """Codes and scales are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Adapters train beside the packed layers."""
        return True

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None, which is no cast, for what belongs to packed layers; some models keep layers in float32 by name.

        transformers asks for every tensor of the files that has a place in the model, and so what they lack is known.
        """
        name = converter.target_patterns[0]
        if name not in self.missing:
            return super().get_new_dtype(converter, param, dtype)
        self.missing.discard(name)
        return dtype if name.endswith(".bias") else None

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """The same model of ordinary linear layers, in place; all of it in `dtype` if that is given."""
        return super().dequantize(model, model.dtype if dtype is None else dtype)

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **_: object) -> None:
        """
        Raises:
            BadInput: a path has no linear layer, or one that shares its weight.
        """
        packing = _located(model, self.quantization_config.packing())
        self.quantization_config = self.quantization_config.at(packing)
        for path, codec in packing.items():
            linear: Any = model.get_submodule(path)
            bias = None if linear.bias is None else linear.bias.dtype
            packed = PackedLinear(linear.in_features, linear.out_features, codec, bias_dtype=bias)
            model.set_submodule(path, packed, strict=True)
            self.missing |= {f"{path}.{name}" for name in packed.state_dict()}

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: object) -> "PreTrainedModel":
        """
        Raises:
            BadInput: the files lack tensors of packed layers.
        """
        if self.missing:
            raise BadInput(
                f"{model.config.name_or_path} lacks {len(self.missing)} tensors of packed layers: "
                f"{listing(sorted(self.missing))}; fetch or make it again"
            )
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        packed = [(path, module) for path, module in model.named_modules() if isinstance(module, PackedLinear)]
        for path, module in packed:
            model.set_submodule(path, module.dense(dtype), strict=True)
        return model if dtype == model.dtype else model.to(dtype)


def _located(model: "PreTrainedModel", packing: Mapping[str, NormalFloat]) -> dict[str, NormalFloat]:
    """The codecs by the model's own paths.

    A bare model lacks the prefix that its paths have below a head, and has none of the other heads' layers; these
    are left out if the checkpoint says that it was made for another class.
    """
    linears = {path for path, module in model.named_modules() if type(module) is nn.Linear}
    tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
    prefix = f"{model.base_model_prefix}."
    found: dict[str, NormalFloat] = {}
    wrong: list[str] = []
    for path, codec in packing.items():
        spelled = (path, path.removeprefix(prefix), prefix + path)
        own = next((name for name in spelled if name in linears - tied), None)
        if own is not None:
            found[own] = codec
        else:
            wrong.append(path)
    made_for = model.config.architectures or []
    if wrong and type(model).__name__ in made_for:
        raise BadInput(
            f"the quantization_config names {len(wrong)} modules that are no linear layers of a {type(model).__name__} "
            f"with a weight of their own: {listing(wrong)}"
        )
    return found


# Calls, since decorators without types would hide the classes from type checkers.
register_quantization_config(METHOD)(PackedConfig)
register_quantizer(METHOD)(PackedQuantizer)
