"""What a file, a name or a folder that somebody else made may hold."""

from __future__ import annotations

BOMBS = {
    "nested aliases": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)),
    "many aliases": "a: &a x\nb: [" + ", ".join(["*a"] * 20_000) + "]",
    "merge keys": "a: &a {k: v}\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)}\n  <<: [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)),
    "50 MB": "description: " + "x" * 50_000_000,
    "deep flow": "[" * 100_000,
    "deep blocks": "- " * 100_000,
    "an alias of what is around it": "a: &a [*a]",
    "many values": "- a\n" * 200_000,
    "a number in base 60": "a: " + "1:" * 400_000 + "1",
    "a long number": "a: " + "1" * 400_000,
    "a date that is none": "a: 2020-13-45",
    "an integer that is none": 'a: !!int ""',
    "a truth that is none": "a: !!bool x",
    "a time that is none": "a: !!timestamp x",
}

ESC = "\x1b[31mred\x1b[0m"
NAMES = {
    "escape": f"cat{ESC}",
    "bell": "cat\x07",
    "markup": "[/x] [red]cat",
    "reversed": "cat\u202etac",
    "byte": "caf\udce9",
}
