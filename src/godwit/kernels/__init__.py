"""Kernels: models call :mod:`~godwit.kernels.ops`; :mod:`~godwit.kernels.reference` defines the results."""
