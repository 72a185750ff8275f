"""``--print-completion SHELL``: a script that completes the words of a command in a shell; shtab writes it."""

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")

_BASH = """
# No space after --section.key=.
_complete_{word}() {{
  _shtab_{word} "$@"
  if [[ ${{COMPREPLY[0]-}} == *= ]]; then compopt -o nospace; fi
}}
complete -o filenames -F _complete_{word} {name}
"""


def arguments(parser: argparse.ArgumentParser, name: str, extend: Callable[[], Any] = lambda: None) -> None:
    """Add ``--print-completion SHELL``.

    Args:
      parser: of the command.
      name: of the command in the shell; a shell does not complete ``python -m ...``.
      extend: adds to the parser the words that the command accepts without it.
    """

    class Print(argparse.Action):
        def __call__(self, top: argparse.ArgumentParser, _options: Any, shell: Any, _option: str | None = None) -> None:
            try:
                import shtab
            except ImportError:
                top.exit(2, f"{top.prog}: --print-completion needs shtab: pip install 'dsee-jax[completion]'\n")
            extend()
            for action in _actions(top):
                if action.nargs != 0 and not action.choices:
                    action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
            top.prog = name
            more = _BASH.format(name=name, word=name.replace("-", "_")) if shell == "bash" else ""
            print(shtab.complete(top, shell) + more)
            top.exit()

    parser.add_argument(
        "--print-completion",
        action=Print,
        choices=SHELLS,
        help=f"print a script that completes the words of {name} in a shell, and exit; needs the extra `completion`",
    )


def add_keys(parser: argparse.ArgumentParser, keys: Iterable[tuple[str, tuple[Any, ...]]]) -> None:
    """Add the overrides ``--section.key=`` to a parser, from the names of the keys and their choices, or ()."""
    for key, choices in keys:
        parser.add_argument(f"--{key}=", choices=choices or None, help=key)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _actions(each)
        else:
            yield action
