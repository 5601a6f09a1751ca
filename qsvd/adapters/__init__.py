"""Floor 7: adapters on quantized weights, their layers, methods and offloaded pages, and the loading of models."""
