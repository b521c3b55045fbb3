"""Turn exceptions into one sentence on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from godwit.cli.stopping import Terminated
from godwit.errors import GodwitError, MemoryBudgetError, UsageError

# Exit codes after a signal, as shells report them: 128 + its number.
INTERRUPTED, BROKEN_PIPE, TERMINATED = 130, 141, 143
INSTRUCTION_SET = "GODWIT_INSTRUCTION_SET"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_NO_MEMORY = "out of memory; close other programs, or use a smaller model, fewer bits or a shorter context"


@contextmanager
def one_sentence(ctx: typer.Context) -> Iterator[None]:
    """Report exceptions in one sentence on stderr and exit with their code; --debug adds the traceback."""
    try:
        _check_instruction_set()
        yield
        sys.stdout.flush()
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt as stop:
        _explain(ctx, f"\ngodwit: {str(stop) or 'interrupted'}")
        raise typer.Exit(TERMINATED if isinstance(stop, Terminated) else INTERRUPTED) from None
    except BrokenPipeError:  # the reader closed the pipe
        drop_output()
        raise typer.Exit(BROKEN_PIPE) from None
    except GodwitError as error:
        _explain(ctx, f"godwit: {error}")
        raise typer.Exit(error.exit_code) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
            drop_output()
            _explain(ctx, f"godwit: cannot write the output ({error.strerror}); free some disk space")
            raise typer.Exit(1) from None
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            _explain(ctx, f"godwit: {_NO_MEMORY}")
            raise typer.Exit(MemoryBudgetError.exit_code) from None
        what = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
        _explain(
            ctx,
            f"godwit: unexpected {what} (run with --debug to see where: godwit --debug {ctx.info_name} ...)",
        )
        raise typer.Exit(1) from None


def _check_instruction_set() -> None:
    """Import the native module early if the environment selects its instruction set.

    Raises:
        UsageError: the instruction set is unknown, or this CPU lacks it.
    """
    if not os.environ.get(INSTRUCTION_SET):
        return
    try:
        from godwit import _native  # noqa: F401
    except ImportError as error:
        if str(error).startswith(INSTRUCTION_SET):
            raise UsageError(str(error)) from None


def drop_output() -> None:
    """Redirect stdout to the null device, since Python flushes it again at exit and would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(ctx: typer.Context, sentence: str) -> None:
    if ctx.obj:
        traceback.print_exc()
    print(sentence, file=sys.stderr)
