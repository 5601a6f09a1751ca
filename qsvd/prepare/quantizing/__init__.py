"""Parts of the preparation of `qsvd quantize`."""
