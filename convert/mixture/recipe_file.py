"""The recipe that `dgq mix` makes, and the file that it writes.

# Made by dgq mix for …            what was measured, in comments
name = "mixed", format = …         the recipe's head
[[rule]] match, scheme             a rule for each kind of matrix, with exceptions by name before it
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, Literal

from dgq.convert.plans.formats import mixed_format
from dgq.convert.plans.recipe import Recipe, Rule
from dgq.quant.errors import printable
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Scheme

Target = Literal["gguf", "nvfp4", "bnb4"]  # the format of the artifact
BF16 = "bf16"


def recipe(to: Target, schemes: dict[str, Scheme]) -> Recipe:
    """The recipe that gives these weights (canonical names) these schemes, and leaves the rest as it is."""
    form = mixed_format(to)
    named = {form.artifact_name(name): scheme.name for name, scheme in schemes.items()}
    rules = [Rule(match="*", scheme=form.plain, max_dims=1), Rule(match=form.router, scheme=form.plain)]
    kinds: dict[str, dict[str, str]] = {}
    for name, scheme in named.items():
        kinds.setdefault(_pattern(name), {})[name] = scheme
    for pattern, several in kinds.items():
        usual = Counter(several.values()).most_common(1)[0][0]
        rules += [Rule(match=name, scheme=scheme) for name, scheme in several.items() if scheme != usual]
        rules.append(Rule(match=pattern, scheme=usual))
    rules.append(Rule(match="*", scheme=BF16))
    most = Counter(named.values()).most_common(1)[0][0]
    return Recipe(
        name="mixed", format=to, layout=form.variant, label="mixed",
        description="mixed by measured loss", file_type=form.file_type(SCHEMES[most]), max_16bit_share=1,
        rule=tuple(rules),
    )  # fmt: skip


def _pattern(name: str) -> str:
    """The shell pattern of the same weight in any layer."""
    return re.sub(r"^(blk|.*\.layers)\.\d+\.", r"\1.*.", name)


def recipe_text(mixed: Recipe, about: dict[str, Any]) -> str:
    """The content of the recipe's file: what was measured in comments, then the rules. about: what mix() returns."""
    kl, stock = about["kl"], about["default"]
    beside = f"; {stock['recipe']}: {stock['bytes']:,} bytes, {stock['kl']:.3g}" if stock else ""
    lines = [
        f"# Made by dgq mix for {about['budget']:,} bytes: {about['bytes']:,} bytes of tensors.",
        f"# KL(BF16 || it), nats a position: {kl['predicted']:.3g} as the sum of its parts', {kl['measured']:.3g}"
        f" measured{beside}.",
        f"# On {about['tokens']:,} tokens of {printable(about['data']['name'])} ({about['data']['sha256'][:12]}), seed"
        f" {about['seed']}. Each part alone in each scheme, bytes and KL; * is what was chosen:",
    ]  # fmt: skip
    for part in about["parts"]:
        each = [f"{'*' if o['scheme'] == part['chosen'] else ''}{o['scheme']} {o['bytes']:,} {o['kl']:.2e}"
                for o in part["options"]]  # fmt: skip
        lines.append(f"#   {part['part']}: {', '.join(each)}")
    lines.append("")
    for key in ("name", "format", "layout", "label", "description", "file_type", "max_16bit_share"):
        if value := getattr(mixed, key):
            lines.append(f"{key} = {json.dumps(value)}")
    for rule in mixed.rule:
        lines += ["", "[[rule]]", *([f"max_dims = {rule.max_dims}"] if rule.max_dims else [])]
        lines += [f"match = {json.dumps(rule.match)}", f"scheme = {json.dumps(rule.scheme)}"]
    return "\n".join(lines) + "\n"
