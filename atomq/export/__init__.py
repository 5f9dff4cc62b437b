"""Checkpoints in the formats of other tools."""
