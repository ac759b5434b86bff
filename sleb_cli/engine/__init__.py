"""Everything that touches models. No terminal is in here: events go to a `notify` callable."""
