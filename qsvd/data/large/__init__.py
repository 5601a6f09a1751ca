"""Data that outgrow memory: rows read in blocks, tokens kept on disk and mapped."""
