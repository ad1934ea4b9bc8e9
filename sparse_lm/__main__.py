"""The command `sparse-lm`, also as `python -m sparse_lm`."""

import signal


def main() -> None:
    """Runs the command. Until it has imported what it needs, Ctrl-C ends the process as the system does.

    Python would raise KeyboardInterrupt wherever an import is, which some libraries answer with a traceback and others
    swallow.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored in the background of a script
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sparse_lm.cli import main

    main()


if __name__ == "__main__":
    main()
