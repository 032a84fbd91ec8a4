"""coordinator thinks: views, routes, sessions, admission.

Pure: `handle(event, now) -> list[Effect]`.  Time and randomness come in as arguments, equal inputs give equal outputs;
no trio, grpc, torch, socket, threading or clock in here.  An illegal transition raises and changes nothing.
"""
