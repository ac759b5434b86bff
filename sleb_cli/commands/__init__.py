"""How commands take their options: from the fields of a request, and from files."""
