"""The command line: ``modelyard …``. One small file for each group of commands; what is slow is imported when used."""


def main() -> None:
    """The console script."""
    from .main import app

    app()
