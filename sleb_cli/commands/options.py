"""From the fields of a request to the arguments and options of its command."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from sleb_cli.commands.config_file import ConfigOption, drop_overridden
from sleb_cli.requests import Doc, kinds_of, option_of
from sleb_plugins import UsageError
from sleb_plugins.errors import did_you_mean

JsonOption = Annotated[bool, typer.Option("--json", help="Print only the result, as JSON.")]

MAX_RANGE = 4096

_NUMBERS = {
    int: ("a whole number", "Write it in digits."),
    float: ("a number", "Write it in digits."),
}


@dataclass(frozen=True)
class How:
    """What every command with a request can be told about this run."""

    json: JsonOption = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress and notes.")] = False
    config: ConfigOption = None


def options_from(
    request_type: type[Any],
) -> Callable[[Callable[[Any, How], None]], Callable[..., None]]:
    """Let a command take the fields of `request_type` as arguments and options, and hand it the
    request.
    """

    def decorate(run: Callable[[Any, How], None]) -> Callable[..., None]:
        kinds, of_run = get_type_hints(request_type), get_type_hints(How, include_extras=True)
        options = {each.name: _Option(each, kinds[each.name]) for each in fields(request_type)}

        def command(context: typer.Context, **values: Any) -> None:
            drop_overridden(context, values)
            given = {name: option.read(values.pop(name)) for name, option in options.items()}
            run(request_type(**given), How(**values))

        arguments_first = sorted(options.values(), key=lambda option: not option.doc.argument)
        parameters = [_keyword("context", typer.Context, inspect.Parameter.empty)]
        parameters += [option.parameter for option in arguments_first]
        parameters += [_keyword(each.name, of_run[each.name], each.default) for each in fields(How)]
        command.__name__, command.__doc__ = run.__name__, run.__doc__
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


class _Option:
    """A field of a request on the command line."""

    def __init__(self, field: Field[Any], kind: Any) -> None:
        self.field = field
        self.doc: Doc = field.metadata["doc"]
        kinds = kinds_of(kind)
        # What may be text or a number is text on the command line.
        self.kind = str if str in kinds else kinds[0]
        self.item = get_args(self.kind)[0] if get_origin(self.kind) is tuple else None
        self.choices: tuple[str, ...] = (
            get_args(self.kind) if get_origin(self.kind) is Literal else ()
        )
        self.flag = option_of(field.name)

    @property
    def parameter(self) -> inspect.Parameter:
        """The parameter that Typer reads: a list is text with commas, or a repeated option."""
        as_text = self.choices or self.item or self.kind in _NUMBERS
        kind: Any = list[str] if self.doc.repeated else str if as_text else self.kind
        default = (
            inspect.Parameter.empty
            if self.field.default is MISSING
            else None
            if self.item
            else self.field.default
        )
        return _keyword(
            self.field.name,
            Annotated[kind | None if default is None else kind, self._info()],
            default,
        )

    def _info(self) -> Any:
        if self.doc.argument:
            return typer.Argument(metavar=self.doc.metavar, help=self.doc.help, show_default=False)
        shown = self.field.default if self.doc.default is None else self.doc.default
        has_default = not any(shown is each for each in (MISSING, None, False, ()))
        negative = (
            f"/--no-{self.field.name}" if self.kind is bool and self.field.default is None else ""
        )
        return typer.Option(
            self.flag + negative,
            *(["-o"] if self.field.name == "output" else []),
            help=self.doc.help + (f" (default: {shown})" if has_default else ""),
            metavar=self.doc.metavar
            or "|".join(self.choices)
            or (f"<{self.kind.__name__}>" if self.kind in _NUMBERS else None),
            autocompletion=self._complete if self.choices else None,
            show_default=False,
            rich_help_panel=self.doc.panel,
        )

    def _complete(self, incomplete: str) -> list[str]:
        return [choice for choice in self.choices if choice.startswith(incomplete)]

    def read(self, value: Any) -> Any:
        """Return the field's value for what Typer read.

        Raises:
            UsageError: it is not one of the choices, or no number or list of numbers where one is
                needed.
        """
        if value is None:
            return self.field.default
        if self.choices and value not in self.choices:
            raise UsageError(
                f"Unknown value {value!r} for {self.flag}.", hint=did_you_mean(value, self.choices)
            )
        try:
            if self.item:
                parts = value if self.doc.repeated else [part.strip() for part in value.split(",")]
                return (
                    tuple(number for part in parts for number in _range(part))
                    if self.item is int
                    else tuple(parts)
                )
            return self.kind(value) if self.kind in _NUMBERS else value
        except ValueError as error:
            what, hint = _NUMBERS.get(
                self.kind, ("a list of numbers", "Write it like 5,4,9 or 12-15.")
            )
            raise UsageError(f"{self.flag} {value!r} is not {what}.", hint=hint) from error


def _range(text: str) -> Iterable[int]:
    """Return the numbers of 5, or of 12-15 as screens print them."""
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and dash):
        return [int(text)]
    numbers = range(int(first), int(last) + 1)
    # `len` cannot count numbers beyond those of an index.
    if not 0 < numbers.stop - numbers.start <= MAX_RANGE:
        raise ValueError(text)
    return numbers
