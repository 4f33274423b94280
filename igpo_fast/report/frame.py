"""What pages that stand alone share: a template whose values are escaped, and a policy that lets in nothing else."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template


def template(folder: Path) -> Template:
    """``page.html`` of a folder; every value is escaped but ``markupsafe.Markup``."""
    loader = FileSystemLoader(folder)
    settings = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return Environment(loader=loader, autoescape=True, **settings).get_template("page.html")


def policy(live: bool = False, **own: str) -> str:
    """A Content-Security-Policy: the page's own texts by their digests, and nothing from anywhere else.

    Args:
        live: the page may ask the server that it came from.
        own: ``style`` and ``script``.
    """
    allowed = ["default-src 'none'", "base-uri 'none'", "form-action 'none'"]
    for kind, text in own.items():
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allowed.append(f"{kind}-src 'sha256-{digest}'")
    return "; ".join(allowed + ["connect-src 'self'"] * live)
