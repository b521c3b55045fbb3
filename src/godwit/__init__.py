"""Godwit: run and train small language models on the machine you have."""

__version__ = "0.1.0"
