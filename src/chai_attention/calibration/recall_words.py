"""Words and phrasings of the facts to recall.

Calibration, its promise and evaluation share no name and no phrasing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phrasing:
    """How a fact is told and asked for; ``{name}`` and ``{value}`` stand for what it is about.

    Attributes:
        fact: hidden in the text.
        question: asked at the end.
        opening: of the answer; a space and the value follow.
    """

    fact: str
    question: str
    opening: str


@dataclass(frozen=True)
class Wording:
    """Words to draw from.

    Attributes:
        instruction: before the text.
        phrasings: one is drawn for every sequence.
        names: what facts are about.
        values: patterns of answers: ``0`` stands for a digit, ``A`` for a capital letter.
    """

    instruction: str
    phrasings: tuple[Phrasing, ...]
    names: tuple[str, ...]
    values: tuple[str, ...]


def _phrasings(text: str) -> tuple[Phrasing, ...]:
    """Phrasings of three lines each."""
    lines = text.strip().splitlines()
    return tuple(Phrasing(*lines[first : first + 3]) for first in range(0, len(lines), 3))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CALIBRATION = Wording(
    instruction="Read the text and remember every note in it.",
    phrasings=_phrasings("""
Note: the access code of the {name} is {value}.
Tell me the access code of the {name}.
The access code of the {name} is
Please keep in mind that the {name} was registered as {value}.
As what was the {name} registered?
The {name} was registered as
The ticket for the {name} carries the label {value}.
Which label does the ticket for the {name} carry?
The ticket for the {name} carries the label
Somebody wrote {value} on the back of the {name}.
What is written on the back of the {name}?
On the back of the {name} is written
To open the {name}, enter {value} and wait.
What do I enter to open the {name}?
To open the {name}, enter
Inventory: {name}, shelf mark {value}.
Give the shelf mark of the {name}.
Inventory: {name}, shelf mark
The serial of this {name} reads {value}, as far as we know.
How does the serial of the {name} read?
The serial of the {name} reads
Call extension {value} to ask about the {name}.
Which extension answers questions about the {name}?
To ask about the {name}, call extension
"""),
    names=_names("""
window bottle garden silver rocket candle basket monkey button ladder cotton island
blanket compass dolphin engine feather guitar hammer jacket kettle lemon mirror needle
onion pencil quilt ribbon saucer teapot umbrella violin wagon anchor barrel cabinet
drawer easel fiddle goblet helmet insect jewel kitchen locket magnet napkin oven
"""),
    values=("0000", "00000", "000000", "0000000", "AA000", "A00A0", "AAA"),
)

EVALUATION = Wording(
    instruction="Memorize the special magic numbers hidden in this text.",
    phrasings=_phrasings("""
The special magic number for {name} is {value}.
What is the special magic number for {name}?
The special magic number for {name} is
Among all secrets, {name} hides the magic number {value}.
Which magic number does {name} hide?
The magic number that {name} hides is
It is told that {value} is the lucky number of {name}.
What lucky number does {name} have?
The lucky number of {name} is
Whoever asks for {name} has to say the number {value}.
What number has to be said by whoever asks for {name}?
Whoever asks for {name} has to say the number
"""),
    names=_names("""
river copper lantern maple falcon harbor velvet thunder pepper granite orchid saddle
amber birch canyon desert ember forest glacier horizon ivory juniper kestrel lagoon
meadow nectar ocean prairie quartz raven summit tundra urchin valley willow zephyr
badger cobalt dahlia eagle fossil ginger heron indigo jasmine koala lotus marble
"""),
    values=("0000000",),
)

HELD_OUT = Wording(
    instruction="There are a few remarks between the lines: do not forget them.",
    phrasings=_phrasings("""
By the way, the password of the {name} is {value}.
What is the password of the {name}?
The password of the {name} is
One should know that the {name} lives at number {value}.
At which number does the {name} live?
The {name} lives at number
They gave {value} coins to the {name} yesterday.
How many coins did they give to the {name}?
The number of coins that they gave to the {name} is
For the {name}, reference {value} was noted down.
Which reference was noted down for the {name}?
The reference for the {name} is
"""),
    names=_names("""
tiger planet bridge castle pirate scholar tunnel market parrot captain turtle temple
cactus dancer ladybird miller oyster palace rabbit sailor tailor vessel walnut wizard
baker comet doctor farmer giant hermit kitten legend mason nurse otter panda queen
shepherd spider viking
"""),
    values=("000000", "0000000"),
)
