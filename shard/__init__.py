"""Computes: torch and weight files, no network.

`pack` turns a checkpoint into hash-addressed units, `weights` reads them back, `body` cuts the checkpoint's own model
to a span, `stage` runs sessions through it, `worker` owns the threads. Experts enter through one port, so that a
stage does not know which of them are on this machine.
"""
