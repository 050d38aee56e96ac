"""PROGRAM 4: one small process per deployment on the ``local`` target. Standard library only, so that it starts fast.

It owns the deployment's public sockets and relays their bytes to replicas on private unix sockets; it starts, probes,
restarts, rolls and drains the replicas. Its state is a folder, its only door a unix socket in it (``control.py``).
"""
