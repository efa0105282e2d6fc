"""Hold it against measurement."""
