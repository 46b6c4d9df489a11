"""GLUE: nine tasks of English understanding."""
