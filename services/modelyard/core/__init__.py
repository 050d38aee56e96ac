"""GROUND: the words every room shares. Pydantic and the standard library only; no I/O."""
