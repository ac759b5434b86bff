"""One thin file a command: it parses, calls the engine, and shows."""
