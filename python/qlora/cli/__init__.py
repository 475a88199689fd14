"""The command line ``qlora COMMAND``: one module per command, which imports its libraries only when it runs."""

import argparse
import sys
from collections.abc import Sequence

from qlora.cli import bench, demo, eval, export, finetune, generate, info, merge, plan, quantize, serve

_COMMANDS = (finetune, quantize, generate, serve, merge, export, eval, plan, bench, info, demo)
INTERRUPTED = 130  # exit status after Ctrl-C, as a shell reports it


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qlora", description="Fine-tune and run language models in 4 bit.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        name = command.__name__.rpartition(".")[2]
        subparser = subparsers.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    Errors that a user can fix print one line on stderr, with status 1; others keep their traceback.
    """
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt as error:
        print(f"qlora: {error}" if str(error) else "qlora: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ImportError, KeyError, MemoryError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"qlora {arguments.command}: {text}", file=sys.stderr)
        return 1
