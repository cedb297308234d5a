"""`raypipe methods`: what there is and what it needs."""

from __future__ import annotations

import json
import sys


def _methods(argv: list[str]) -> int:
    from raypipe import segmenters
    from raypipe.cli.verbs import _config, _parse

    terminal = _parse("raypipe methods", "What there is and what it needs.", [], argv, _config(argv))[0]
    rows = [_method_row(segmenters.find(name)) for name in segmenters.names()]
    if terminal.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        print(f"{row['name']:<12}{row['summary']}")
        for name in ("needs", "licence", "source"):
            print(f"{'':<12}{name:<9}{row[name]}")
    return 0


def _method_row(kind: type) -> dict:
    method, module = kind(), sys.modules[kind.__module__]
    needs = [method.needs] if method.needs else []
    if hasattr(method, "foreground"):
        needs.append(f"a foreground (default {method.foreground})")
    if method.gpus:
        needs.append("a GPU is used where there is one")
    return {
        "name": method.name,
        "summary": (module.__doc__ or "").strip().splitlines()[0],
        "needs": "; ".join(needs) or "nothing",
        "licence": method.licence,
        "source": method.source,
    }
