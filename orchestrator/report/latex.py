"""Text and tables for LaTeX: escaping, numbers, booktabs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

# Above it a table is broken over pages.
PAGE_ROWS = 40
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "\N{DAGGER}": r"\dag{}",
    # Ligatures: two of these would become a dash, a quotation mark or an upside-down one.
    "`": "{`}",
}
_PAIRS = ("--", "''", ",,")
# pdflatex knows Latin letters by itself, and stops at what it does not know. These need T1 fonts,
# which a document that reads the tables may lack, or other packages.
_LAST_KNOWN = 0x17F
_UNKNOWN = frozenset("«»ÐÞðþĄąĐđĘęĦħĮįĸĿŀŉŊŋŦŧŲųſ")


def escaped(text: object) -> str:
    """Return any text so that LaTeX prints it as it is, on one line.

    A character that pdflatex cannot print becomes its code point: ``[U+4E2D]``.
    """
    found = []
    for position, character in enumerate(str(text)):
        if character in _SPECIAL:
            found.append(_SPECIAL[character])
        elif character.isspace():
            found.append(" ")
        elif not _printed(character):
            found.append(f"[U+{ord(character):04X}]")
        else:
            found.append(character)
        if str(text)[position : position + 2] in _PAIRS:
            found.append("{}")
    return "".join(found)


def _printed(character: str) -> bool:
    known = ord(character) <= _LAST_KNOWN and character not in _UNKNOWN
    return known and character.isprintable()


def value(given: Any) -> str:
    """Return a setting's value: numbers as ``$2 \\cdot 10^{-5}$``, texts escaped."""
    if given is None:
        return "none"
    if isinstance(given, bool):
        return "yes" if given else "no"
    if isinstance(given, float):
        mantissa, _, exponent = f"{given:g}".partition("e")
        if not exponent:
            return mantissa if given >= 0 else f"${mantissa}$"
        lead = "" if mantissa == "1" else rf"{mantissa} \cdot "
        return rf"${lead}10^{{{int(exponent)}}}$"
    if isinstance(given, list):
        return ", ".join(map(value, given)) or "none"
    return escaped(given)


def listed(texts: Sequence[str]) -> str:
    """Return ``a``, ``a and b`` or ``a, b and c``."""
    if len(texts) < 2:
        return "".join(texts)
    return f"{', '.join(texts[:-1])} and {texts[-1]}"


class Row(NamedTuple):
    """A row of a table. cells: LaTeX. comment: plain text, for who reads the file."""

    cells: Sequence[str]
    comment: str
    gap: bool = False


def table(
    label: str,
    columns: str,
    head: Sequence[str],
    rows: Sequence[Row],
    caption: str,
    notes: Sequence[str] = (),
) -> str:
    """Return a booktabs table: a float, or one that breaks over pages if it is long.

    columns: alignment. head: lines above the rows, LaTeX with their ends. notes: LaTeX lines below.
    A float that is too wide is scaled to the line. Needs booktabs, graphicx and longtable.
    """
    body = "\n".join(
        ("\\addlinespace\n" if row.gap else "")
        + " & ".join(row.cells)
        + " \\\\"
        + (f" % {_comment(row.comment)}" if row.comment else "")
        for row in rows
    )
    top = "\n".join(("\\toprule", *head, "\\midrule"))
    below = "".join(f"\n\\par\\smallskip\\footnotesize {note}" for note in notes)
    named = f"\\caption{{{caption}}}\\label{{{label}}}"
    if len(rows) > PAGE_ROWS:
        return (
            # It cannot be scaled to the line.
            "\\begingroup\\scriptsize\\setlength{\\tabcolsep}{3pt}"
            "\\setlength{\\LTcapwidth}{\\linewidth}\n"
            f"\\begin{{longtable}}{{{columns}}}\n{named}\\\\\n{top}\n\\endfirsthead\n"
            f"{top}\n\\endhead\n\\bottomrule\n\\endfoot\n{body}\n\\end{{longtable}}{below}\n"
            "\\endgroup\n"
        )
    return (
        f"\\begin{{table}}[htbp]\n\\centering\n{named}\n\\small\n"
        "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
        f"\\begin{{tabular}}{{{columns}}}\n{top}\n{body}\n\\bottomrule\n\\end{{tabular}}}}"
        f"{below}\n\\end{{table}}\n"
    )


def _comment(text: str) -> str:
    return re.sub(r"\s+", " ", text)
