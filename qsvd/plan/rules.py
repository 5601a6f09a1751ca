"""Which linear layers of the blocks stay in 16 bits, and why: by rules on shapes, code and structure, not by families.

Every rule returns a reason, a few words that the reports show.
"""

import ast
import copy
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from operator import eq, ge, gt, le, lt, ne
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qsvd.plan.language import is_in, towers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADS = ("lm_head", "classifier", "score", "qa_outputs")  # trained anew on a quantized model, so never 4-bit
LEAST_SIDE = 32  # a shorter layer gains little in 4 bits, and its shorter side would limit the rank of all
DESCRIBES = ("dtype", "device", "shape", "ndim", "size", "is_meta", "requires_grad")  # of a weight, without its values
SHORT = f"a side below {LEAST_SIDE}"
ROUTER = "a router"
TOWER = "outside of the language model"
FLOAT32 = "transformers keeps it in float32"
TIED = "shares its tensor"
READ = "code reads its weight past forward"
PEFT = "PEFT refuses an adapter on it"
OTHER = "computes more than a product"
GROUPED = "a layer of groups, several matrices in one tensor"


def is_linear(module: nn.Module) -> bool:
    """Tell whether bitsandbytes or another library may treat the module as a linear layer."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Tell whether the module is transformers' Conv1D: a linear layer whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and not isinstance(module, nn.Linear)


def is_replaced_by_bitsandbytes(module: nn.Module) -> bool:
    """Tell whether transformers puts bitsandbytes' layer in its place: it passes over subclasses of nn.Linear."""
    return type(module) is nn.Linear or is_transposed(module)


def left_by_rule(model: "PreTrainedModel", blocks: Mapping[str, nn.Module], *, include_towers: bool) -> dict[str, str]:
    """Return path -> reason of every linear layer of the blocks that stays in 16 bits.

    Args:
        blocks: Path -> module of all linear layers in the blocks.
        include_towers: Whether encoders of images and sound are split, too.
    """
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    outside = () if include_towers else towers(model)
    routers, reading = _routers(model, blocks), _read_past_forward(model)
    rules = {
        TOWER: lambda path, _: is_in(path, outside),
        TIED: lambda path, _: f"{path}.weight" in tied,
        FLOAT32: lambda path, _: _stays_float32(model, path),
        ROUTER: lambda path, _: path in routers,
        SHORT: lambda _, linear: min(linear.weight.shape) < LEAST_SIDE,
        READ: lambda path, _: path in reading,
        OTHER: lambda _, linear: not _is_product(linear),
    }
    left = {}
    for path, linear in blocks.items():
        reason = next((reason for reason, holds in rules.items() if holds(path, linear)), None)
        if reason is not None:
            left[path] = reason
    if READ in left.values():  # PEFT refuses layers of such models only, and takes seconds to import
        refused = _refused_by_peft(model.config.model_type, {path.rpartition(".")[2] for path in blocks})
        left |= {path: PEFT for path in blocks if path not in left and path.rpartition(".")[2] in refused}
    return left


def _stays_float32(model: "PreTrainedModel", path: str) -> bool:
    """Tell whether transformers' 4-bit loading skips this module (T5's wo), so that a quantized one would not load."""
    return any(path.endswith(name) or path.startswith(f"{name}.") for name in model._keep_in_fp32_modules or ())


def _routers(model: nn.Module, blocks: Iterable[str]) -> set[str]:
    """Return the linear layers that choose experts: as many outputs as experts, and next to these.

    Experts are a 3-D stack of a child of a module, or an nn.ModuleList of equal children.
    """
    found = set()
    beside: dict[str, set[int]] = {}
    for path, module in model.named_modules():
        parent, _, _ = path.rpartition(".")
        stacks = [p for _, p in module.named_parameters(recurse=False) if p.ndim == 3 and min(p.shape[-2:]) > 1]
        if stacks and not isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            beside.setdefault(parent, set()).update(len(stack) for stack in stacks)
        if isinstance(module, nn.ModuleList) and "expert" in path.rpartition(".")[2]:
            beside.setdefault(parent, set()).add(len(module))
    for path in blocks:
        linear: Any = model.get_submodule(path)
        parents = path.split(".")[:-1]
        near = (".".join(parents[: len(parents) - up]) for up in (0, 1) if len(parents) > up)
        is_gate = any(word in path.rpartition(".")[2] or word in ".".join(parents[-1:]) for word in ("rout", "gat"))
        if any(linear.weight.shape[0] in beside.get(one, ()) for one in near) and is_gate:
            found.add(path)
    return found


def _read_past_forward(model: nn.Module) -> set[str]:
    """Return the children whose weight the code of their parent uses by itself, as kernels of Mamba do.

    The code is read, not run: kernels run on other machines than this one.
    """
    found = set()
    for path, module in model.named_modules():
        for name in weights_read(module) if _may_read(type(module)) else ():
            if isinstance(getattr(module, name, None), nn.Module):
                found.add(f"{path}.{name}".removeprefix("."))
    return found


def weights_read(module: nn.Module) -> set[str]:
    """Return the attributes X for which `forward`, and what it calls, uses the numbers of self.X.weight.

    Questions such as self.X.weight.dtype do not use them. A branch that the attributes of the module close is not read.
    """
    methods = _methods(type(module))
    found, reached, waiting = set[str](), set[str](), ["forward"]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        for method in methods.get(name, ()):
            nodes = list(_open_nodes(method, module))
            found |= _weights_used(nodes)
            waiting += [node.attr for node in nodes if _is_own(node) and node.attr in methods]
    return found


@cache
def _methods(owner: type) -> Mapping[str, Sequence[ast.AST]]:
    """Return the methods of a class and of those it is made from, by name."""
    methods: dict[str, list[ast.AST]] = {}
    for base in _bases(owner):
        for node in (node for code in _code(base) for node in ast.walk(code)):
            if isinstance(node, ast.FunctionDef):
                methods.setdefault(node.name, []).append(node)
    return methods


def _bases(owner: type) -> list[type]:
    """Return a class and those it is made from, without nn.Module."""
    return [base for base in owner.__mro__ if base is not nn.Module and issubclass(base, nn.Module)]


@cache
def _may_read(owner: type) -> bool:
    """Tell whether the code of a class, or of one that it is made from, has self.NAME.weight anywhere."""
    return any(map(_has_weight, _bases(owner)))


@cache
def _has_weight(base: type) -> bool:
    """Tell whether the code of a class has self.NAME.weight; few modules have, and only these are parsed."""
    if re.search(r"\bself\s*\.\s*\w+\s*\.\s*weight\b", _text(base.__module__)) is None:
        return False
    nodes = (node for code in _code(base) for node in ast.walk(code))
    return any(isinstance(node, ast.Attribute) and node.attr == "weight" and _is_own(node.value) for node in nodes)


def _code(base: type) -> Sequence[ast.AST]:
    """Return the code of a class; a class that was made while running has none of its own."""
    return _classes(base.__module__).get(base.__name__, ())


@lru_cache(maxsize=8)
def _classes(module: str) -> Mapping[str, Sequence[ast.AST]]:
    """Return the code of the classes of a module by name."""
    found: dict[str, list[ast.AST]] = {}
    for node in ast.walk(ast.parse(_text(module))):
        if isinstance(node, ast.ClassDef):
            found.setdefault(node.name, []).append(node)
    return found


@lru_cache(maxsize=8)
def _text(module: str) -> str:
    """Return the text of a module; "" if it has none, as where it was typed."""
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):
        return ""


def _open_nodes(node: ast.AST, module: nn.Module) -> Iterator[Any]:
    """Yield a node and all below it, without the branches that the attributes of the module close."""
    yield node
    if isinstance(node, (ast.If, ast.IfExp)):
        chosen = _decided(node.test, module)
        parts = [[node.test], [] if chosen is False else node.body, [] if chosen is True else node.orelse]
        children: Iterable[ast.AST] = [one for part in parts for one in (part if isinstance(part, list) else [part])]
    else:
        children = ast.iter_child_nodes(node)
    for child in children:
        yield from _open_nodes(child, module)


def _decided(test: ast.expr, module: nn.Module) -> bool | None:
    """Return what a condition on plain attributes of the module is, such as self.slow_but_exact; None for others."""
    if isinstance(test, ast.BoolOp):
        parts = [_decided(one, module) for one in test.values]
        ends = isinstance(test.op, ast.Or)
        return ends if ends in parts else None if None in parts else not ends
    if isinstance(test, ast.Compare) and len(test.comparators) == 1:
        left, right = (_constant(one, module) for one in (test.left, test.comparators[0]))
        compare = {ast.Gt: gt, ast.Lt: lt, ast.Eq: eq, ast.NotEq: ne, ast.GtE: ge, ast.LtE: le}.get(type(test.ops[0]))
        return None if left is None or right is None or compare is None else bool(compare(left, right))
    value = _constant(test, module)
    return value if isinstance(value, bool) else None


def _constant(node: ast.expr, module: nn.Module) -> Any:
    """Return the number, text or truth value of a constant or of self.NAME; None for all others."""
    value = node.value if isinstance(node, ast.Constant) else None
    if _is_own(node) and node.attr != "training":  # pyright: ignore[reportAttributeAccessIssue]
        value = getattr(module, node.attr, None)  # pyright: ignore[reportAttributeAccessIssue]
    return value if isinstance(value, (bool, int, float, str)) else None


def _weights_used(nodes: Sequence[ast.AST]) -> set[str]:
    asked = set()
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr in DESCRIBES:
            asked.add(node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr"):
            asked.update(node.args)
    return {
        node.value.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and node.attr == "weight" and _is_own(node.value) and node not in asked
        if isinstance(node.value, ast.Attribute)
    }


def _is_own(node: ast.AST) -> bool:
    """Tell whether a node is self.NAME."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _is_product(linear: nn.Module) -> bool:
    """Tell whether a linear layer computes x W^T + b and no more; a small copy of it is tried."""
    if is_replaced_by_bitsandbytes(linear):
        return True
    return _computes_product(linear)


def _computes_product(linear: nn.Module) -> bool:
    small = copy.copy(linear)
    draw = torch.Generator().manual_seed(0)
    weight_OI, x_TI = torch.randn(6, 4, generator=draw), torch.randn(3, 4, generator=draw)
    bias = None if getattr(linear, "bias", None) is None else torch.randn(6, generator=draw)
    small._parameters = {"weight": nn.Parameter(weight_OI), "bias": None if bias is None else nn.Parameter(bias)}
    try:
        with torch.device("cpu"), torch.no_grad():
            found = small(x_TI)
    except (RuntimeError, ValueError, TypeError, AttributeError):  # it needs more, or other shapes
        return False
    wanted = nn.functional.linear(x_TI, weight_OI, bias)
    return isinstance(found, Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-5)


def is_grouped(module: nn.Module) -> bool:
    """Tell whether a module multiplies parts of its input with a matrix each, as those of ConvBERT do."""
    stacks = [name for name, p in module.named_parameters(recurse=False) if p.ndim == 3]
    if stacks != ["weight"]:
        return False
    weight: Any = module.get_parameter("weight")
    groups, columns, rows = weight.shape
    try:
        found = copy.deepcopy(module).to("meta")(torch.empty(1, 2, groups * columns, device="meta", dtype=weight.dtype))
    except (RuntimeError, ValueError, TypeError, AttributeError):  # it needs more, or other shapes
        return False
    return isinstance(found, Tensor) and found.shape == (1, 2, groups * rows)


def _refused_by_peft(model_type: str, names: Iterable[str]) -> Sequence[str]:
    """Return the names of layers on which PEFT puts no LoRA in models of this type."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import PreTrainedConfig

    refused = []
    for name in names:
        shell = nn.Module()
        shell.config = PreTrainedConfig()  # pyright: ignore[reportArgumentType]
        shell.config.model_type = model_type  # pyright: ignore[reportAttributeAccessIssue]
        shell.add_module(name, nn.Linear(1, 1))
        try:
            inject_adapter_in_model(LoraConfig(target_modules=[name]), shell)
        except ValueError:
            refused.append(name)
    return refused
