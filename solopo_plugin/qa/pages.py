"""Write HTML pages that need nothing but themselves: style, script, pictures and data stand in the file.

A page is a template of its room, beside a style sheet and a script of the same name, that extends `page.html.j2` here.
Jinja escapes what is filled in, the scripts only ever set `textContent`, and the page's policy lets nothing be loaded:
whatever stands in data or is said by a model is shown as text, never run.
"""

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

_ROOMS = Path(__file__).parents[1]


def render(name: str, **values: object) -> str:
    """Fill in a page's template.

    Args:
        name: Path of the template within this package, without `.html.j2`; `name`.css and `name`.js are its own.
        values: `title`, `rows` (the JSON that the script reads) and what the template itself asks for.

    Raises:
        jinja2.UndefinedError: The template asks for a value that is not given.
    """
    return _templates.get_template(f"{name}.html.j2").render(name=name, **values)


def png(figure: Figure) -> bytes:
    """Draw a figure as a PNG, the same bytes each time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _source(path: str) -> str:
    """Return a style sheet or a script of this package."""
    return (_ROOMS / path).read_text(encoding="utf-8")


def _data_uri(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


_templates = Environment(
    loader=FileSystemLoader(_ROOMS), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_templates.globals["source"] = _source
_templates.filters["data_uri"] = _data_uri
_templates.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # of `tojson`, which escapes `<`, `>`, `&` and `'`
