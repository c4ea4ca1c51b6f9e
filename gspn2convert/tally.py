"""Counting unreadable images: a few are put up with, many are the user's to mend."""

import logging
import math

from gspn2convert.errors import UserError

TOLERATED = 0.01
# Fewer images say too little about the set, unless they are the whole of it.
_ENOUGH = 100

_log = logging.getLogger(__name__)


class Tally:
    """Which images of a set were asked for, and how many of them could not be read. Each image counts once."""

    def __init__(self, total: int | None) -> None:
        """Start with nothing seen.

        Args:
            total: images in the set, None where nobody knows.
        """
        self.seen = 0
        self.unreadable = 0
        self._total = total
        self._first = ""
        self._known = bytearray(total or 0)

    def add(self, index: int, problem: str) -> None:
        """Count an image that was asked for.

        Args:
            index: of the image.
            problem: why it cannot be read, with its name; empty if it can.
        """
        self._known.extend(bytes(max(0, index + 1 - len(self._known))))
        if self._known[index]:
            return
        self._known[index] = 1
        self.seen += 1
        if problem:
            level = logging.INFO if self.unreadable else logging.WARNING
            _log.log(level, "unreadable image, another one stands in for it: %s", problem)
            self.unreadable += 1
            self._first = self._first or problem

    def check(self, *, hopeless: bool = False) -> None:
        """Stop where too many images are unreadable.

        Args:
            hopeless: nothing but unreadable images was found.

        Raises:
            UserError: more than 1 % of the whole set is unreadable, or of the part seen so far more than 1 % and
                three standard deviations, which a set with 1 % would hardly show by chance.
        """
        complete = self.seen == self._total
        allowed = TOLERATED * self.seen
        if not complete:
            allowed += 3 * math.sqrt(allowed)
        if hopeless or (self.unreadable > allowed and (complete or self.seen >= _ENOUGH)):
            raise UserError(
                f"{self.unreadable} of {self.seen} images are unreadable, more than the 1 % that is put up with; "
                f"mend or remove them; the first is {self._first}"
            )
