"""Small labelled data that every machine has, for recipes and tests that must not download any."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from sat_lightning.data.records import check_index
from sat_lightning.data.samples import import_object
from sat_lightning.data.sources import register_source
from sat_lightning.errors import DataError, nearest

_GOOD = "bright brilliant charming clever delightful funny gripping honest moving splendid tender wonderful".split()
_BAD = "awful boring clumsy dreary dull empty flat lifeless messy pointless tedious weak".split()
_THINGS = "acting camera cast dialogue ending film humour music pace plot script story".split()
_NAMES = "Ada Alan Barbara Donald Edsger Frances Grace Ken Margaret Niklaus Radia Tony".split()
_PLACES = "Athens Bergen Cairo Delhi Kyoto Lagos Lima Oslo Prague Quito Riga Tunis".split()


def _sentiment(dice: random.Random) -> dict[str, Any]:
    """A sentence about a film that has one opinion, sometimes said by denying the other."""
    label = dice.randrange(2)
    clauses = []
    for thing in dice.sample(_THINGS, dice.randint(1, 3)):
        is_denied = dice.random() < 0.25
        word = dice.choice(_GOOD if (label == 1) != is_denied else _BAD)
        clauses.append(f"the {thing} is {'not ' if is_denied else dice.choice(['', 'very ', 'quite '])}{word}")
    return {"sentence": " and ".join(clauses), "label": ["negative", "positive"][label]}


def _words(dice: random.Random) -> dict[str, Any]:
    """Words of a sentence, each with what it names: a person, a place, or nothing."""
    people, places = dice.sample(_NAMES, 2), dice.sample(_PLACES, 2)
    form = dice.choice(["P met P in L", "P went from L to L", "in L lives P", "P calls P", "L is far from L"])
    slots = {"P": people, "L": places}
    tokens = [slots[word].pop() if word in slots else word for word in form.split()]
    tags = [{"P": "person", "L": "place"}.get(word, "other") for word in form.split()]
    return {"tokens": tokens, "tags": tags}


def _choices(dice: random.Random) -> dict[str, Any]:
    """A question about a sentence, four answers, and which of them is right."""
    people = dice.sample(_NAMES, 4)
    places = dice.sample(_PLACES, 4)
    told = [f"{person} is in {place}." for person, place in zip(people[:2], places[:2], strict=True)]
    asked, endings = dice.randrange(2), dice.sample(places, 4)
    return {
        "text": f"{' '.join(told)} Where is {people[asked]}?",
        "endings": endings,
        "label": endings.index(places[asked]),
    }


_KINDS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "choices": _choices,
    "sentiment": _sentiment,
    "words": _words,
}


@register_source("demo://", records=True)
class DemoRecords(Dataset[Any]):
    """Generated rows, the same on every machine, each made when it is asked for.

    `demo://sentiment` gives `sentence` and `label` (negative, positive); `demo://words` gives `tokens` and as many
    `tags` (other, person, place); `demo://choices` gives `text`, four `endings` and the number of the right one as
    `label`.

    Args:
        path: `sentiment`, `words` or `choices`.
        num_rows: how many.

    Raises:
        DataError: there is no such kind.
    """

    def __init__(self, path: str, num_rows: int = 4000) -> None:
        if path not in _KINDS:
            raise DataError(f"demo://{path}: there are {', '.join(_KINDS)}.{nearest(path, _KINDS)}")
        self.name, self.num_rows = f"demo://{path}", num_rows
        self._make = _KINDS[path]

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        check_index(self, index)
        return self._make(random.Random(f"{self.name} {index}"))

    def fingerprint(self) -> str:
        """What identifies the rows."""
        return f"{self.name} {self.num_rows}"


@register_source("digits://", records=True)
class DigitRecords(Dataset[Any]):
    """The 1797 handwritten digits that scikit-learn ships: `image` uint8 `[8, 8]` and `label`, 0 to 9.

    E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.

    Args:
        path: unused.

    Raises:
        DataError: scikit-learn is not installed.
    """

    def __init__(self, path: str = "") -> None:
        try:
            load = import_object("sklearn.datasets.load_digits", "digits://")
        except DataError as error:
            raise DataError(
                f'digits:// needs scikit-learn ({error}). Run: pip install "sat_lightning[digits]", or give images of '
                "your own: a folder with a folder for each class."
            ) from error
        found = load()
        self.name = "digits://"
        self._images = np.rint(found.images * (255 / 16)).astype(np.uint8)
        self._labels = found.target

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        check_index(self, index)
        return {"image": self._images[index], "label": int(self._labels[index])}

    def fingerprint(self) -> str:
        """What identifies the rows."""
        return f"{self.name} {len(self)}"
