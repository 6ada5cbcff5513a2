"""One run: its folder, its checkpoints, and how it ends."""
