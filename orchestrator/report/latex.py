"""Text and tables for LaTeX: escaping, numbers, booktabs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

# A table with more rows breaks over pages.
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
    # Ligatures turn a pair of these into a dash, a quotation mark or an inverted mark.
    "`": "{`}",
}
_PAIRS = ("--", "''", ",,")
# pdflatex prints Latin letters up to this code point, except for those below, and stops at others.
# The exceptions need T1 fonts or further packages, which the including document may lack.
_LAST_KNOWN = 0x17F
_UNKNOWN = frozenset("«»ÐÞðþĄąĐđĘęĦħĮįĸĿŀŉŊŋŦŧŲųſ")


def escaped(text: object) -> str:
    """Return text escaped so that LaTeX prints it unchanged, on one line.

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
    """Return a setting's value in LaTeX: numbers as ``$2 \\cdot 10^{-5}$``, texts escaped."""
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
    if isinstance(given, dict):
        return ", ".join(f"{escaped(name)} {value(one)}" for name, one in given.items())
    return escaped(given)


def listed(texts: Sequence[str]) -> str:
    """Return ``a``, ``a and b`` or ``a, b and c``."""
    if len(texts) < 2:
        return "".join(texts)
    return f"{', '.join(texts[:-1])} and {texts[-1]}"


class Row(NamedTuple):
    """A row of a table.

    cells: LaTeX.
    comment: plain text, for readers of the file.
    gap: whether there is a vertical gap above the row.
    """

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
    """Return a booktabs table: a float, or a longtable if it has more than `PAGE_ROWS` rows.

    A float that is too wide is scaled to the line. The document needs booktabs, graphicx and
    longtable.

    label: for references.
    columns: the alignment of each column, as for tabular.
    head: lines above the rows, in LaTeX with their line ends.
    rows: the rows of the body.
    caption: in LaTeX.
    notes: lines below the table, in LaTeX.
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
            # A longtable cannot be scaled to the line.
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
