"""Modules on the device: a frozen residual and what is trained beside it."""
