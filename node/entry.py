"""Where the command `shoal` begins.

Law: nothing is imported before `main` runs, so that Ctrl-C in the seconds in which the rest is imported ends it as
quietly as later.
"""


def main() -> None:
    """Always ends the process."""
    try:
        from node import cli

        cli.main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # node.status.EXIT_INTERRUPTED, which may not be there yet
