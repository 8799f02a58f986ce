"""Whether two answers of MATH are equal, by the rules of its usual graders: normalise both as Hendrycks' MATH does and
compare; else write LaTeX as plain text, drop units, split tuples, and let sympy take the difference.

Rules: those that dMoE's released evaluation applies (math500/grader.py, math500/math_normalize.py; they go back to PRM800K).
Beyond them, what might never end is not computed: factorials, ** and towers of powers.
"""

from __future__ import annotations

import logging
import re
import warnings

INSTALL = "pip install 'dmoe-ops[eval]'"
UNITS = "degree cm centimeter meter mile second minute hour day week month year foot feet inch yard"
UNIT = re.compile(f"(?:{UNITS.replace(' ', '|')})(?:es)?s? *(?:\\^[0-9]+)?")
PLAIN = {"√": "sqrt", "π": "pi", "∞": "inf", "∪": "U", "·": "*", "×": "*"}
MAGNITUDES = {"million": "*10^6", "billion": "*10^9", "trillion": "*10^12"}
ENDLESS = re.compile(r"!|\*\*|\^\{|\^\(|\^[0-9]+\^|\^[0-9][0-9]|(?:\)\^.*){4}|[0-9]{40}|__|['\"]")
LONGEST = 300


def check_installed() -> None:
    """Raises ValueError, with the command that installs them, where the packages are missing."""
    try:
        import pylatexenc.latex2text  # noqa: F401
        import sympy  # noqa: F401
    except ImportError as error:
        raise ValueError(f"grading MATH-500 takes the package {error.name}: {INSTALL}") from None


def equal(given: str | None, target: str) -> bool:
    """Whether a given answer is the right one, `target`; None is not."""
    if given is None:
        return False
    if as_math_does(given) == as_math_does(target):
        return True
    given, target = plain(given), plain(target)
    if given == target:
        return True
    if not given or not target:
        return False
    parts, wanted = elements(given), elements(target)
    brackets = len(wanted) > 1 and (given[0], given[-1]) != (target[0], target[-1])
    return not brackets and len(parts) == len(wanted) and all(map(_equal_element, parts, wanted))


def as_math_does(answer: str) -> str:
    """An answer in the one spelling that Hendrycks' MATH compares."""
    answer = _without_text(answer.strip()).strip()
    for old in ("\n", "\\!"):
        answer = answer.replace(old, "")
    answer = answer.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    for old in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        answer = answer.replace(old, "")
    if answer.count("\\text{ ") == 1:  # a unit, on the right
        answer = answer.partition("\\text{ ")[0]
    answer = answer.replace("\\%", "")
    answer = re.sub(r"(^|[ {])\.", r"\g<1>0.", answer)
    name, equals, value = answer.partition("=")
    if equals and "=" not in value and len(name) <= 2:
        answer = value
    answer = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", answer).replace(" ", "")
    answer = re.sub(r"\\frac([^{])\{", r"\\frac{\1}{", answer)
    answer = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", answer)
    if answer == "0.5":
        return "\\frac{1}{2}"
    return re.sub(r"^(0|-?[1-9]\d*)/(0|-?[1-9]\d*)$", r"\\frac{\1}{\2}", answer)


def plain(answer: str) -> str:
    """An answer as a text that sympy can read: no units, no LaTeX, no spaces, in lower case."""
    answer = _without_text(answer)
    answer = re.sub(r"\\?[%$]", "", answer).replace(" or ", " , ").replace(" and ", " , ")
    for word, factor in MAGNITUDES.items():
        answer = answer.replace(word, factor)
    answer = re.sub(r"\^ *\\circ", "", UNIT.sub("", answer))
    if answer[:1] == "{" and answer[-1:] == "}":
        answer = answer[1:-1]
    answer = re.sub(r",\\! *", "", answer)
    answer = _whole(answer) or answer
    if "\\" in answer:
        answer = _from_latex(answer)
    answer = re.sub("- *", "-", answer)
    answer = re.sub("([0-9]) +([0-9])", r"\1+\2", answer)  # 7 3/4 is 7+3/4
    answer = re.sub("[ {}]", "", answer).lower()
    return _whole(without_commas(answer)) or answer


def elements(answer: str) -> list[str]:
    """The elements of a tuple or an interval; of anything else, itself."""
    answer = without_commas(answer)
    if len(answer) > 2 and answer[0] in "([" and answer[-1] in ")]" and not re.search(r"[()\[\]]", answer[1:-1]):
        return [part.strip() for part in answer[1:-1].split(",")]
    return [answer]


def without_commas(answer: str) -> str:
    """1,234,567 as 1234567; the commas of tuples stay."""
    return re.sub(r"(?<=\d),(?=\d\d\d(?!\d))", "", answer)


def _equal_element(given: str, target: str) -> bool:
    fraction = r"-?[0-9]+.?/0*[1-9][0-9]*.?"
    if re.fullmatch(fraction, given) and re.fullmatch(fraction, target):
        return given == target  # 2/4 is not what was asked for
    if (_whole(given) is None) != (_whole(target) is None):
        return False
    return _no_difference(given, target)


def _no_difference(given: str, target: str) -> bool:
    import sympy
    from sympy.parsing import sympy_parser

    difference = f"({target})-({given})"
    letters = {c for c in difference.replace("sqrt", "").replace("frac", "") if c.isalpha()}
    if len(letters) > 2 or len(difference) > LONGEST or ENDLESS.search(difference):
        return False
    rules = (*sympy_parser.standard_transformations, sympy_parser.implicit_multiplication_application)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, of the syntax
            return sympy.simplify(sympy_parser.parse_expr(difference.replace("^", "**"), transformations=rules)) == 0
    except Exception:  # a model may have written anything; what can't be read is not equal
        return False


def _from_latex(answer: str) -> str:
    from pylatexenc.latex2text import LatexNodes2Text

    logging.getLogger("pylatexenc").setLevel(
        logging.CRITICAL
    )  # it warns of every \\frac that a model has left half done
    answer = answer.replace("\\tfrac", "\\frac").replace("\\dfrac", "\\frac").replace("\\frac", " \\frac")
    try:
        text = LatexNodes2Text().latex_to_text(answer)
    except Exception:  # as above
        return answer
    for sign, name in PLAIN.items():
        text = text.replace(sign, name)
    return text.strip()


def _without_text(answer: str) -> str:
    found = re.search(r"^\\text\{(.+?)\}$", answer)
    return found.group(1) if found else answer


def _whole(answer: str) -> str | None:
    """A number that is whole, in digits; None for anything else."""
    try:
        value = float(answer)
        return str(round(value)) if abs(value - round(value)) <= 1e-7 else None
    except (ValueError, OverflowError):
        return None
