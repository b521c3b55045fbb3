"""Quantisation to packed files, and random models for benchmarks."""
