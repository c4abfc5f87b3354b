"""HTML pages that need no other file."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """Render a template of this package; all values are escaped."""
    environment = Environment(
        loader=PackageLoader("etpo.studies", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    # `tojson` sorts keys by default
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.get_template(template).render(**values)
