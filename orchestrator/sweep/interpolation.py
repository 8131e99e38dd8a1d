"""Interpolation in sweep files: ``${KEY}`` of the same file, and nothing else.

OmegaConf also has resolvers, ``${NAME:ARGUMENTS}``, of which ``oc.env`` reads the environment. A
sweep file may come from anyone, so every resolver is refused before anything is resolved. What a
value calls is read from OmegaConf's own parse tree, not from a pattern.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf.errors import GrammarParseError
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser
from omegaconf.grammar_parser import parse

from btu.errors import UserError


def refuse_resolvers(value: Any, key: str = "") -> None:
    """Check that nothing in a value calls a resolver: no text, list item or mapping key.

    Escaped calls are refused too. Values are read more than once, and each time takes a level of
    escapes away.

    value: as a file or an override writes it, before anything in it is resolved.
    key: where it stands, dotted, for errors.

    Raises:
        UserError: a text calls a resolver, or its interpolation cannot be read.
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            where = f"{key}.{name}" if key else str(name)
            _check_text(str(name), f"the key {where}")
            refuse_resolvers(inner, where)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            refuse_resolvers(inner, f"{key}[{index}]")
    elif isinstance(value, str):
        _check_text(value, key)


def unreadable(where: str, error: Exception) -> UserError:
    """Return the error for a text with ``${`` that the grammar of OmegaConf cannot read.

    where: the key of the text.
    """
    reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
    return UserError(
        f"{where} has '${{' without an interpolation that can be read ({reason}); write ${{KEY}} "
        "with the dotted key of another value, or leave '${' out."
    )


def _check_text(text: str, where: str) -> None:
    while "${" in text:
        name = _resolver(text, where)
        if name is not None:
            raise UserError(
                f"{where} calls the resolver '{name}' (${{{name}:...}}): a value may name other "
                "keys of the sweep alone, such as ${seed} or ${attack.name}, never the "
                "environment or a function; write the value itself, or give it as an override, "
                "KEY=VALUE, on the command line."
            )
        unescaped = text.replace("\\${", "${")
        if unescaped == text:
            return
        text = unescaped


def _resolver(text: str, where: str) -> str | None:
    """Return the name of a resolver that a text calls, at any depth; None if it calls none."""
    try:
        pending: list[Any] = [parse(text)]
    except (GrammarParseError, RecursionError) as error:
        raise unreadable(where, error) from error
    while pending:
        node = pending.pop()
        if isinstance(node, OmegaConfGrammarParser.InterpolationResolverContext):
            return str(node.getChild(1).getText())
        pending += node.getChildren() if node.getChildCount() else []
    return None
