"""`--config` and `--save-config`: the options of a command in a YAML file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sleb_cli.atomic import new_file, write_text, writing
from sleb_cli.processes import is_main_process
from sleb_cli.requests import REFINES, TARGET_NAMES
from sleb_plugins import OutputError, SlebError, UsageError
from sleb_plugins.errors import did_you_mean

_OF_A_RUN = {"config", "save_config", "json", "quiet", "help", "force", "resume"}
"""Options that say how a command is run this time, and not what it does."""
_ONE_OF = (TARGET_NAMES, ("heal_minutes", "heal_tokens"), ("every", "remove"))
"""Options of which one is given."""


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Let the values in a file be the defaults of a command's options.

    Raises:
        UsageError: the file cannot be read, or has a key that is no option of the command.
    """
    if path is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", hint="Check --config.") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(f"{path} is not YAML: {reason}.", hint="Write lines like `samples: 16`.") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no options.", hint="Write lines like `samples: 16`.")
    known = _names(context)
    for key in values:
        if str(key).replace("_", "-") not in known:
            raise UsageError(
                f"{path} has {key!r}, which is not an option of `{context.command_path}`.",
                hint=did_you_mean(str(key), list(known), otherwise=f"`{context.command_path} --help` lists them."),
            )
    typed = {known[str(key).replace("_", "-")]: value for key, value in values.items() if value is not None}
    lists = {name for name, parameter in _parameters(context).items() if parameter.multiple}
    context.default_map = {name: _text(value, repeated=name in lists) for name, value in typed.items()}
    return path


def _text(value: Any, *, repeated: bool) -> Any:
    """Return a value as it is typed: a list with commas, unless the option is repeated."""
    if isinstance(value, list):
        texts = [str(item) for item in value]
        return texts if repeated else ",".join(texts)
    text = value if isinstance(value, bool) else str(value)
    return [text] if repeated else text


def _parameters(context: typer.Context) -> dict[str, Any]:
    return {str(parameter.name): parameter for parameter in context.command.params}


def _names(context: typer.Context) -> dict[str, str]:
    """Return the parameters that a file may hold, by the names of their options without dashes."""
    names = {}
    for name, parameter in _parameters(context).items():
        if name not in _OF_A_RUN:
            flags = [flag.lstrip("-") for flag in parameter.opts if flag.startswith("--")]
            names[flags[0] if flags else name.replace("_", "-")] = name
    return names


def drop_outdone(context: typer.Context, values: dict[str, Any]) -> None:
    """Leave out the options of a file that a typed one takes the place of, such as another target."""
    for names in _ONE_OF:
        sources = {name: context.get_parameter_source(name) for name in names if name in values}
        typed = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
        for name in [name for name in sources if typed and name not in typed]:
            for dropped in (name, *(refining for refining, target in REFINES.items() if target == name)):
                source = context.get_parameter_source(dropped)
                if source and source.name == "DEFAULT_MAP":
                    values[dropped] = None


@contextmanager
def saved_typed(context: typer.Context, values: dict[str, Any]) -> Iterator[None]:
    """Write the options that were typed or read from a file, if the user asked for that; undo that on errors.

    Raises:
        OutputError: the file exists, or cannot be written.
    """
    path: Path | None = values["save_config"]
    if path is None or not is_main_process():
        yield
        return
    import yaml

    sources = {name: context.get_parameter_source(name) for name in values}
    given = {
        key: values[name]
        for key, name in _names(context).items()
        if (source := sources.get(name)) is not None
        and source.name in ("COMMANDLINE", "DEFAULT_MAP")
        and values[name] is not None
    }
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    head = f"# {context.command_path} --config {path.name}\n"
    text = head + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    with writing(path, hint="Choose another name with --save-config."):
        before = path.read_bytes() if path.is_file() else None
    may_replace = before is not None and (before == text.encode() or values.get("force"))
    if os.path.lexists(path) and not may_replace:
        raise OutputError(f"{path} already exists.", hint="Choose another name with --save-config, or add --force.")
    write_text(path, text)
    try:
        yield
    except SlebError:
        if before is None:
            path.unlink(missing_ok=True)
        else:
            with new_file(path) as aside:
                aside.write_bytes(before)
        raise


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_read,
        is_eager=True,
        help="Read options from this YAML file; command-line options take precedence.",
    ),
]
SaveConfigOption = Annotated[
    Path | None, typer.Option("--save-config", help="Write the given options to this YAML file, for --config.")
]
