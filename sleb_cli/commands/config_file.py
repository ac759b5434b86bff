"""`--config`: the options of a command from a YAML file, or those of a search from its plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sleb_cli.requests import TARGET_NAMES
from sleb_plugins import UsageError
from sleb_plugins.errors import did_you_mean

_OF_A_RUN = {"config", "json", "quiet", "help", "force", "resume"}
"""Options that say how a command is run this time, and not what it does."""

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
    """Let the values in a file be the defaults of a command's options.

    Raises:
        UsageError: the file cannot be read, or has a key that is no option of the command.
        PlanError: it is a plan that cannot be read.
    """
    if path is None:
        return None
    values = _of_plan(path) if context.info_name == "search" and path.suffix == ".json" else _of_yaml(path)
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


def _of_plan(path: Path) -> dict[str, Any]:
    from sleb_cli.plan import read_plan

    return dict(read_plan(path).request)


def _of_yaml(path: Path) -> dict[Any, Any]:
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
    return values


def _text(value: Any, *, repeated: bool) -> Any:
    """Return a value as it is typed: a list with commas, unless the option is repeated."""
    if isinstance(value, list | tuple):
        texts = [str(item) for item in value]
        return texts if repeated else ",".join(texts)
    text = value if isinstance(value, bool) else str(value)
    return [text] if repeated else text


def _parameters(context: typer.Context) -> dict[str, Any]:
    return {str(parameter.name): parameter for parameter in context.command.params}


def _names(context: typer.Context) -> dict[str, str]:
    """Return the parameters that a file may hold, by the names of their options without dashes."""
    names: dict[str, str] = {}
    for name, parameter in _parameters(context).items():
        if name not in _OF_A_RUN:
            flags = [flag.removeprefix("--") for flag in parameter.opts if flag.startswith("--")]
            names |= dict.fromkeys([*flags, name.replace("_", "-")], name)
    return names


def drop_overridden(context: typer.Context, values: dict[str, Any]) -> None:
    """Leave out the options of a file that a typed one takes the place of, such as another target."""
    sources = {name: source.name for name in values if (source := context.get_parameter_source(name))}
    for name in _OVERRIDES.keys() & {name for name, source in sources.items() if source == "COMMANDLINE"}:
        for other in _OVERRIDES[name]:
            if sources.get(other) == "DEFAULT_MAP":
                values[other] = None


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_read,
        is_eager=True,
        help="Read options from this YAML file; command-line options take precedence.",
    ),
]
