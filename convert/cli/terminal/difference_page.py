"""What a fine-tune changed of its base, for people: a part a row, then a layer a row."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from dgq.convert.cli.terminal.console import err, out


def difference_page(content: dict[str, Any]) -> None:
    """content: what Difference.to_json() returns."""
    rows, changed = content["by_part"], content["changed"]
    weights = sum(row["weights"] for row in rows.values())
    out.print(f"{len(changed)} of {weights} weights differ from {content['base']}", style="bold")
    table = Table("part", box=None, pad_edge=False)
    for heading in ("weights", "changed", "relative change"):
        table.add_column(heading, justify="right")
    table.add_column("layers")
    for part, row in rows.items():
        relative = f"{row['relative']:.2e}" if row["changed"] else "–"
        table.add_row(part, str(row["weights"]), str(row["changed"]), relative, ranges(row["layers"]) or "–")
    out.print(table)
    if changed:
        out.print(_by_layer(changed))
    for key, what in (
        ("reshaped", "of another shape than the base's"),
        ("only_here", "that the base lacks"),
        ("only_there", "of the base are not there"),
    ):
        if names := content[key]:
            out.print(f"{len(names)} weights {what}: {names[0]}{', …' if len(names) > 1 else ''}")
    for line in content["warnings"]:
        err.print(f"warning: {line}", style="bold yellow")


def _by_layer(changed: dict[str, dict[str, Any]]) -> Table:
    """Names of the changed weights below their layer, with the relative change of each."""
    layers: dict[int | None, list[str]] = {}
    for name, one in changed.items():
        below = name.partition(f".layers.{one['layer']}.")[2] or name
        side = "encoder " if name.startswith("model.encoder.language_model.") else ""
        experts = f" ({one['experts']} experts)" if one["experts"] else ""
        entry = f"{side}{below.removesuffix('.weight')} {one['relative']:.1e}{experts}"
        layers.setdefault(one["layer"], []).append(entry)
    table = Table("layer", "weights that changed, relative change", box=None, pad_edge=False)
    for layer in sorted(layers, key=lambda layer: -1 if layer is None else layer):
        table.add_row("–" if layer is None else str(layer), ", ".join(layers[layer]))
    return table


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as 0-3, 7."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
