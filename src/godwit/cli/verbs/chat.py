"""`godwit chat`: its options."""

from __future__ import annotations

from godwit.cli.options import (
    Context,
    Dtype,
    Model,
    Quantize,
    SamplingOptions,
    Speculate,
    System,
    ThinkingOptions,
    Threads,
    Tools,
    verb,
)


@verb("chat")
def chat(
    *,
    model: Model = None,
    system: System = None,
    tools: Tools = None,
    sampling: SamplingOptions,
    thinking: ThinkingOptions,
    context: Context = None,
    speculate: Speculate = True,
    threads: Threads = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Chat with a model in the terminal."""
