"""Commands made from options classes: each option is read off the class, with its type, default, help and group.

A class that holds another one (healing inside a run) offers the other's fields as options too, so nothing
is written twice.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer
from pydantic.fields import FieldInfo

from kronfold.base.errors import InputError
from kronfold.options import Options, fields_of, read

T = TypeVar("T", bound=Options)
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document on stdout and nothing else.", rich_help_panel="Output"),
]
_PLAIN = (str, int, float, bool)
GROUPS = ("What", "How", "Training", "Output")


def add_command(app: typer.Typer, options: type[T], work: Callable[[T, bool], None], name: str) -> None:
    """Register `kronfold NAME`: it reads `options` from the command line and calls `work(options, json)`.

    The docstring of `work` is the help. Raises InputError with every fault of the options at once, when it runs.
    """
    offered = sorted(_fields(options), key=lambda entry: (not entry.cli["argument"], GROUPS.index(entry.cli["group"])))
    parameters = [_parameter(entry) for entry in offered]
    parameters.append(inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, annotation=Json, default=False))

    def run(**given: Any) -> None:
        as_json = bool(given.pop("json", False))
        content: dict[str, Any] = {}
        for entry in offered:
            value = given[entry.path[-1]]
            if value is None or value == () or value == []:
                value = entry.default
            elif entry.cli["pairs"]:
                value = named_values(list(value), entry.names[0])
            elif entry.cli["commas"]:
                value = [word.strip() for word in value.split(",") if word.strip()]
            if value is None:
                continue
            place = content
            for step in entry.path[:-1]:
                place = place.setdefault(step, {})
            place[entry.path[-1]] = value
        work(read(options, content, "These options"), as_json)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__name__, run.__doc__ = name, work.__doc__
    app.command(name=name)(run)


@dataclass(frozen=True)
class _Offered:
    """One field that the command line offers.

    `path`: its name, after those of the fields that hold its class. `default`: what it is where nothing is given, None
    where it must be given.
    """

    path: tuple[str, ...]
    field: FieldInfo
    default: Any

    @property
    def cli(self) -> dict[str, Any]:
        extra = self.field.json_schema_extra
        assert isinstance(extra, dict)
        return typing.cast("dict[str, Any]", extra["cli"])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.cli["names"]) or ("--" + self.path[-1].replace("_", "-"),)


def _fields(options: type[Options], path: tuple[str, ...] = (), holder: Options | None = None) -> Iterator[_Offered]:
    """Everything the command line offers. Defaults are those of `holder`, where a class holds one ready made."""
    for name, field in fields_of(options).items():
        required = field.is_required() and holder is None
        default = None if required else getattr(holder, name, field.get_default(call_default_factory=True))
        inner = _options_in(field.annotation)
        if inner is not None:
            yield from _fields(inner, (*path, name), default)
        elif isinstance(field.json_schema_extra, dict) and "cli" in field.json_schema_extra:
            yield _Offered((*path, name), field, default)


def _options_in(annotation: Any) -> type[Options] | None:
    kinds = [annotation, *typing.get_args(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Options)), None)


def _parameter(entry: _Offered) -> inspect.Parameter:
    cli, field, kind, default = entry.cli, entry.field, _type(entry), entry.default
    if cli["commas"] and default:
        default = ",".join(str(word) for word in default)
    if not isinstance(default, _PLAIN):
        default = None  # typer would show `[]`; what stands in the class is put in when the command runs
    shown = default is not None and default is not False
    if cli["argument"]:
        metavar = cli["metavar"] or entry.path[-1].upper()
        about: Any = typer.Argument(metavar=metavar, help=field.description, show_default=shown)
    else:
        about = typer.Option(
            *entry.names,
            help=field.description,
            metavar=cli["metavar"],
            show_default=shown,
            rich_help_panel=cli["group"],
        )
    required = field.is_required() and default is None
    annotation = kind | None if default is None and not required else kind
    return inspect.Parameter(
        entry.path[-1],
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[annotation, about],
        default=inspect.Parameter.empty if required else default,
    )


def _type(entry: _Offered) -> Any:
    """What typer parses: a plain type, or a list of one; what else a class allows is checked by the class."""
    if entry.cli["pairs"]:
        return list[str]
    if entry.cli["commas"]:
        return str
    kinds = _members(entry.field.annotation)
    lists = [kind for kind in kinds if typing.get_origin(kind) in (list, tuple)]
    if lists and typing.get_origin(lists[0]) is tuple and Ellipsis not in typing.get_args(lists[0]):
        return lists[0]
    if lists:
        inner = next((kind for kind in typing.get_args(lists[0]) if kind in _PLAIN), str)
        return list[inner]  # type: ignore[valid-type]
    plain = [kind for kind in kinds if kind in _PLAIN]
    return plain[0] if len(kinds) == 1 and plain else str


def _members(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    return [annotation]


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
