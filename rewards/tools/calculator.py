"""Exact arithmetic on rational numbers, by a parser of its own: no eval, nothing larger than `DIGITS` digits."""
from __future__ import annotations

import re
from fractions import Fraction
from functools import partial

from rewards.tools import Tool, ToolError

__all__ = ["TOOL", "calculator", "checked", "value", "written"]

DIGITS, EXPONENT, DEPTH = 300, 1000, 50
TOKEN = re.compile(r"\s*(?:((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)|(\*\*|[-+*/^%()]))")
SIGNS = {"×": "*", "÷": "/", "−": "-", "–": "-", "$": "", "£": "", "€": "", "[": "(", "]": ")"}


def value(expression: str) -> Fraction:
    """The value of an expression of + - * / ** ^ % and parentheses. 7 % 3 is a remainder, 50% a half.

    >>> str(value("-2 ** 2 + 1,000 / 3")), str(value("(0.1 + 0.2) * 50%")), str(value("7 % 3"))
    ('988/3', '3/20', '1')
    """
    tokens, position = [], 0
    for old, new in SIGNS.items():
        expression = expression.replace(old, new)
    expression = expression.rstrip()
    while position < len(expression):
        found = TOKEN.match(expression, position)
        if found is None:
            raise ToolError(f"{expression[position:position + 20].strip()!r} is no number and no operator")
        tokens.append(found[1] or found[2])
        position = found.end()
    result = total(tokens, 0)
    if tokens:
        raise ToolError(f"{tokens[0]!r} is one too many")
    return result


def total(tokens: list[str], depth: int) -> Fraction:
    left = product(tokens, depth)
    while tokens and tokens[0] in "+-":
        left = bounded(left + product(tokens, depth) if tokens.pop(0) == "+" else left - product(tokens, depth))
    return left


def product(tokens: list[str], depth: int) -> Fraction:
    left = signed(tokens, depth)
    while tokens and tokens[0] in ("*", "/", "%"):
        sign, right = tokens.pop(0), signed(tokens, depth)
        if sign != "*" and right == 0:
            raise ToolError("it divides by zero")
        left = bounded(left * right if sign == "*" else left / right if sign == "/" else left % right)
    return left


def signed(tokens: list[str], depth: int) -> Fraction:
    if depth > DEPTH:
        raise ToolError(f"it nests more than {DEPTH} deep")
    if tokens and tokens[0] in "+-":
        return signed(tokens, depth + 1) if tokens.pop(0) == "+" else -signed(tokens, depth + 1)
    return power(tokens, depth)


def power(tokens: list[str], depth: int) -> Fraction:
    base = atom(tokens, depth)
    while tokens and tokens[0] == "%" and not (len(tokens) > 1 and (tokens[1] == "(" or tokens[1][-1].isdigit())):
        tokens.pop(0)
        base /= 100
    if tokens and tokens[0] in ("**", "^"):
        tokens.pop(0)
        exponent = signed(tokens, depth + 1)                  # to the right: 2 ** 3 ** 2 is 2 ** 9
        if exponent.denominator != 1 or abs(exponent) > EXPONENT:
            raise ToolError(f"exponents are whole numbers up to {EXPONENT}")
        if exponent < 0 and base == 0:
            raise ToolError("it divides by zero")
        size = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent)
        if size > 4 * DIGITS:
            raise ToolError(f"the numbers get longer than {DIGITS} digits")
        base = bounded(base ** int(exponent))
    return base


def atom(tokens: list[str], depth: int) -> Fraction:
    token = tokens.pop(0) if tokens else "its end"
    if token == "(":
        inside = total(tokens, depth + 1)
        if not tokens or tokens.pop(0) != ")":
            raise ToolError("a parenthesis is not closed")
        return inside
    if not token[-1].isdigit() and not token[0].isdigit():
        raise ToolError(f"a number is missing before {token if token == 'its end' else repr(token)}")
    return bounded(Fraction(token.replace(",", "").rstrip(".")))


def bounded(number: Fraction) -> Fraction:
    if max(number.numerator.bit_length(), number.denominator.bit_length()) > 4 * DIGITS:
        raise ToolError(f"the numbers get longer than {DIGITS} digits")
    return number


def written(number: Fraction) -> str:
    """In decimals: exactly where 12 places do, else to 10 significant digits.

    >>> written(Fraction(5)), written(Fraction(1, 8)), written(Fraction(5, 3))
    ('5', '0.125', '1.666666667')
    """
    if number.denominator == 1:
        return str(number.numerator)
    scaled = number * 10**12
    if scaled.denominator == 1:
        digits = f"{abs(scaled.numerator):013d}"
        return f"{'-' * (number < 0)}{digits[:-12]}.{digits[-12:].rstrip('0')}"
    try:
        return f"{float(number):.10g}"
    except OverflowError:
        whole = str(abs(round(number)))
        return f"{'-' * (number < 0)}{whole[0]}.{whole[1:10]}e+{len(whole) - 1}"


def steps(text: str) -> list[tuple[str, str]]:
    """The equations of a worked solution: what stands in <<a=b>>, else 'a = b' between commas and lines.

    >>> steps("<<2*62=124>>124, <<194-2=192>>192"), steps("1+1 = 2, 2*1,000 = 2000")
    ([('2*62', '124'), ('194-2', '192')], [('1+1', '2'), ('2*1,000', '2000')])
    """
    pieces = re.findall(r"<<([^<>]*)>>", text) or re.split(r",(?!\d{3}(?!\d))|[;\n]", text)
    return [(left.strip(), right.strip()) for left, _, right in (piece.rpartition("=") for piece in pieces if piece.strip())]


def checked(text: str, *, reference: str | None = None) -> str:
    """Whether the equations of a worked solution hold, exactly; and with a reference, whether the last one gives it."""
    wrong, last = [], None
    for left, right in steps(text):
        if not left:
            wrong.append(f"{right} is no equation.")
            continue
        try:
            sides = [value(side) for side in left.split("=")]
            said, last = value(right), sides[-1]
        except ToolError as error:
            wrong.append(f"{left}={right}: {error}.")
            continue
        if any(side != said for side in sides):
            wrong.append(f"{left} is {written(last)}, not {right}.")
    details = f" Details: {' '.join(wrong)}" if wrong else ""
    if reference is None:
        return f"The calculation process is {'incorrect' if wrong else 'correct'}.{details}"
    right = last == value(reference)
    result, goal = "None" if last is None else written(last), written(value(reference))
    if right:
        return f"The calculation process is incorrect, but the answer matches the predicted answer.{details}" if wrong else \
            "Both the calculation and the answer are correct."
    if wrong or last is None:
        return (f"Both the calculation and the answer are incorrect.{details} The calculated answer {result} does not match the "
                f"predicted answer {goal}.")
    return f"The calculation process is correct, but the resulting answer {result} does not match the predicted answer {goal}."


def calculator(text: str, *, reference: str | None = None) -> str:
    """The value of an expression, or whether equations hold.

    reference   the answer that a worked solution should reach, where it is known

    >>> calculator("2 ** 10 / 3"), calculator("<<5/2=2.5>>2.5")
    ('341.3333333', 'The calculation process is correct.')
    """
    if reference is not None or "=" in text:
        return checked(text, reference=reference)
    if not text:
        raise ToolError("it is empty")
    return written(value(text))


def knowing(reference: str) -> Tool:
    """The calculator of a question whose answer is known."""
    return Tool(TOOL.name, TOOL.description, TOOL.grammar, partial(calculator, reference=reference))


TOOL = Tool("calculator", "Computes an expression exactly, or checks equations.",
            "an expression of numbers, + - * / ** % and parentheses, or equations as in <<2*3=6>>, <<6+1=7>>", calculator)
