"""The installed plugins, and what they offer. Broken ones are set aside."""

from __future__ import annotations

import hashlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import pluggy

from sleb_cli.events import Notice, Notify, Warned
from sleb_cli.plugin_calls import blame
from sleb_cli.processes import Terminated
from sleb_cli.requests import TRANSFORMERS
from sleb_cli.synonyms import SYNONYMS
from sleb_cli.version import __version__
from sleb_plugins import Engine, Exporter, FamilyAdapter, Metric, PluginError, UsageError, hookspecs
from sleb_plugins.engine import Reads
from sleb_plugins.errors import did_you_mean
from sleb_plugins.metric import KINDS

if TYPE_CHECKING:
    from sleb_cli.plan import MetricRecord

GROUP = "sleb"

Kind = Literal["family", "metric", "exporter", "engine"]

_HOOKS: dict[str, tuple[Kind, tuple[type, ...]]] = {
    "sleb_families": ("family", (FamilyAdapter,)),
    "sleb_metrics": ("metric", tuple(chain.from_iterable(KINDS.values()))),
    "sleb_exporters": ("exporter", (Exporter,)),
    "sleb_engines": ("engine", (Engine,)),
}


@dataclass(frozen=True)
class Plugin:
    """An entry point of the group `sleb`, and the package it comes from."""

    name: str
    module: str
    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.package} {self.version} ({self.module})"


@dataclass(frozen=True)
class Offer:
    """One family, metric, exporter or engine, and the plugin that offers it."""

    kind: Kind
    name: str
    value: Any
    plugin: Plugin


@dataclass(frozen=True)
class Failure:
    """A plugin that could not be loaded, and why."""

    plugin: Plugin
    reason: str


@dataclass(frozen=True)
class Registry:
    """Everything that plugins offer; a name that two plugins claim is refused when it is used."""

    offers: tuple[Offer, ...]
    failures: tuple[Failure, ...]

    def metric(self, text: str) -> Metric:
        """Return a metric by `NAME` or `NAME:ARGUMENT`."""
        name, colon, argument = text.partition(":")
        metric: Metric = self.choose("metric", name).value
        if colon:
            parsed = copy(metric.with_argument(argument))
            # Scores are saved by name, which must tell two arguments apart.
            if parsed.name == metric.name:
                object.__setattr__(parsed, "name", text)
            return parsed
        if metric.argument and not metric.argument.startswith("["):
            raise UsageError(
                f"The metric {name!r} needs an argument.", hint=f"Write {name}:{metric.argument}."
            )
        return metric

    def metric_record(self, metric: Metric) -> MetricRecord:
        """Record what the scores of a metric depend on."""
        # slow: it would double the time to the first word on the screen
        from sleb_cli.plan import MetricRecord

        plugin = self.choose("metric", metric.name.partition(":")[0]).plugin
        return MetricRecord(
            package=plugin.package,
            version=plugin.version,
            code=_hash_of_code(type(metric)),
            fingerprint=metric.fingerprint(),
        )

    def choose(self, kind: Kind, name: str) -> Offer:
        """Return the offer of this name; refuse one that no plugin makes, or two."""
        offer = self._claimant(kind, name)
        if offer:
            return offer
        names = sorted(known for known_kind, known in self._claims if known_kind == kind)
        raise UsageError(
            f"Unknown {kind} {name!r}.",
            hint=SYNONYMS.get(f"{kind} {name}") or did_you_mean(name, names),
        )

    def family(self, model_type: str) -> FamilyAdapter | None:
        """Return the adapter that claims `model_type`, if any; refuse a claim by two plugins."""
        offer = self._claimant("model_type", model_type)
        return offer.value if offer else None

    def third_party(self) -> dict[str, str]:
        """Return the version of each package but sleb that offers something."""
        return _other_packages(self.offers)

    def behind(self, **names: str | None) -> dict[str, str]:
        """Return the versions of the packages behind these: family="acme", engine="steady"."""
        return _other_packages(o for o in self.offers if names.get(o.kind) == o.name)

    @property
    def collisions(self) -> tuple[str, ...]:
        """A sentence for each name or model type that two plugins claim."""
        sentences = []
        for (kind, name), rivals in self._claims.items():
            if len(rivals) > 1:
                sentences.append(_collision(kind, name, rivals).message)
        return tuple(sentences)

    @cached_property
    def _claims(self) -> dict[tuple[str, str], list[Offer]]:
        """The offers by kind and name; families also by model type."""
        claims: dict[tuple[str, str], list[Offer]] = defaultdict(list)
        for offer in self.offers:
            claims[offer.kind, offer.name].append(offer)
            if offer.kind == "family":
                for model_type in offer.value.model_types:
                    claims["model_type", model_type].append(offer)
        return claims

    def _claimant(self, kind: str, name: str) -> Offer | None:
        offers = self._claims.get((kind, name), [])
        if len(offers) > 1:
            raise _collision(kind, name, offers)
        return offers[0] if offers else None


def load_registry(notify: Notify) -> Registry:
    """Load the plugins; name other packages before their code runs, and warn of each failure."""
    points = entry_points(group=GROUP)
    others = _of_other_packages(points)
    if others:
        notify(Notice(f"Loading plugins of other packages: {', '.join(map(str, others))}."))
    registry = load_plugins(points)
    for failure in registry.failures:
        notify(
            Warned(f"The plugin {failure.plugin} failed to load and is disabled: {failure.reason}.")
        )
    return registry


def third_party_plugins() -> list[Plugin]:
    """List the plugins of other packages, without running their code."""
    return _of_other_packages(entry_points(group=GROUP))


def _of_other_packages(points: Iterable[EntryPoint]) -> list[Plugin]:
    return [plugin for plugin in map(_plugin, points) if plugin.package != "sleb"]


def load_plugins(points: Iterable[EntryPoint] | None = None) -> Registry:
    """Load each installed plugin separately, so that a broken one affects no other."""
    offers: list[Offer] = []
    failures: list[Failure] = []
    own = Plugin(TRANSFORMERS, "sleb_cli.engine.speed", "sleb", __version__)
    if points is None:
        points = entry_points(group=GROUP)
    for entry_point in points:
        plugin = _plugin(entry_point)
        try:
            offers += _offers(plugin, entry_point.load)
        except (KeyboardInterrupt, Terminated):
            raise
        except BaseException as error:  # a plugin can raise anything on import
            failures.append(Failure(plugin, f"{type(error).__name__}: {error}"))
    offers.append(Offer("engine", TRANSFORMERS, None, own))
    return Registry(tuple(offers), tuple(failures))


def _plugin(entry_point: EntryPoint) -> Plugin:
    package = entry_point.dist
    if package is None:
        return Plugin(entry_point.name, entry_point.value, "unknown package", "?")
    metadata = package.metadata  # parsed anew at each access
    return Plugin(entry_point.name, entry_point.value, metadata["Name"], metadata["Version"])


def _offers(plugin: Plugin, load: Callable[[], Any]) -> list[Offer]:
    # One manager per plugin, so that a broken plugin cannot disturb the checks of another.
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    module = load()
    manager.register(module, plugin.name)
    manager.check_pending()
    implemented = {caller.name for caller in manager.get_hookcallers(module) or ()}
    if not implemented:
        raise TypeError(
            f"no function of {plugin.module} has @sleb_plugins.hookimpl, so it offers nothing"
        )
    offers = []
    for hook, (kind, _) in _HOOKS.items():
        if hook not in implemented:
            continue
        returned = getattr(manager.hook, hook)()  # of one plugin; pluggy leaves out None
        values = returned[0] if returned else None
        if not isinstance(values, Iterable):
            raise TypeError(f"{hook} returns {values!r}, not a list")
        for value in values:
            _require_usable(hook, value)
            name = value.name
            if plugin.package != "sleb":  # an error of ours is a bug, which keeps its traceback
                value = blame(value, f"The {kind} {name!r} of {plugin.package} {plugin.version}")
            offers.append(Offer(kind, name, value, plugin))
    return offers


def _require_usable(hook: str, value: Any) -> None:
    kind, types = _HOOKS[hook]
    if isinstance(value, type):
        raise TypeError(
            f"{hook} offers the class {value.__name__}, not an object: {value.__name__}()"
        )
    if not isinstance(value, types):
        raise TypeError(
            f"{hook} offers {value!r}, which is not a "
            f"{' or '.join(type_.__name__ for type_ in types)}"
        )
    name = getattr(value, "name", None)
    if not isinstance(name, str) or not name.isprintable() or not name or ":" in name:
        raise TypeError(
            f"the {kind} {type(value).__name__} has the name {name!r}, which is no word"
        )
    if isinstance(value, Engine) and value.reads not in get_args(Reads):
        raise TypeError(
            f"the engine {name!r} reads {value.reads!r}, not one of {', '.join(get_args(Reads))}"
        )


def _hash_of_code(kind: type) -> str:
    """Hash the files that define a class and its bases, except for our own."""
    code = hashlib.sha256()
    for base in kind.__mro__:
        if base.__module__ not in ("builtins", "abc", Metric.__module__):
            with suppress(OSError, TypeError):  # a class in an interactive session has no file
                code.update(Path(inspect.getfile(base)).read_bytes())
    return code.hexdigest()[:12]


def _other_packages(offers: Iterable[Offer]) -> dict[str, str]:
    """Return the version of each package but sleb that makes one of these offers."""
    plugins = [offer.plugin for offer in offers]
    return {plugin.package: plugin.version for plugin in plugins if plugin.package != "sleb"}


def _collision(kind: str, name: str, rivals: list[Offer]) -> PluginError:
    names = " and ".join(str(offer.plugin) for offer in rivals)
    hint = "Uninstall one of them."
    if any(offer.plugin.package == "sleb" for offer in rivals):
        hint = f"It is built in: uninstall {', '.join(_other_packages(rivals))}."
    return PluginError(f"The {kind} {name!r} is claimed by {names}.", hint=hint)
