"""Settings: one class for each job, the same in YAML, on the command line and in Python. No torch.

A class lists its fields once, each with its default, its range and a sentence of help. YAML and the command line read
it through `read`; Python calls it. Both name every fault at once, with the nearest names for what is unknown.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from kronfold.base.errors import InputError, suggest

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _NamesFaults(ModelMetaclass):
    """Makes `Options(...)` raise InputError. Classes inside other ones are built without this call, so that all faults
    of the whole are found."""

    def __call__(cls: type[Options], *args: Any, **given: Any) -> Any:  # type: ignore[misc]
        try:
            return type.__call__(cls, *args, **given)
        except ValidationError as error:
            raise cls.error(faults_of(cls, error, cls.__name__)) from error


class Options(BaseModel, metaclass=_NamesFaults):
    """Base of all settings: unknown names are refused, and nothing changes once it is made.

    Raises:
        InputError: every value that cannot be used, in one message.
    """

    error: ClassVar[type[InputError]] = InputError  # of what cannot be used

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _paths_are_words(cls, given: Any) -> Any:
        def word(value: Any) -> Any:
            return os.fspath(value) if isinstance(value, os.PathLike) else value

        if not isinstance(given, Mapping):
            return given
        return {
            name: [word(one) for one in value] if isinstance(value, list | tuple) else word(value)
            for name, value in given.items()
        }


T = TypeVar("T", bound=Options)


def option(
    default: Any = ...,
    help: str = "",
    *,
    group: str = "What",
    names: tuple[str, ...] = (),
    metavar: str | None = None,
    argument: bool = False,
    pairs: bool = False,
    commas: bool = False,
    **limits: Any,
) -> Any:
    """A field of a job's options, with what the command line has to know beside its help.

    Args:
        default: `...` where it must be given; a function (`list`, a class) makes a fresh one.
        group: the heading in `--help`: What, How, Training, Output.
        names: how the option is written, where that is not `--` and the field's name.
        metavar: what stands for the value in `--help`. argument: it stands without a name, in the order of the fields.
        pairs: a mapping, written NAME=VALUE and repeated. commas: a list, written as one word with commas.
        limits: as pydantic's Field takes them (`ge`, `gt`, `le`, ...).
    """
    cli: dict[str, Any] = {"group": group, "names": names, "metavar": metavar, "argument": argument}
    cli |= {"pairs": pairs, "commas": commas}
    made = {"default_factory": default} if callable(default) else {"default": default}
    return Field(description=help, json_schema_extra={"cli": cli}, **made, **limits)


def fields_of(options: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields by name: those of the class before those of the classes that it is made of."""
    own = [name for cls in options.__mro__ for name in inspect.get_annotations(cls) if name in options.model_fields]
    return {name: options.model_fields[name] for name in own}


def read(model: type[T], given: Any, label: str) -> T:
    """`model` from a mapping, as a file or the command line gives it.

    Args:
        label: what the mapping is, the first words of an error: "Recipe mine.yaml", "These options".

    Raises:
        model.error: what is given is no mapping, or every fault in it.
    """
    if not isinstance(given, dict):
        raise model.error(f"{label} must be a mapping with the keys {', '.join(model.model_fields)}.")
    try:
        return model.model_validate(given)
    except ValidationError as found:
        raise model.error(faults_of(model, found, label)) from found


def faults_of(model: type[BaseModel], error: ValidationError, label: str) -> str:
    """One message of all faults, a line each: where, what is wrong, what was given."""
    lines = []
    for entry in error.errors():
        # the parts that name a class say which member of a union was tried
        location = [part for part in entry["loc"] if not (isinstance(part, str) and part[:1].isupper())]
        where = ".".join(str(part) for part in location)
        if entry["type"] == "extra_forbidden":
            names = _fields_at(model, location[:-1])
            lines.append(f"{where}: unknown key. {suggest(str(location[-1]), names, limit=24)}")
            continue
        given = "" if isinstance(entry["input"], dict | list) else f" (given: {entry['input']!r})"
        said = entry["msg"].removeprefix("Value error, ") + given
        lines.append(f"{where}: {said}" if where else said)
    verb = "have" if label.startswith("These ") else "has"
    return f"{label} {verb} {len(lines)} fault{'s' * (len(lines) > 1)}:\n  " + "\n  ".join(lines)


def _fields_at(model: type[BaseModel], location: list[Any]) -> list[str]:
    """Field names of the nested class at a location such as ('stages', 0, 'heal')."""

    def types_in(annotation: Any) -> list[Any]:
        inner = getattr(annotation, "__args__", ())
        return [annotation, *(found for part in inner for found in types_in(part))]

    for step in (part for part in location if isinstance(part, str)):
        annotation = model.model_fields[step].annotation if step in model.model_fields else None
        nested = [found for found in types_in(annotation) if isinstance(found, type) and issubclass(found, BaseModel)]
        if nested:
            model = nested[0]
    return list(model.model_fields)
