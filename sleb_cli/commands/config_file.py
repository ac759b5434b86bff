"""`--config`: the options of a command from a YAML file, or those of a search from its plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from sleb_cli.requests import TARGET_NAMES
from sleb_plugins import UsageError
from sleb_plugins.errors import did_you_mean

_OF_A_RUN = {"config", "json", "quiet", "help", "force", "resume"}
"""Options that say how a command is run this time, and not what it does."""

MAX_BYTES = 100_000
"""The largest file that is read: PyYAML reads it in a second, whatever it holds."""

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
    from sleb_cli.plan import read_plan

    is_plan = context.info_name == "search" and path.suffix == ".json"
    values = read_plan(path).request.items() if is_plan else _of_yaml(path)
    options, found = _options(context), set[str]()
    context.default_map = {}
    for key, value in values:
        option = options.get(key.replace("_", "-"))
        if option is None:
            raise UsageError(
                f"{path} has {key!r}, which is not an option of `{context.command_path}`.",
                hint=did_you_mean(
                    key, list(options), otherwise=f"`{context.command_path} --help` lists them."
                ),
            )
        if option.name in found:
            raise UsageError(
                f"{path} has {key!r} twice, or under two names.", hint="Keep one of them."
            )
        found.add(option.name)
        if value is not None:
            text = _text(value, repeated=option.multiple or option.nargs < 0)
            if getattr(option, "is_flag", False) and text.lower() not in (
                "true",
                "false",
                "yes",
                "no",
            ):
                raise UsageError(
                    f"{path} has {key!r}, which is true or false, not {text!r}.",
                    hint="Use one of these.",
                )
            context.default_map[option.name] = text
    return path


def _options(context: typer.Context) -> dict[str, Any]:
    """Return the parameters that a file may hold, by the names of their fields and options without
    dashes.
    """
    return {
        name.lstrip("-").replace("_", "-"): parameter
        for parameter in context.command.params
        if parameter.name not in _OF_A_RUN
        for name in (str(parameter.name), parameter.opts[0])
    }


def _of_yaml(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield names and values as text, which options read as if it were typed: in YAML, `yes` is
    true and 010 is 8.
    """
    import yaml

    from sleb_cli.records import UnreadableRecord, read_text

    try:
        # As a node, since a dict would hide a key that stands there twice. Nodes expand no alias.
        root = yaml.compose(read_text(path, MAX_BYTES), Loader=yaml.BaseLoader)
    except FileNotFoundError as error:
        raise UsageError(f"There is no file {path}.", hint="Check --config.") from error
    except UnreadableRecord as error:
        raise UsageError(f"{path} cannot be read: {error}.", hint="Check --config.") from error
    except (RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(f"{path} is not YAML: {reason}.", hint=_EXAMPLE) from error
    if not isinstance(root, yaml.MappingNode | None):
        raise UsageError(f"{path} holds no options.", hint=_EXAMPLE)
    for key, node in root.value if root else ():
        values = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(each, yaml.ScalarNode) for each in (key, *values)):
            raise UsageError(
                f"{path} has more than names with values or lists of values.", hint=_EXAMPLE
            )
        is_null = (
            isinstance(node, yaml.ScalarNode)
            and node.style is None
            and node.value in ("", "~", "null")
        )
        yield key.value, None if is_null else [each.value for each in values]


def _text(value: Any, *, repeated: bool) -> Any:
    """Return a value as it is typed: a list with commas, unless the option is repeated."""
    texts = list(map(str, value)) if isinstance(value, list | tuple) else [str(value)]
    return texts if repeated else ",".join(texts)


def drop_overridden(context: typer.Context, values: dict[str, Any]) -> None:
    """Leave out the options of a file that a typed one takes the place of, such as another target."""
    sources = {
        name: source.name for name in values if (source := context.get_parameter_source(name))
    }
    for name in _OVERRIDES.keys() & {
        name for name, source in sources.items() if source == "COMMANDLINE"
    }:
        for other in _OVERRIDES[name]:
            if sources.get(other) == "DEFAULT_MAP":
                values[other] = None


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_read,
        is_eager=True,
        help="Read options from a YAML file, or those of a search from its plan. Typed options "
        "take precedence.",
    ),
]
