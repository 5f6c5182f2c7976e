"""Names that come from outside: references to images, and sites."""

from __future__ import annotations

from pathlib import PurePosixPath

from pydantic import TypeAdapter, ValidationError

from polyclinic.errors import DataError
from polyclinic.study import SiteName

_SITE_NAME: TypeAdapter[str] = TypeAdapter(SiteName)


def check_reference(reference: str, where: str) -> None:
    """Refuse a reference that could leave its source: absolute, with ``..``, a drive letter or a backslash.

    Raises:
        DataError: Quotes the reference.
    """
    parts = PurePosixPath(reference).parts
    if "\\" in reference or "\0" in reference:
        raise DataError(f"{where}: {reference!r} has a backslash or a null character. Separate folders by '/'.")
    if not parts or reference.startswith("/") or ".." in parts or parts[0].endswith(":"):
        raise DataError(f"{where}: {reference!r} leaves the folder of the images. Give a path below it, without '..'.")


def check_site_name(name: str, where: str) -> None:
    """Refuse a site name that could be anything but a plain name of a file.

    Raises:
        DataError: Quotes the name and the rule.
    """
    try:
        _SITE_NAME.validate_python(name)
    except ValidationError as error:
        raise DataError(
            f"{where}: site {name!r} is not a valid name. Use up to 64 letters, digits, '_', '.', '-', the first a "
            "letter or a digit."
        ) from error
