"""Facts as one HTML file that needs neither a network nor anything beside it.

All text of a run is escaped: in the page by the template, in the data as JSON, in figures by ``figures.js``.
The page's own policy lets no other script run and no request leave.
"""

from __future__ import annotations

import json
import os
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from taskmoe.train.track.facts import Facts
from taskmoe.train.track.report.learning import scores
from taskmoe.train.track.report.payload import payload
from taskmoe.train.track.routing import similarity
from taskmoe.train.track.verdicts import verdicts

HERE = Path(__file__).parent
SCRIPTS = ("data.js", "figures.js", "table.js", "page.js")  # in the order in which they run


def write_report(facts: Facts, path: str | Path) -> None:
    """Write the report of a run, a checkpoint or an adapter; a file that was there is replaced as a whole.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(render(facts), encoding="utf-8")
    os.replace(fresh, path)


def render(facts: Facts) -> str:
    """The page as text."""
    known = similarity(facts.snapshot)
    data = payload(facts, known)
    scripts = [get_plotlyjs(), "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)]
    loader = FileSystemLoader(HERE)
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return pages.get_template("report.html.j2").render(
        title=_title(facts),
        about=_about(facts, data),
        verdicts=verdicts(facts.snapshot, facts.tasks, facts.first, facts.conflict, known),
        level=facts.snapshot.level,
        settings=yaml.safe_dump(facts.config, sort_keys=False, allow_unicode=True),
        missing=data["missing"],
        data=Markup(_json(data)),
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
    )


def _json(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _policy(scripts: list[str]) -> str:
    """Only these scripts run; pictures are drawn in the page; nothing is fetched."""
    hashes = " ".join(f"'sha256-{b64encode(sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"


def _title(facts: Facts) -> str:
    folder = facts.source.resolve()
    name = facts.config.get("run_name") or (folder.parent if facts.kind == "checkpoint" else folder).name
    return f"{name}, step {facts.step:,}" if facts.step is not None else str(name)


def _about(facts: Facts, data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was looked at: (word, value)."""
    config, moe = facts.config, facts.config.get("moe") or {}
    base = config.get("model_name_or_path") or (config.get("model") or {}).get("type")
    method = " · ".join(str(moe[seam]) for seam in ("bank", "router", "gate") if moe.get(seam))
    groups = len({task.group for task in facts.tasks if task.group is not None})
    routing = data["routing"]["groups"] if data["routing"] else []
    experts = sorted({group["experts"] for group in routing})
    heads = max((group["heads"] for group in routing), default=1)
    found = {
        "tasks": f"{len(facts.tasks):,}" + (f" in {groups:,} given groups" if groups else ""),
        "routed layers": f"{len(routing):,}" if routing else "",
        "experts in each": "–".join(str(n) for n in dict.fromkeys((*experts[:1], *experts[-1:]))),
        "heads": f"{heads}" if heads > 1 else "",
        "method": method,
        "base model": str(base or ""),
        "score": ", ".join(f"{value:.3f} ({arm})" for arm, value in scores(facts).items()),
    }
    return [(word, value) for word, value in found.items() if value]
