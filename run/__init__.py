"""A run: its flags, logged history, checkpoints, folder and provenance."""
