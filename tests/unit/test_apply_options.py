"""Options of `sleb apply` that contradict each other are refused before anything is read."""

import pytest

from sleb_cli.engine.door.apply import resolve_apply
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.events import ignore
from sleb_cli.requests import ApplyRequest
from sleb_plugins import UsageError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep_failed": "kept", "no_verify": True}, "--keep-failed requires the proof"),
        ({"samples": 9}, "--samples requires --recover or --heal"),
        ({"seed": 1}, "--seed requires --recover or --heal"),
        ({"heal_tokens": 5}, "--heal-tokens requires --heal"),
        ({"recover": True, "heal_minutes": 5.0}, "--heal-minutes requires --heal"),
        ({"heal": True, "heal_minutes": 5.0, "heal_tokens": 5}, "--heal-minutes and --heal-tokens cannot be combined"),
        ({"heal": True, "heal_minutes": 0.0}, "--heal-minutes must be above 0, not 0"),
        ({"heal": True, "stream": True}, "--heal trains the model"),
        ({"heal": True, "device_map": "auto"}, "--heal trains, so it needs all weights on its device"),
        ({"stream": True, "device_map": "auto"}, "--device-map and --stream cannot be combined"),
        ({"recover": True, "device": "cpu", "device_map": "auto"}, "--device-map chooses the devices"),
    ],
    ids=str,
)
def test_options_that_clash_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        resolve_apply(ApplyRequest(subject="model", **options), None, ignore, ProcessGroup())
