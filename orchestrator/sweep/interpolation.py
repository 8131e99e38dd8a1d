"""Interpolation in sweep files: ``${KEY}`` of the same file, and nothing else.

OmegaConf also has resolvers, ``${NAME:ARGUMENTS}``, of which ``oc.env`` reads the environment. A
sweep file may come from anyone, so every resolver is refused before anything is resolved. What a
value calls is read from OmegaConf's own parse tree, not from a pattern.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
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


# Interpolations that name values with interpolations of their own, and characters that all others
# stand for. Together they bound what a file can become: 12 in a row triple it four times.
MOST_CHAINED, MOST_CHARACTERS = 12, 1_000_000
_NAMED = re.compile(r"\$\{\s*(\.*)([\w.-]+)\s*\}")


def refuse_growth(config: Any) -> None:
    """Check that interpolations do not multiply, as ``${b}${b}`` does thirty times in a row.

    config: a file, before anything in it is resolved.

    Raises:
        UserError: written out, the file might not fit into the memory.
    """
    chained = characters = 0
    for path, text in _texts(config, ()):
        chained += text.count("${")
        for dots, name in _NAMED.findall(text):
            above = path[: -len(dots)] if dots else ()
            target = _at(config, (*above, *name.split(".")))
            inner = [found for _, found in _texts(target, ())]
            if target is not None and not any("${" in found for found in inner):
                chained -= 1
                characters += sum(map(len, inner))
    if chained > MOST_CHAINED or characters > MOST_CHARACTERS:
        raise UserError(
            f"the file has {chained} interpolations of values that have interpolations themselves, "
            f"or that are not found, and the others stand for {characters} characters (at most "
            f"{MOST_CHAINED} and {MOST_CHARACTERS}): written out they may not fit into the memory. "
            "Write the values themselves."
        )


def _texts(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Yield all texts in a value, each with its path."""
    if isinstance(value, Mapping | list):
        inner = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, found in inner:
            yield from _texts(found, (*path, name))
    elif value is not None:
        yield path, str(value)


def _at(value: Any, path: Iterable[Any]) -> Any:
    """Return what is at a path; None if there is nothing."""
    for step in path:
        if isinstance(value, list) and str(step).isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            value = value.get(step) if isinstance(value, Mapping) else None
    return value


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
