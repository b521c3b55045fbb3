"""Arithmetic: :mod:`~godwit.kernels.ops` is its surface, :mod:`~godwit.kernels.reference` defines it."""
