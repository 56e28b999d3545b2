"""What options name is looked for before anything slow is imported or begun."""

from __future__ import annotations

from pathlib import Path

from tpa_convert.errors import UserError
from tpa_convert.options.declaration import Section, what_it_reads
from tpa_convert.options.shares import split_share
from tpa_convert.places.models import check_converted, check_model
from tpa_convert.places.texts import local_files


def check_named(section: Section) -> None:
    """Refuses values that name what is not there, of the fields that say what they read, also in
    sections inside of this one.

    Whether a dataset is on the Hub is not asked, since that takes as long as reading it.

    Raises:
        UserError: no such path, or no such model on the Hub.
    """
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            check_named(value)
            continue
        reads = what_it_reads(field)
        if reads is None or value is None:
            continue
        for spec in map(str, value if isinstance(value, tuple) else (value,)):
            if reads == "model":
                check_model(spec, getattr(section, "revision", None))
            elif reads == "converted":
                check_converted(spec)
            elif reads == "text":
                local_files(split_share(spec)[0])
            else:
                _check_file(spec, name)


def _check_file(spec: str, name: str) -> None:
    path = Path(spec).expanduser()
    if not path.exists():
        raise UserError(f"`{name}`: no such file: {spec} (check the path)")
    if path.is_dir():
        raise UserError(f"`{name}`: {spec} is a directory: name a file")
