"""What several tests of devices share."""

import json

import pytest

SPREAD = {"": 0, "{blocks}.1": 1, "{blocks}.2": 1, "{blocks}.3": "cpu", "{blocks}.4": "disk"}


@pytest.fixture
def spread(tmp_path):
    """Return options that spread a model over two devices, CPU memory and disk."""

    def options(blocks="model.layers", **others):
        places = {name.format(blocks=blocks): place for name, place in SPREAD.items()} | others
        (tmp_path / "places.json").write_text(json.dumps(places))
        return ["--device-map", tmp_path / "places.json"]

    return options
