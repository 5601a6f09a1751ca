"""The folder of a run: its records, read without torch."""
