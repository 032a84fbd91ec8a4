"""node acts: the process, its configuration, its network, its terminal.

Everything in here is thin: what decides is in coordinator, what computes is in shard.  Threads (gRPC's, the worker's)
meet trio in one file, bridge.  `cli` and `client` import neither torch nor transformers, so that a terminal answers at
once.
"""
