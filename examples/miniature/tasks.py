"""Four tasks whose answers can be checked to the letter, and the tokenizer that writes them.

Every prompt ends with a colon or a question mark and the answer follows directly. What decides an answer (the two numbers of
a sum, a list, a string of brackets, the three numbers of a story) belongs to the training set or to the test set, by its
checksum: no test item is ever trained on, however long the training.
"""

from __future__ import annotations

import random
import zlib
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

EOS, MASK = "<eos>", "<mask>"
NAMES = ("Ada", "Ben", "Eve", "Ian", "Mia", "Tom")
ITEMS = ("apples", "books", "coins", "eggs", "keys", "pens")
BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}
STORIES = {  # a and b are the two numbers, a the larger one
    "{n} has {a} {i}. {n} buys {b} more. How many now?": "+",
    "{n} has {a} {i}. {n} gives {b} away. How many are left?": "-",
    "{n} has {a} {i} and {m} has {b}. How many together?": "+",
    "{n} has {a} {i}. {m} has {b} fewer. How many has {m}?": "-",
    "{n} had {a} {i} and then {b} came in. How many now?": "+",
    "{n} had {a} {i} and sold {b}. How many are left?": "-",
}


class Example(NamedTuple):
    task: str
    prompt: str
    answer: str


def is_test(item) -> bool:
    """Whether an item belongs to the test set: one in eight does."""
    return zlib.crc32(repr(item).encode()) % 8 == 0


def draw(make, test: bool):
    """The first item that `make` draws of the wanted set."""
    while True:
        item = make()
        if is_test(item) == test:
            return item


def drill(rng: random.Random) -> tuple[str, str]:
    """The carry and the digit of the last of three columns. In a worked answer the tokens that have to be computed are few
    among those that are copied; here there are only such."""
    columns = []
    for _ in range(3):
        columns.append(column(rng.randrange(10), rng.randrange(10), rng.randrange(2), rng.choice("+-")))
    text = ";".join(columns)
    return text[:-2], text[-2:]


def two_numbers(rng: random.Random, least: int, most: int) -> tuple[int, ...]:
    """Two different numbers of `least` to `most` digits each, the smaller one first."""
    while True:
        a, b = (rng.randrange(10 ** (n - 1), 10**n) for n in (rng.randint(least, most), rng.randint(least, most)))
        if a != b:
            return min(a, b), max(a, b)


def column(x: int, y: int, carry: int, sign: str) -> str:
    """One column of x + y or x - y: its two digits and the carry or borrow from the one before; behind the equals sign the
    carry or borrow to the next one and the digit."""
    value = x + y + carry if sign == "+" else x - y - carry
    return f"{x}{sign}{y}{sign}{carry}={int(value > 9 or value < 0)}{value % 10}"


def worked(a: int, b: int, sign: str) -> str:
    """a + b or a - b column by column from the right, then the result."""
    carry, steps = 0, []
    for place in range(len(str(a))):
        steps.append(column(a // 10**place % 10, b // 10**place % 10, carry, sign))
        carry = int(steps[-1][-2])
    return ";".join([*steps, str(a + b if sign == "+" else a - b)])


def arithmetic(rng: random.Random, test: bool) -> tuple[str, str]:
    """The sum or the difference of two numbers of two to four digits, worked out."""
    b, a = draw(lambda: two_numbers(rng, 2, 4), test)
    sign = rng.choice("+-")
    return f"work {a}{sign}{b}:", worked(a, b, sign)


def sort(rng: random.Random, test: bool) -> tuple[str, str]:
    """Five two-digit numbers in order."""
    numbers = draw(lambda: tuple(rng.randint(10, 99) for _ in range(5)), test)
    return f"sort {','.join(map(str, numbers))}:", ",".join(map(str, sorted(numbers)))


def close(rng: random.Random, test: bool) -> tuple[str, str]:
    """The brackets that close what 12 brackets have left open."""

    def make():
        text, still_open = "", []
        while len(text) < 12:
            if still_open and rng.random() < 0.35:
                text += BRACKETS[still_open.pop()]
            else:
                still_open.append(rng.choice(tuple(BRACKETS)))
                text += still_open[-1]
        return text, "".join(BRACKETS[b] for b in reversed(still_open))

    text, closing = draw(make, test)
    return f"close {text}:", closing


def story(rng: random.Random, test: bool) -> tuple[str, str]:
    """A word problem: whether to add or to subtract two numbers of two or three digits stands in its words."""
    b, a = draw(lambda: two_numbers(rng, 2, 3), test)
    n, m = rng.sample(NAMES, 2)
    text, sign = rng.choice(tuple(STORIES.items()))
    return text.format(n=n, m=m, i=rng.choice(ITEMS), a=a, b=b), worked(a, b, sign)


TASKS = {task.__name__: task for task in (arithmetic, sort, close, story)}


def examples(task: str, rng: random.Random, count: int, *, test: bool = False) -> list[Example]:
    """`count` examples of a task."""
    return [Example(task, *TASKS[task](rng, test)) for _ in range(count)]


def tokenizer() -> Tokenizer:
    """A token per digit and sign, and one per word with the space before it."""
    words = set()
    split = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[0-9]|[^A-Za-z0-9]"), "isolated")
    for text in STORIES:
        for n in NAMES:
            for i in ITEMS:
                words.update(w for w, _ in split.pre_tokenize_str(text.format(n=n, m=n, i=i, a=0, b=0)))
    words.update(("work", "sort", "close"))
    words.update(" 0123456789+-=;,:.?", BRACKETS, BRACKETS.values())
    vocabulary = {word: i for i, word in enumerate([EOS, MASK, *sorted(words)])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS))
    made.pre_tokenizer = split
    made.decoder = decoders.Fuse()
    return made
