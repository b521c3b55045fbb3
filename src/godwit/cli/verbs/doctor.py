"""`godwit doctor`: its options."""

from __future__ import annotations

from godwit.cli.options import AsJson, verb


@verb("doctor")
def doctor(
    *,
    as_json: AsJson = False,
) -> None:
    """Check this machine and the installation."""
