"""What an objective asks of a batch besides one image and one caption a row, and what the entries are called.

second     another image of the row's class or concept, and another caption: the keys with `_2`, `group_ids_2`
captions   all captions of the row: the text's key with `_all` (n, k, ...), and how many of the k, `caption_count`
"""

from __future__ import annotations

from dataclasses import dataclass

SECOND, ALL = "_2", "_all"
MOST_CAPTIONS = 16  # of a row in one step; of more the first ones


@dataclass(frozen=True)
class Needs:
    second: bool = False
    captions: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(self.second or other.second, self.captions or other.captions)

    def __bool__(self) -> bool:
        return self.second or self.captions
