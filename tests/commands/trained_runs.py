"""Runs as `qsvd train` leaves them, made in a second, and the weights that they stand for, by NumPy in float64."""

import json
from collections.abc import Mapping

import numpy as np
import safetensors.torch
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
}
SCALE = 2.0  # alpha / rank of the LoRA
LABELS = ("neg", "pos")
MOVE = 0.05  # of a parameter's own size, as training moves it; of START where it starts at zero
START = 0.3


def write_run(base, folder, method="pissa", *, labels=(), seed=0):
    """A run on this base whose trained parameters have moved; the model in memory. Gradients are gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "gradients"
    own = {"gradients": write_gradients(base, file, 4)} if method == "lora-ga" else {}
    model = qsvd.load(base, options=qsvd.AdapterOptions(method, **METHODS[method], own=own), labels=labels)
    file.unlink(missing_ok=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model).values():
            size = parameter.square().mean().sqrt().item() or START
            parameter += MOVE * size * torch.randn(parameter.shape, generator=generator)
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
        moved = start + product_of(model.split_record.method, (up, down), found, buffers)
        if "magnitude" in found:
            moved = found["magnitude"][:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True)
        weights[path] = moved
    return weights


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
    if method == "lora-ga":
        return stored + SCALE * (p["up"] @ p["down"] - p["start_up"] @ p["start_down"])
    down = buffers["frozen_down"][-p["up"].shape[1] :] if method == "lora-fa" else p["down"]
    return stored + SCALE * p["up"] * p.get("diagonal", 1) @ down


def head_of(run):
    """Tensors that were trained in full."""
    record = json.loads((run / "qsvd_adapter.json").read_text())
    saved = safetensors.torch.load_file(run / "qsvd_adapter.safetensors")
    return {name: saved[name] for name in record["full"]}
