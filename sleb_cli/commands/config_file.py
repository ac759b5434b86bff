"""`--config`: the options of a command from a YAML file, or of a search from its plan."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sleb_cli.requests import OUTPUT, TARGET_NAMES
from sleb_plugins import UsageError
from sleb_plugins.errors import did_you_mean

_OF_A_RUN = {"config", "json", "quiet", "help", "force", "resume"}
"""Options that say how a command is run this time, and not what it does."""

_NULL = ("", "~", "null")
"""What leaves an option unset."""

_EXAMPLE = "Write lines like `samples: 16` or `protect: [5, 11]`."

_OVERRIDES: dict[str, set[str]] = {
    **{name: {*TARGET_NAMES, "serve_length", "every"} for name in TARGET_NAMES},
    "target_memory": {*TARGET_NAMES},
    "model": {"revision"},
    "heal_minutes": {"heal_tokens"},
    "heal_tokens": {"heal_minutes"},
    "every": {"remove"},
}
"""Options of a file that do not apply if another one is typed."""


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values in a file the defaults of a command's options."""
    if path is None:
        return None
    if context.info_name == "search" and path.suffix == ".json":
        from sleb_cli.plan import read_plan

        values: Mapping[str, Any] = read_plan(path).request
    else:
        values = _read_yaml(path)
    options = _options(context)
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        option = options.get(key.replace("_", "-"))
        if option is None:
            help_lists = f"`{context.command_path} --help` lists them."
            raise UsageError(
                f"{path} has {key!r}, which is not an option of `{context.command_path}`.",
                hint=did_you_mean(key, list(options), otherwise=help_lists),
            )
        if option.name in defaults:
            raise UsageError(f"{path} has {key!r} under two names.", hint="Keep one of them.")
        texts = [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
        takes_many = option.multiple or option.nargs < 0
        defaults[option.name] = texts if takes_many else ",".join(texts)
    context.default_map = defaults
    return path


def _options(context: typer.Context) -> dict[str, Any]:
    """Return the parameters that a file may hold, by field and by option without dashes."""
    parameters = {}
    for parameter in context.command.params:
        if parameter.name not in _OF_A_RUN:
            for name in (str(parameter.name), parameter.opts[0]):
                parameters[name.lstrip("-").replace("_", "-")] = parameter
    return parameters


def _read_yaml(path: Path) -> dict[str, str | list[str]]:
    """Read names and values as if they were typed: in YAML, `yes` is true and 010 is 8."""
    import yaml

    from sleb_cli.records import UnreadableRecord, read_text

    try:
        values = yaml.load(read_text(path), Loader=yaml.BaseLoader)  # noqa: S506 - it makes texts alone
    except FileNotFoundError as error:
        raise UsageError(f"There is no file {path}.", hint="Check --config.") from error
    except UnreadableRecord as error:
        raise UsageError(f"{path} cannot be read: {error}.", hint="Check --config.") from error
    except (yaml.YAMLError, RecursionError, MemoryError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(f"{path} is not YAML: {reason}.", hint=_EXAMPLE) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no options.", hint=_EXAMPLE)
    for key, value in values.items():
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in (key, *texts)):
            raise UsageError(
                f"{path} has more than names with values or lists of values.", hint=_EXAMPLE
            )
    return {key: value for key, value in values.items() if value not in _NULL}


def drop_overridden(context: typer.Context, values: dict[str, Any]) -> None:
    """Leave out the options of a file that a typed one replaces, such as another target."""
    sources = {}
    for name in values:
        source = context.get_parameter_source(name)
        sources[name] = source.name if source else None
    for name, overridden in _OVERRIDES.items():
        if sources.get(name) != "COMMANDLINE":
            continue
        for other in overridden:
            if sources.get(other) == "DEFAULT_MAP":
                values[other] = None


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_read,
        is_eager=True,
        help="Read options from YAML, or a search's from a plan.",
        rich_help_panel=OUTPUT,
    ),
]
