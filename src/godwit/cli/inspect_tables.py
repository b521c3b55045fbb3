"""The report of `godwit inspect` as text: tables that fit 60 columns, a verdict and what to do next."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from godwit.cli.tables import Tables, size_text
from godwit.models.inventory import PARTS


def show(report: dict[str, Any]) -> None:
    """Print the report of :func:`godwit.cli.inspect.examine` as tables."""
    console = Tables()
    for table in (_about(report), _parts(report)):
        console.print(table)
    console.print(_cache_text(report["cache"]))
    console.print(_memory(report))
    lines = (_machine_text(report), _verdict(report), *_packed_texts(report), _advice(report))
    console.print(*lines, sep="\n", markup=False)


def _about(report: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    layers, attention, delta = report["layers"], report["attention"], report["delta"]
    rows = [
        ("model", escape(report["model"])),
        ("family", f"{report['family']} ({report['model_type']})"),
        ("layers", _layers_text(layers)),
        ("hidden, vocabulary", f"{report['hidden_size']:,}, {report['vocab_size']:,}"),
        ("longest context", f"{report['max_context']:,} tokens"),
    ]
    if attention:
        text = f"{attention['heads']} query and {attention['kv_heads']} key/value heads"
        rows.append(("attention", f"{text} of {attention['head_dim']}"))
    if delta:
        text = f"{delta['key_heads']} key heads of {delta['key_dim']}, "
        rows.append(("delta", text + f"{delta['value_heads']} value heads of {delta['value_dim']}"))
    if report["experts"]:
        rows.append(("experts", f"{report['experts']} per layer, {report['experts_per_token']} per token"))
    rows += _weight_rows(report)
    for row in rows:
        table.add_row(*row)
    return table


def _layers_text(layers: dict[str, Any]) -> str:
    kinds = [f"{layers[kind]} {kind}" for kind in ("delta", "attention") if layers[kind]]
    ffns = [f"{layers[kind]} {kind}" for kind in ("sparse", "dense") if layers[kind]]
    mtp = ", and 1 for multi-token prediction" if layers["mtp"] else ""
    return f"{layers['total']}: {' + '.join(kinds)}; feed-forward {' + '.join(ffns)}{mtp}"


def _weight_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    weights = report["weights"]
    if weights is None:
        return [("weights", "none, only the config")]
    held = weights["dtypes"].items()
    kinds = ", ".join(f"{kind} {size_text(part['bytes'])} in {part['tensors']:,}" for kind, part in held)
    rows = [("weights", f"{size_text(weights['bytes'])} in {weights['tensors']:,} tensors ({kinds})")]
    if weights["beside_the_text_model"]:
        rows.append(("", f"{weights['beside_the_text_model']:,} of them are not part of the text model"))
    verdict = "do not match the config (see below)" if weights["problem"] else "match the config"
    rows.append(("names and shapes", verdict))
    packed = report.get("packed")
    if packed:
        metadata = packed["metadata"].items()
        rows += [(name, escape(text)) for name, text in metadata if name in ("recipe", "source")]
        rows.append(("files inside", ", ".join(packed["files"]) or "none"))
    if "stored" in report:
        rows += _gguf_rows(report)
    return rows


def _gguf_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What a GGUF file says of itself, and of its tokenizer."""
    metadata, tokenizer = report["stored"]["metadata"], report["tokenizer"]
    named = {"name": "general.name", "licence": "general.license"}
    rows = [(title, escape(metadata[key])) for title, key in named.items() if key in metadata]
    template = "with a chat template" if tokenizer["chat_template"] else "without a chat template"
    text = template if tokenizer["present"] else tokenizer["problem"] or "none, so it cannot chat"
    return [*rows, ("tokenizer", escape(text))]


def _parts(report: dict[str, Any]) -> Table:
    """Parameters by part; for packed files bytes and bits instead of the parameters read per token."""
    parameters = report["parameters"]
    packed = (report.get("packed") or report.get("stored") or {}).get("parts", {})
    typed = "stored" in report
    table = Table(box=box.SIMPLE, show_footer=True, padding=(0, 1), pad_edge=False)
    table.add_column("parameters", "total", overflow="fold")
    table.add_column("total", f"{parameters['total']:,}", justify="right", no_wrap=True)
    if packed:
        stored = sum(part["bytes"] for part in packed.values())
        table.add_column("size", size_text(stored), justify="right", no_wrap=True)
        table.add_column("bits", f"{8 * stored / parameters['total']:.2f}", justify="right", no_wrap=True)
    else:
        table.add_column("read per token", f"{parameters['active']:,}", justify="right", no_wrap=True)
    if typed:
        table.add_column("types", overflow="fold")
    for name, part in parameters["parts"].items():
        if not (part["total"] or part["active"]):
            continue
        own = packed.get(name)
        if own:
            more = [size_text(own["bytes"]), f"{own['bits']:.2f}", *_types(own)]
        else:
            more = ["", ""] if packed else [f"{part['active']:,}" if part["active"] else ""]
        table.add_row(PARTS[name], f"{part['total']:,}", *more)
    if parameters["mtp_if_present"]:
        table.add_row("(prediction module, if any)", f"({parameters['mtp_if_present']:,})", "")
    return table


def _types(part: dict[str, Any]) -> list[str]:
    """The stored types of a part, those of the most bytes first."""
    held = part.get("types")
    return [", ".join(sorted(held, key=lambda kind: -held[kind]))] if held else []


def _memory(report: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False)
    for title in ("context", "cache", "with weights", "read per token", "fits"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in report["contexts"]:
        fits = {None: "?", True: "yes", False: "no"}[row["fits"]]
        sizes = (size_text(row[name]) for name in ("cache", "resident", "read_per_token"))
        table.add_row(f"{row['tokens']:,}", *sizes, fits)
    return table


def _cache_text(cache: dict[str, int]) -> str:
    mtp = cache["mtp_kv_per_token"] or cache["mtp_kv_per_token_if_present"]
    more = f" (+ {mtp:,} with the prediction module)" if mtp else ""
    text = f"A sequence takes {cache['kv_per_token']:,} bytes per token{more}"
    if cache["state"]:
        text += f", plus {cache['state']:,} of state and {cache['conv']:,} of convolution"
    return text + "."


def _machine_text(report: dict[str, Any]) -> str:
    total, free = report["memory"]["total"], report["memory"]["available"]
    if total is None:
        return "The memory of this machine is unknown."
    now = "" if free is None else f", of which {size_text(free)} are free now"
    return f"This machine has {size_text(total)} of memory{now} (1 GB is 10^9 bytes)."


def _verdict(report: dict[str, Any]) -> str:
    longest, most = report["longest_context"], report["max_context"]
    weights = _weights_text(report)
    if longest is None:
        return f"It is unknown whether {weights} fit."
    if report["spare_without_context"] < 0:
        return f"With {weights} the model is {size_text(-report['spare_without_context'])} too large."
    share = "all" if longest == most else f"{longest:,}"
    return f"With {weights}, {share} of {most:,} tokens of context fit."


def _weights_text(report: dict[str, Any]) -> str:
    if "packed" in report:
        return "packed weights"
    if "stored" in report:
        return f"weights as they are loaded ({size_text(report['resident_packed'])})"
    return "weights in bfloat16"


def _packed_texts(report: dict[str, Any]) -> list[str]:
    return [
        _packed_text(name, packed, report["max_context"])
        for name, packed in report.get("if_packed", {}).items()
    ]


def _packed_text(recipe: str, packed: dict[str, Any], most: int) -> str:
    spare, longest = packed["spare_without_context"], packed["longest_context"]
    text = f"Packed as {recipe} it takes {size_text(packed['resident'])}"
    if longest is None:
        return f"{text}."
    if spare < 0:
        return f"{text}, {size_text(-spare)} too large."
    return f"{text}; {'all' if longest == most else f'{longest:,}'} of {most:,} tokens of context fit."


def _advice(report: dict[str, Any]) -> str:
    """What to do next, depending on whether the model fits as it is, packed, or not at all."""
    model, weights = report["model"], report["weights"]
    if weights and weights["problem"]:
        return "To do: fetch the checkpoint again; its weights do not match its config."
    name = "" if model == "built-in" else f" {model}" if weights else " DIRECTORY"
    first = "" if weights else "fetch the weights, then "
    sizes = report.get("if_packed", {})
    recipe = next((recipe for recipe, packed in sizes.items() if packed["longest_context"]), None)
    if report["longest_context"] is None:
        return f"To do: {first}try it with godwit chat{name}."
    if report["longest_context"]:
        return f"To do: {first}{_start(report, name)}"
    if recipe:
        command = f"godwit quantize{name or ' built-in'} OUT.godwit --recipe {recipe}"
        return f"To do: {first}pack it with {command}, then godwit chat OUT.godwit."
    least = min([report["contexts"][0]["resident"], *(packed["resident"] for packed in sizes.values())])
    return f"To do: use a machine with more than {size_text(least)} of memory, or a smaller model."


def _start(report: dict[str, Any], name: str) -> str:
    longest, most = report["longest_context"], report["max_context"]
    limit = "" if longest == most else f" --context {longest}"
    if report["fits_now"] is False:
        return f"free some memory that other programs use, then run godwit chat{name}{limit}."
    return f"chat with it using godwit chat{name}{limit}, or serve it with godwit serve{name}{limit}."
