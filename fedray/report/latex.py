"""Tables for LaTeX, with the rules of booktabs. Text is escaped; nothing but \\usepackage{booktabs} is needed."""

from __future__ import annotations

from collections.abc import Sequence

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"{''}",
    # At the start of a line they would belong to the line break before it.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "±": r"$\pm$",
    "\n": " ",
}


def escaped(text: str) -> str:
    """Text as LaTeX prints it. Letters beyond ASCII stay as they are: every engine reads UTF-8 today."""
    return "".join(_SPECIAL.get(letter, letter) for letter in text)


def latex(header: Sequence[str], lines: Sequence[Sequence[tuple[str, bool]]], *, text: int = 1, title: str = "") -> str:
    """A tabular. lines: text and whether it is bold. text: columns from the left that hold words; the others hold
    numbers and stand to the right."""
    columns = "l" * text + "r" * (len(header) - text)
    body = [" & ".join(_cell(*entry, number=at >= text) for at, entry in enumerate(line)) + r" \\" for line in lines]
    above = [f"% {' '.join(title.split())}"] if title else []
    return "\n".join(
        [
            *above,
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(escaped(name) for name in header) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _cell(text: str, bold: bool, *, number: bool) -> str:
    shown = escaped(text)
    if number and any(letter.isdigit() for letter in text):
        shown = shown.replace("-", "$-$").replace("+", "$+$")  # a hyphen is no minus
    return rf"\textbf{{{shown}}}" if bold else shown
