"""The version, written once: pyproject.toml and the native module take it from here."""

__version__ = "0.1.0"
