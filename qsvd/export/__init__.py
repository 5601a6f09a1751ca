"""Floor 6: a quantized model or a run in the form that other tools load."""
