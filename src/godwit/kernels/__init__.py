"""Arithmetic: :mod:`~godwit.kernels.ops` is the surface, :mod:`~godwit.kernels.reference` the specification."""
