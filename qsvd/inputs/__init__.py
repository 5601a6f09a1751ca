"""Floor 0: what a user names: paths, Hub ids, and what transformers reads of a folder."""
