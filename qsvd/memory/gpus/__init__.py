"""Training on several GPUs: what each one holds, and the time of a step."""
