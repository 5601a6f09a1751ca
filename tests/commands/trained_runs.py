"""Runs as `qsvd train` leaves them, made in a second, and the weights that they stand for, by NumPy in float64."""

import json
from collections.abc import Mapping

import numpy as np
import safetensors.torch
import scipy.linalg
import torch

import qsvd
from qsvd.adapters.model import split_linears, trained
from tests.commands.folders import components_of
from tests.export.cases import residual
from tests.gradients import write_gradients

METHODS = {
    "pissa": {},
    "lora": {"rank": 4, "alpha": 8.0},
    "edora": {},
    "lora-xs": {"rank": 4, "alpha": 8.0},
    "sorsa": {},
    "dora": {"rank": 4, "alpha": 8.0},
    "adalora": {"rank": 4, "alpha": 8.0},
    "lora-fa": {"rank": 4, "alpha": 8.0},
    "vera": {"rank": 4},
    "lora-ga": {"rank": 4, "alpha": 8.0},
    "randlora": {"rank": 4, "alpha": 8.0},
    "sara": {"rank": 4, "alpha": 8.0},
    "melora": {"rank": 4, "alpha": 8.0, "own": {"blocks": 2}},
    "kron-lora": {"rank": 4, "alpha": 8.0},
    "singlora": {"rank": 4, "alpha": 8.0},
    "symlora": {"rank": 4, "alpha": 8.0},
    "lora-mini": {"rank": 4, "alpha": 8.0, "own": {"outer_out": 8, "outer_in": 6}},
    "cora": {"rank": 4, "alpha": 8.0},
    "lorta": {"rank": 4, "alpha": 8.0},
    "lora2": {"rank": 4, "alpha": 8.0},
    "delta-lora": {"rank": 4, "alpha": 8.0, "own": {"delta_start": 0.0}},
    "xgblora": {"rank": 4, "alpha": 8.0},
    "weightlora": {"rank": 4, "alpha": 8.0},
    "losa": {"rank": 4, "alpha": 8.0},
}
RAMP = 0.25  # of singlora, as in a run that was stopped
ROUTED = {"mo-sara": {}, "r-lora": {}}  # they stand for no weights
SCALE = 2.0  # alpha / rank of the LoRA
LABELS = ("neg", "pos")
MOVE = 0.05  # of a parameter's own size, as training moves it; of START where it starts at zero
START = 0.3
LORTA = ("q_proj", "k_proj", "v_proj", "o_proj")  # in the order of its matrices


def write_run(base, folder, method="pissa", *, labels=(), seed=0):
    """A run on this base whose trained parameters have moved; the model in memory. Gradients are gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "gradients"
    own = {"own": {"gradients": write_gradients(base, file, 4)}} if method == "lora-ga" else {}
    model = qsvd.load(base, options=qsvd.AdapterOptions(method, **(METHODS | ROUTED)[method], **own), labels=labels)
    file.unlink(missing_ok=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model).values():
            size = parameter.square().mean().sqrt().item() or START
            parameter += MOVE * size * torch.randn(parameter.shape, generator=generator)
        for _, linear in split_linears(model) if method == "singlora" else ():
            linear.adapter.ramp.fill_(RAMP)
    model.save_pretrained(folder)
    return model


def factors_of(base) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """Stored B0 and A0, float64, by module path in the base."""
    manifest = json.loads((base / "qsvd.json").read_text())
    stored = components_of(base)
    keys = {weight["module"]: f"base_model.model.{weight['module']}.lora_" for weight in manifest["weights"].values()}
    return {m: tuple(stored[f"{key}{letter}.weight"].double().numpy() for letter in "BA") for m, key in keys.items()}


def trained_weights(base, run, model):
    """W' of every split weight, float64, by module path in the trained model.

    EDoRA's directions are known up to their signs only: they are the model's, which tests/adapters judges.
    """
    saved = {
        name: t.double().numpy() for name, t in safetensors.torch.load_file(run / "qsvd_adapter.safetensors").items()
    }
    stored = factors_of(base)
    weights, manifest = {}, json.loads((base / "qsvd.json").read_text())
    for path, linear in split_linears(model):
        module = manifest["weights"][linear.name]["module"]
        start, (up, down) = residual(base, linear.name), stored[module]
        found = {name.rpartition(".")[2]: tensor for name, tensor in saved.items() if name.startswith(f"{path}.")}
        buffers = {name: tensor.double().numpy() for name, tensor in linear.adapter.named_buffers()}
        if model.split_record.method == "lorta":
            moved = start + up @ down + lorta_product(path, len(up), saved)
        else:
            moved = start + product_of(model.split_record.method, (up, down), found, buffers | {"Q": start})
        if "magnitude" in found:
            moved = found["magnitude"][:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True)
        weights[path] = moved
    return weights


def _mirrored(p, _, shape):
    values = p.get("diagonal", np.ones(len(p["down"])) * p.get("ramp", 1))
    return p["down"][:, : shape[0]].T * values @ p["down"][:, : shape[1]]


def _melora(p, *_):
    return scipy.linalg.block_diag(*map(np.matmul, np.split(p["up"], 2), np.split(p["down"], 2, axis=1)))


def random_sum(p, frozen, shape):
    """Sum over n of B_n diag(lam_n) A diag(gam_n), with A and B_n of deviation 1."""
    lam, gam, bases, base = p["lam"], p["gam"], frozen["shared_bases"], frozen["shared_base"]
    unit = 3 * np.sqrt(bases.shape[1] * base.shape[1])
    parts = np.split(bases, len(gam), axis=1)
    total = unit * sum(part * lam[:, n] @ base * gam[n] for n, part in enumerate(parts))
    return total if total.shape == shape else total.T


BY_FORMULA = {  # what is added, without the scale
    "melora": _melora,
    "kron-lora": lambda p, *_: np.kron(p["kron"], p["up"] @ p["down"]),
    "singlora": _mirrored,
    "symlora": _mirrored,
    "lora-mini": lambda p, frozen, _: (
        frozen["outer_up"] @ p["inner_up"] @ p["inner_down"] @ frozen["frozen_down"][-p["inner_down"].shape[1] :]
    ),
    "cora": lambda p, frozen, _: frozen["basis"] @ p["down"],
    "lora2": lambda p, *_: p["up"] @ p["inner_up"] * p["diagonal"] @ p["inner_down"] @ p["down"],
    "randlora": random_sum,
    "lora-ga": lambda p, *_: p["up"] @ p["down"] - p["start_up"] @ p["start_down"],
    "delta-lora": lambda p, *_: 3 * p["up"] @ p["down"] - 2 * p["begun_up"] @ p["begun_down"],  # lambda is 2
    "weightlora": lambda p, *_: p["gate"] * p["up"] @ p["down"],
    "losa": lambda p, frozen, _: (p["up"] @ p["down"]) * (frozen["Q"] != 0),
    "xgblora": lambda p, *_: p["kept_up"] @ p["kept_down"] / SCALE + p["up"] @ p["down"],
}


def product_of(method, factors, p, buffers):
    """B A of one weight, from B0 A0, the trained parameters, and frozen tensors of the model."""
    stored = factors[0] @ factors[1]
    if method == "pissa":
        return p["up"] @ p["down"]
    if method == "sorsa":
        return p["up"] * p["diagonal"] @ p["down"]
    if method in ("edora", "lora-xs"):
        scale = SCALE if method == "lora-xs" else 1
        return stored + scale * buffers["directions"] @ p["core"] @ buffers["inner"] @ factors[1]
    if method == "vera":
        return stored + p["b"][:, None] * buffers["shared_up"] * p["d"] @ buffers["shared_down"]
    if method in BY_FORMULA:
        return stored + SCALE * BY_FORMULA[method](p, buffers, stored.shape)
    down = buffers["frozen_down"][-p["up"].shape[1] :] if method == "lora-fa" else p["down"]
    return stored + SCALE * p["up"] * p.get("diagonal", 1) @ down


def lorta_product(path, rows, saved):
    """What is added to a projection of a layer of attention, one head after another; 0 for other layers."""
    attention, _, last = path.rpartition(".")
    if last not in LORTA:
        return 0
    parts = {name.rpartition(".")[2]: tensor for name, tensor in saved.items()}  # each is there once
    number = next(int(part) for part in attention.split(".") if part.isdigit())
    inner = parts["matrices"][LORTA.index(last)] * parts["attentions"][number]
    heads = parts["heads"][: rows // len(parts["up"])]
    return SCALE * np.concatenate([parts["up"] * head * inner @ parts["down"] for head in heads])


def head_of(run):
    """Tensors that were trained in full."""
    record = json.loads((run / "qsvd_adapter.json").read_text())
    saved = safetensors.torch.load_file(run / "qsvd_adapter.safetensors")
    return {name: saved[name] for name in record["full"]}
