"""The console script: the parser of all commands, and what becomes of errors.

Exit codes: 0 done, 1 failed (a full disk), 2 bad input, 3 targets of `compress` not met, 130 interrupted.
"""
import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

COMMANDS = ('models', 'info', 'train', 'validate', 'predict', 'compress', 'prune', 'share', 'export', 'analyze',
            'depth', 'doctor', 'demo')
_ONE_PROCESS = ('compress', 'prune', 'share', 'export', 'demo')  # each process of several would write the same output


class _Parser(argparse.ArgumentParser):
    """Errors in one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: {_one_line(message)} (see {self.prog} --help)\n')


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog='timm-lean', description='Smaller convolutional networks for timm and MMDetection.')
    parser.add_argument('--version', action='store_true', help='print the version')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', parser_class=_Parser)
    for name in COMMANDS:
        module = import_module(f'.{name}', __package__)
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.add_argument('--debug', action='store_true', help='show the traceback of an error')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = build_parser()
    if '_ARGCOMPLETE' in os.environ:  # the shell asks for completions
        import argcomplete
        argcomplete.autocomplete(parser)
    args = parser.parse_args(argv)
    if args.version:
        from importlib.metadata import version
        print(version('timm-lean'))
        return 0
    if not args.command:
        parser.print_help()
        return 2
    try:
        return _run(args)
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0


def _run(args: argparse.Namespace) -> int:
    from timm_lean.errors import LeanError
    try:
        if args.command in _ONE_PROCESS and int(os.environ.get('WORLD_SIZE', '1')) > 1:
            raise LeanError(f'{args.command} runs in one process; start it once, without torchrun.')
        return import_module(f'.{args.command}', __package__).run(args) or 0
    except BrokenPipeError:
        raise
    except (LeanError, OSError) as e:
        if args.debug:
            traceback.print_exc()
        # an error raised in a data loading process carries that process's traceback in its text
        message = str(e).rsplit('LeanError: ', 1)[-1]
        print(f'timm-lean {args.command}: {_one_line(message)}', file=sys.stderr)
        return 1 if _failed(e) else 2


def _failed(error: Exception) -> bool:
    """Whether the machine failed rather than the request."""
    from timm_lean.errors import OutputError
    return isinstance(error, OutputError) or (isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG)


def _one_line(text: str) -> str:
    line = ' '.join(text.split())
    return line if len(line) <= 1500 else f'{line[:1000]} ... {line[-450:]}'
