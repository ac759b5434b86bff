"""Everything that touches models. There is no terminal in here: events go to a `notify` callable."""
