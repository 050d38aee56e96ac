"""SQLite's errors in the words of the house: what is wrong with which file, and what to do."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import orjson

from ..core.errors import Invalid, ModelyardError, TooLarge, Unavailable

WRITABLE = "cannot be written: make the file and its folder writable for this user"
WHAT_TO_DO = {
    sqlite3.SQLITE_FULL: "cannot grow: the disk is full; free some space",
    sqlite3.SQLITE_IOERR: "cannot be read or written: look at the disk and its free space",
    sqlite3.SQLITE_CORRUPT: "is damaged: stop Modelyard and restore the file from a backup",
    sqlite3.SQLITE_NOTADB: "is not a database, or is damaged: give another path or restore it from a backup",
    sqlite3.SQLITE_READONLY: WRITABLE,
    sqlite3.SQLITE_PERM: WRITABLE,
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: check that its folder exists and is yours to write",
}
BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def is_busy(exc: sqlite3.Error) -> bool:
    """Another connection is at work: the same call may succeed in a moment."""
    return getattr(exc, "sqlite_errorcode", -1) & 0xFF in BUSY


def busy_text(path: Path, busy_s: float) -> str:
    return (f"{path} was locked by another program for {busy_s:g} s; end that program "
            "(a database browser, a backup) and try again")


def translated(exc: Exception, path: Path, busy_s: float) -> Exception:
    """A driver's error as one of ours, with the driver's as its cause; anything else as it is."""
    ours: ModelyardError
    if isinstance(exc, (OverflowError, UnicodeEncodeError, orjson.JSONEncodeError)):
        ours = Invalid(f"a value cannot be stored: {exc}")
    elif isinstance(exc, OSError):
        ours = Unavailable(f"{path} cannot be opened ({exc.strerror}); check that its folder exists and is yours to "
                           "write")
    elif isinstance(exc, sqlite3.Error):
        code = getattr(exc, "sqlite_errorcode", -1) & 0xFF
        if code == sqlite3.SQLITE_TOOBIG:
            ours = TooLarge("a document is larger than SQLite stores (1,000,000,000 bytes)")
        elif code in BUSY:
            ours = Unavailable(busy_text(path, busy_s))
        else:
            ours = Unavailable(f"{path} {WHAT_TO_DO.get(code, 'does not answer')} ({exc})")
    else:
        return exc
    ours.__cause__ = exc
    return ours
