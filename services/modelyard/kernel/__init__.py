"""PLUMBING: reliability, written once. Services commit documents; everything else happens here."""
