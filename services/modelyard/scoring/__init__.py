"""PROGRAM 2, baked into images: answers Open Inference Protocol v2 calls and appends what it saw to local segments.

It stands alone: no bus, no database, no control plane. This package and the modules that an image's start needs
(``launch``, ``settings``, ``image``) import with the standard library only.
"""
