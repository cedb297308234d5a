"""An HTML page from a template: texts are escaped, and no script runs but the page's own."""

from __future__ import annotations

import base64
import hashlib


def render(template: str, script: str | None, **content) -> str:
    """The page. template, script: files of `templates/`, no script for None. content: what the template names.

    Functions among the content are filters.

    Names of files and messages are hostile: jinja2 escapes all, and the page's policy allows no address at all and no
    script but the one whose `digest` it names. The style is that of every page.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("raypipe.pages", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {name: value for name, value in content.items() if callable(value)}
    code, style = (name and loader.get_source(environment, name)[0] for name in (script or "", "report.css"))
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return environment.get_template(template).render(content, script=Markup(code), style=Markup(style), digest=digest)
