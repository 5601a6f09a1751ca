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
from qsvd.adapters.tables import pack_table, unpack_tables
from qsvd.errors import BadInput, listing
from qsvd.files.layout import METHOD
from qsvd.numerics.names import codec_named, spelling
from qsvd.numerics.normal_float import NormalFloat
from qsvd.plan.rules import is_linear, is_transposed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16")


class PackedConfig(QuantizationConfigMixin):
    """The quantization_config of a config.json.

    Args:
        codecs: Name of a codec (numerics/names.py) -> paths of the modules whose weight it packs.
        dtype: Dtype of these weights in the 16-bit model: float32, bfloat16 or float16.
        quant_method: "qsvd".

    Raises:
        BadInput: a codec is unknown or not of the NormalFloat family, a path has two codecs, or dtype is another.
    """

    def __init__(self, codecs: Mapping[str, Sequence[str]], dtype: str, quant_method: str = METHOD):
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue]  # an enum of transformers' own
        self.codecs = {name: list(paths) for name, paths in codecs.items()}
        self.dtype = dtype
        wrong = [] if dtype in DTYPES else [f"dtype {dtype!r} is not one of {', '.join(DTYPES)}"]
        for name in codecs:
            try:
                if not isinstance(codec_named(name), NormalFloat):
                    wrong.append(f"codec {name!r} belongs to the quantization method bitsandbytes")
            except ValueError as error:
                wrong.append(str(error))
        paths = [path for listed in self.codecs.values() for path in listed]
        if twice := sorted({path for path in paths if paths.count(path) > 1}):
            wrong.append(f"it has two codecs for {listing(twice)}")
        if wrong:
            raise BadInput(f"the quantization_config of method {METHOD!r} cannot be used: {'; '.join(wrong)}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return the config of a config.json; the arguments are transformers' own.

        Raises:
            BadInput: it has other keys, or values that __init__ refuses.
        """
        reason = "this model has quantized experts, which transformers cannot run" if "experts" in config_dict else ""
        if wrong := config_dict.get("misplaced"):
            reason = f"PEFT would put the components of {listing(wrong)} on the experts, since their names are similar"
        if reason:
            raise BadInput(
                f"{reason}: open it with qsvd.load(OUT), or write a 16-bit model with `qsvd export OUT --to merged "
                "--out MERGED`"
            )
        if sorted(config_dict) != ["codecs", "dtype", "quant_method"]:
            raise BadInput(
                f"a quantization_config of method {METHOD!r} has codecs, dtype and quant_method, not "
                f"{listing(sorted(config_dict))}"
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def packing(self) -> dict[str, NormalFloat]:
        """Return the codec of every path."""
        found: dict[str, NormalFloat] = {}
        for name, paths in self.codecs.items():
            codec = codec_named(name)
            assert isinstance(codec, NormalFloat), "checked when it was made"
            found |= dict.fromkeys(paths, codec)
        return found

    def at(self, packing: Mapping[str, NormalFloat]) -> "PackedConfig":
        """Return the config of these paths alone."""
        codecs: dict[str, list[str]] = {}
        for path, codec in packing.items():
            codecs.setdefault(spelling(codec), []).append(path)
        return PackedConfig(codecs, self.dtype)


class PackedQuantizer(HfQuantizer):
    """Replaces every linear layer that the config names by a PackedLinear; transformers then fills them.

    Raises:
        BadInput: the checkpoint is not packed: it would have to be quantized while it is loaded.
    """

    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, *, pre_quantized: bool = True):
        super().__init__(quantization_config, pre_quantized=pre_quantized)
        self.missing = set[str]()  # tensors of packed layers that were not found in the files yet
        self.tied: dict[str, str] = {}  # names that share a packed embedding, and its name
        if not pre_quantized:
            raise BadInput(
                f"from_pretrained does not quantize by the method {METHOD!r}: leave quantization_config out, make OUT "
                "with `qsvd quantize MODEL --out OUT`, and load it with from_pretrained(OUT)"
            )

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]  # abstract: no type
        """Return True: codes and scales are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return True: adapters can be trained on packed layers."""
        return True

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Return None (no cast) for tensors of packed layers; some models keep layers in float32 by name.

        transformers asks for every tensor of the files that belongs to the model, which shows what the files lack.
        """
        name = converter.target_patterns[0]
        if name not in self.missing:
            return super().get_new_dtype(converter, param, dtype)
        self.missing.discard(name)
        return dtype if name.endswith(".bias") else None

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Replace the packed layers by nn.Linear, in place; the whole model gets `dtype` if that is given."""
        return super().dequantize(model, model.dtype if dtype is None else dtype)

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **_: object) -> None:
        """Replace the layers; raise BadInput for a path without a linear layer, or with one that shares its weight."""
        packing = _located(model, self.quantization_config.packing())
        self.quantization_config = self.quantization_config.at(packing)
        head = model.get_output_embeddings()
        for path, codec in packing.items():
            linear: Any = model.get_submodule(path)
            if linear is head or isinstance(linear, nn.Embedding):
                self._pack_table(model, path, codec)
                continue
            bias = None if linear.bias is None else linear.bias.dtype
            first, last = linear.weight.shape
            outputs, inputs = (last, first) if is_transposed(linear) else (first, last)
            packed = PackedLinear(inputs, outputs, codec, bias_dtype=bias)
            model.set_submodule(path, packed, strict=True)
            self.missing |= {f"{path}.{name}" for name in packed.state_dict()}

    def _pack_table(self, model: Any, path: str, codec: NormalFloat) -> None:
        for name in pack_table(model, path, codec):
            self.tied[name] = f"{path}.weight"
            model.all_tied_weights_keys.pop(name, None)  # it has no tensor that transformers could tie
        packed: Any = model.get_submodule(path)
        self.missing |= {f"{path}.{name}" for name in packed.state_dict()}

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: object) -> "PreTrainedModel":
        """Raise BadInput if the files lack tensors of packed layers."""
        if self.missing:
            raise BadInput(
                f"{model.config.name_or_path} lacks {len(self.missing)} tensors of packed layers: "
                f"{listing(sorted(self.missing))}; download or quantize it again"
            )
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        packed = [(path, module) for path, module in model.named_modules() if isinstance(module, PackedLinear)]
        for path, module in packed:
            model.set_submodule(path, module.dense(dtype), strict=True)
        unpack_tables(model, dtype)
        model.all_tied_weights_keys.update(self.tied)
        return model if dtype == model.dtype else model.to(dtype)


def _located(model: "PreTrainedModel", packing: Mapping[str, NormalFloat]) -> dict[str, NormalFloat]:
    """Return the codecs by the model's own paths.

    A model without a head lacks the prefix of the paths, and each head has its own layers. Paths that are not found are
    an error only for the class that the checkpoint was made for.
    """
    linears = {path for path, module in model.named_modules() if is_linear(module)}
    embeddings = {path for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
    prefix = f"{model.base_model_prefix}."
    found: dict[str, NormalFloat] = {}
    wrong: list[str] = []
    for path, codec in packing.items():
        spelled = (path, path.removeprefix(prefix), prefix + path)
        own = next((name for name in spelled if name in (linears - tied) | embeddings), None)
        if own is not None:
            found[own] = codec
        else:
            wrong.append(path)
    made_for = model.config.architectures or []
    if wrong and type(model).__name__ in made_for:
        raise BadInput(
            f"the quantization_config names {len(wrong)} modules that are neither embeddings nor linear layers of a "
            f"{type(model).__name__} with a weight of their own: {listing(wrong)}"
        )
    return found


# Calls, since decorators without types would hide the classes from type checkers.
register_quantization_config(METHOD)(PackedConfig)
register_quantizer(METHOD)(PackedQuantizer)
