"""What several tests of commands share."""

import pytest

from sleb_cli.engine.forward.streaming import StreamedBlocks


@pytest.fixture
def visits(monkeypatch):
    """The blocks of each walk or pass through the weights of a streamed model."""
    visited, visit = [], StreamedBlocks.visit

    def counted(self, blocks):
        blocks = list(blocks)
        visited.extend([blocks] if blocks else [])
        return visit(self, blocks)

    monkeypatch.setattr(StreamedBlocks, "visit", counted)
    return visited
