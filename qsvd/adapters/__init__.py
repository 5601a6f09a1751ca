"""Floor 7: modules of a loaded model: the frozen residual and the adapter that is trained."""
