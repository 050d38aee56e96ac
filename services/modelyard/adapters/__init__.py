"""WALL SOCKETS: the only rooms that import drivers, one file each, named ``<port>_<technology>.py``."""
