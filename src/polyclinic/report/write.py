"""From a results folder to ``report.html``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polyclinic.errors import RunError
from polyclinic.files import whole_file
from polyclinic.report.folder import Comparison, Run


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into the folder of a finished run or comparison, from the files there alone.

    Args:
        run_folder: Holds ``metrics.json``; a comparison also ``runs/``.

    Returns:
        The path of the report.

    Raises:
        RunError: A file is missing, damaged, or of another study; or the report cannot be written.
    """
    from polyclinic.report.comparison_page import comparison_context
    from polyclinic.report.run_page import run_context

    if (run_folder / "runs").is_dir():
        html = render("comparison.html", comparison_context(Comparison.read(run_folder)))
    else:
        html = render("run.html", run_context(Run.read(run_folder)))
    path = run_folder / "report.html"
    try:
        with whole_file(path) as file:
            file.write(html.encode())
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def render(template: str, context: dict[str, Any]) -> str:
    """Fill one of the templates of this package; everything but our own SVG and style is escaped."""
    import jinja2
    from markupsafe import Markup

    from polyclinic.report.format import FILTERS

    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    own = {
        "style": Markup((folder / "report.css").read_text(encoding="utf-8")),
        "script": Markup((folder / "report.js").read_text(encoding="utf-8")),
    }
    return environment.get_template(template).render(**own, **context)
