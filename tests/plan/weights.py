"""Small made-up models: names, shapes and layers, without a config."""

from qsvd.plan.weights import WeightSpec

SHAPES = {"q_proj": (32, 32), "k_proj": (16, 32), "down_proj": (32, 80)}


def specs(layers=2):
    """Three weights a layer."""
    roles = {"q_proj": "q", "k_proj": "k", "down_proj": "down"}
    return [
        WeightSpec(f"layers.{layer}.{name}.weight", f"layers.{layer}.{name}", shape, roles[name], layer)
        for layer in range(layers)
        for name, shape in SHAPES.items()
    ]
