"""Errors a user can meet. Each carries one sentence: what is wrong and what to do about it."""

from __future__ import annotations


class GodwitError(Exception):
    """Base of every error that is the user's to solve; the message is shown without a traceback."""

    exit_code = 1


class UsageError(GodwitError):
    """An argument or request that cannot be honoured as given."""

    exit_code = 2


class CheckpointError(GodwitError):
    """A checkpoint that is missing, damaged, hostile or incomplete."""

    exit_code = 3


class UnsupportedModelError(GodwitError):
    """A model type, layer kind or quantisation that Godwit does not run."""

    exit_code = 4


class MemoryBudgetError(GodwitError):
    """A request that does not fit the memory at hand."""

    exit_code = 5


class OfflineError(GodwitError):
    """Something has to be fetched and cannot be reached."""

    exit_code = 6


class TemplateError(GodwitError):
    """A chat template that is missing, broken or exceeds its limits."""

    exit_code = 7


class KernelParityError(GodwitError):
    """The results of the native kernels differ from the reference."""

    exit_code = 8


class BusyError(GodwitError):
    """What the machine has no room for at the moment; the same request may do later."""

    exit_code = 9
