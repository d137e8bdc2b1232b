"""Commands made from options classes: each option is read off the class, with its type, default, help and group.

A class that holds another one (healing inside a run) offers the other's fields as options too, so nothing
is written twice.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeVar

import typer
from pydantic.fields import FieldInfo

from kronfold.base.errors import InputError
from kronfold.options import Options, read

T = TypeVar("T", bound=Options)
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document on stdout and nothing else.", rich_help_panel="Output"),
]
_PLAIN = (str, int, float, bool)


def add_command(
    app: typer.Typer, options: type[T], work: Callable[[T, bool], None], name: str, *, wants_json: bool = True
) -> None:
    """Register `kronfold NAME`: it reads `options` from the command line and calls `work(options, json)`.

    The docstring of `work` is the help. Raises InputError with every fault of the options at once, when it runs.
    """
    fields = list(_fields(options, ()))
    parameters = [_parameter(path, field) for path, field in fields]
    if wants_json:
        parameters.append(inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, annotation=Json, default=False))

    def run(**given: Any) -> None:
        as_json = bool(given.pop("json", False))
        content: dict[str, Any] = {}
        for path, field in fields:
            value = given[path[-1]]
            if value is None or value == () or value == []:
                continue
            if _cli(field)["pairs"]:
                value = named_values(list(value), _names(path, field)[0])
            place = content
            for step in path[:-1]:
                place = place.setdefault(step, {})
            place[path[-1]] = value
        work(read(options, content, "These options"), as_json)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__name__, run.__doc__ = name, work.__doc__
    app.command(name=name)(run)


def _fields(options: type[Options], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """(path, field) of everything the command line offers; arguments first."""
    found = []
    for name, field in options.model_fields.items():
        inner = _options_in(field.annotation)
        if inner is not None:
            found += list(_fields(inner, (*path, name)))
        elif isinstance(field.json_schema_extra, dict) and "cli" in field.json_schema_extra:
            found.append(((*path, name), field))
    yield from sorted(found, key=lambda entry: not _cli(entry[1])["argument"])


def _options_in(annotation: Any) -> type[Options] | None:
    kinds = [annotation, *typing.get_args(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Options)), None)


def _cli(field: FieldInfo) -> dict[str, Any]:
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    return typing.cast("dict[str, Any]", extra["cli"])


def _names(path: tuple[str, ...], field: FieldInfo) -> tuple[str, ...]:
    return tuple(_cli(field)["names"]) or ("--" + path[-1].replace("_", "-"),)


def _parameter(path: tuple[str, ...], field: FieldInfo) -> inspect.Parameter:
    cli, kind = _cli(field), _type(field)
    default = field.get_default(call_default_factory=True) if not field.is_required() else None
    shown = default not in (None, [], (), {}, False, "")
    if cli["argument"]:
        about: Any = typer.Argument(
            metavar=cli["metavar"] or path[-1].upper(), help=field.description, show_default=bool(shown)
        )
    else:
        about = typer.Option(
            *_names(path, field),
            help=field.description,
            metavar=cli["metavar"],
            show_default=bool(shown),
            rich_help_panel=cli["group"],
        )
    optional = not field.is_required() and (default is None or not isinstance(default, _PLAIN))
    annotation = kind | None if optional and not _takes_none(kind) else kind
    return inspect.Parameter(
        path[-1],
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[annotation, about],
        default=inspect.Parameter.empty if field.is_required() else (default if isinstance(default, _PLAIN) else None),
    )


def _type(field: FieldInfo) -> Any:
    """What typer parses: a plain type, or a list of one; what else a class allows is checked by the class."""
    if _cli(field)["pairs"]:
        return list[str]
    kinds = _members(field.annotation)
    lists = [kind for kind in kinds if typing.get_origin(kind) in (list, tuple)]
    if lists:
        inner = next((kind for kind in typing.get_args(lists[0]) if kind in _PLAIN), str)
        return list[inner]  # type: ignore[valid-type]
    plain = [kind for kind in kinds if kind in _PLAIN]
    return plain[0] if len(kinds) == 1 and plain else str


def _members(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    return [annotation]


def _takes_none(kind: Any) -> bool:
    return type(None) in typing.get_args(kind)


def named_values(pairs: list[str], option: str) -> dict[str, Any]:
    """`["hidden=1", "teacher_layers=[0, 2]"]` as a dict; values are read as YAML. Raises InputError for other forms."""
    import yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise InputError(f"{option} {pair!r} must be NAME=VALUE, such as {option} hidden=1.")
        if name in found:
            raise InputError(f"{option} names {name!r} twice; give it once.")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"{option} {pair!r}: {value!r} cannot be read as a number, word or [list].") from error
    return found
