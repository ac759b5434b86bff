"""The options of the commands, made of the fields of their requests.

An option stands in `sleb_cli/requests.py` alone, with its help and default: `--target-memory` is
the field `target_memory` of `SearchRequest`. `options_from(SearchRequest)` gives a command the
signature that Typer reads, and makes a request of what was typed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from sleb_cli.commands.config_file import ConfigOption, drop_overridden
from sleb_cli.requests import MACHINE, OUTPUT, Doc, kinds_of, option_of
from sleb_plugins import UsageError

JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print only the result, as JSON.", rich_help_panel=OUTPUT),
]

MAX_RANGE = 4096


@dataclass(frozen=True)
class How:
    """What every command with a request can be told about this run."""

    json: JsonOption = False
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="Hide progress and notes.", rich_help_panel=OUTPUT),
    ] = False
    config: ConfigOption = None


def options_from(
    request_type: type[Any],
) -> Callable[[Callable[[Any, How], None]], Callable[..., None]]:
    """Let a command take the fields of `request_type` as options, and hand it the request."""
    annotations = get_type_hints(request_type)
    options = [_Option(field, annotations[field.name]) for field in fields(request_type)]

    def decorate(run: Callable[[Any, How], None]) -> Callable[..., None]:
        def command(context: typer.Context, **values: Any) -> None:
            drop_overridden(context, values)
            given = {option.name: option.read(values.pop(option.name)) for option in options}
            run(request_type(**given), How(**values))

        parameters = _signature(options)
        command.__name__ = run.__name__
        command.__doc__ = run.__doc__
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _signature(options: Iterable[_Option]) -> list[inspect.Parameter]:
    """List what Typer passes to a command: context, arguments, options, and the fields of `How`."""
    parameters = [_keyword("context", typer.Context)]
    for option in sorted(options, key=lambda o: (not o.doc.argument, o.doc.panel == MACHINE)):
        parameters.append(option.parameter)
    annotations = get_type_hints(How, include_extras=True)
    for field in fields(How):
        parameters.append(_keyword(field.name, annotations[field.name], field.default))
    return parameters


def _keyword(
    name: str, annotation: Any, default: Any = inspect.Parameter.empty
) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


class _Option:
    """A field of a request on the command line."""

    def __init__(self, field: Field[Any], annotation: Any) -> None:
        self.name = field.name
        self.flag = option_of(field.name)
        self.doc: Doc = field.metadata["doc"]
        self.default = field.default
        kinds = kinds_of(annotation)
        # What may be text or a number is text on the command line.
        kind = str if str in kinds else kinds[0]
        self.is_list = get_origin(kind) is Sequence
        self.kind = get_args(kind)[0] if self.is_list else kind
        self.choices: tuple[str, ...] = get_args(kind) if get_origin(kind) is Literal else ()

    @property
    def parameter(self) -> inspect.Parameter:
        """The parameter that Typer reads.

        Numbers, choices and lists with commas are text to it, since `read` explains them better.
        """
        kind: Any = str
        if self.kind in (bool, Path):
            kind = self.kind
        elif self.doc.repeated:
            kind = list[str]
        default = self.default
        if default is MISSING:
            default = inspect.Parameter.empty
        elif default is None or self.is_list:
            default = None
            kind = kind | None
        info = self._option()
        if self.doc.argument:
            info = typer.Argument(metavar=self.doc.metavar, help=self.doc.help, show_default=False)
        return _keyword(self.name, Annotated[kind, info], default)

    def _option(self) -> Any:
        flag = self.flag
        if self.kind is bool and self.default is None:
            flag += f"/--no-{self.name}"
        names = [flag]
        if self.name == "output":
            names.append("-o")
        shown = self.default if self.doc.default is None else self.doc.default
        text = self.doc.help
        if not (shown is MISSING or shown is None or shown is False or shown == ()):
            text += f" (default: {shown})"
        metavar = self.doc.metavar
        if self.choices:
            metavar = metavar or "|".join(self.choices)
        elif self.kind in (int, float):
            metavar = metavar or f"<{self.kind.__name__}>"
        return typer.Option(
            *names,
            help=text,
            metavar=metavar,
            autocompletion=self._complete if self.choices else None,
            show_default=False,
            rich_help_panel=self.doc.panel,
        )

    def _complete(self, incomplete: str) -> list[str]:
        return [choice for choice in self.choices if choice.startswith(incomplete)]

    def read(self, value: Any) -> Any:
        """Return the field's value for what Typer read.

        Raises:
            UsageError: it is no number or list of numbers where one is needed.
        """
        if value is None:
            return self.default
        if self.doc.repeated:
            return tuple(value)
        parts = [item.strip() for item in value.split(",")] if self.is_list else []
        try:
            if self.is_list and self.kind is int:
                numbers: list[int] = []
                for item in parts:
                    numbers += _range(item)
                return tuple(numbers)
            if self.is_list:
                return tuple(parts)
            return self.kind(value) if self.kind in (int, float) else value
        except ValueError as error:
            what = "a whole number" if self.kind is int else "a number"
            hint = "Write it in digits."
            if self.is_list:
                what = "a list of numbers"
                hint = "Write it like 5,4,9 or 12-15."
            elif self.name == "remove" and value[-1:] == "%":
                hint = f"Search with --ratio {value}, or write a number of blocks."
            raise UsageError(f"{self.flag} {value!r} is not {what}.", hint=hint) from error


def _range(text: str) -> Iterable[int]:
    """Return the numbers of 5, or of 12-15 as screens print them."""
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and dash):
        return [int(text)]
    numbers = range(int(first), int(last) + 1)
    if numbers.stop <= numbers.start:
        raise UsageError(f"The range {text} counts down.", hint=f"Write {last}-{first}.")
    # `len` cannot count numbers beyond an index.
    if numbers.stop - numbers.start > MAX_RANGE:
        raise UsageError(
            f"The range {text} has more than {MAX_RANGE:,} numbers.", hint="Write a shorter one."
        )
    return numbers
