"""Measuring models and machines: sizes, memory, speed, quality."""
