"""OUT, a quantized model."""
