"""Look inside a model: where its attention goes, and what it thinks of a response, short against long."""
