"""What follows a failure of a choice: it resumes, is tried again, restarts, or is given up. And what its next attempt does
without. Both depend on what failed alone, and need no event loop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from serve_app.handoff.errors import EngineDead, HandoffLost, OtherVersion, StageError, StageUnavailable
from serve_app.stage import Stage

UNSTRUCTURABLE = (
    "The structure asked for cannot be decoded: its grammar does not compile, or leaves no token that the other parameters "
    "allow."
)


class Next(Enum):
    RESUME = auto()
    """The next attempt goes on from the output tokens so far."""
    AGAIN = auto()
    """There are no output tokens: the next attempt is as the first."""
    RESTART = auto()
    """The output tokens are dropped, of which the client has seen none, and made anew."""
    GIVE_UP = auto()


@dataclass
class Attempts:
    """What failed of one choice so far.

    After embeddings were lost twice, the next attempt does without encoders. After prefill was absent or its blocks were
    lost, twice in all, decode prefills. An engine ends a request in the same way when its KV blocks or embeddings were lost
    and when its grammar cannot be compiled or followed. So after the first such end decode does a structured request alone,
    and after the second the grammar is at fault.

    Where no replica has the weights that embeddings or blocks were made with, the stage that refused them makes its own.
    """

    structured: bool = False
    """Whether the answer follows a grammar."""
    buffered: bool = False
    """Whether the client gets the answer as a whole. Then output tokens can be dropped, because it has not seen them."""
    resumable: bool = False
    """Whether an engine makes the rest of the answer from its prompt and output tokens alone."""
    embeddings_lost: int = 0
    caches_missed: int = 0
    """How often items that were left to a prefix cache were not there."""
    prefills_lost: int = 0
    blocks_lost: int = 0
    engines_died: int = 0
    other_than_encoders: bool = False
    other_than_prefill: bool = False

    def after(
        self,
        error: StageError,
        encoded: bool,
        tokens: bool,
        late: bool,
        allow: Callable[[bool], bool],
        cached: bool = False,
    ) -> Next:
        """What follows an attempt that failed.

        ``encoded``: whether encoders had encoded items of it; ``cached``: whether items were left to a prefix cache.
        ``tokens``: whether there are output tokens. ``late``: whether the deadline of the first token is over.
        ``allow(resumes)`` tells whether there may be one more attempt; it is called last, and at most once.
        """
        if cached and isinstance(error, HandoffLost):
            self.caches_missed += 1
        else:
            self._learn(error, encoded, tokens)
        resumes = tokens and self.resumable and not _nobody_resumes(error)
        unkept = tokens and not resumes and (late or not self.buffered)
        if unkept or self.cannot_be_structured or self.engines_died >= 2 or not allow(resumes):
            return Next.GIVE_UP
        if not tokens:
            return Next.AGAIN
        return Next.RESUME if resumes else Next.RESTART

    @property
    def without_encoders(self) -> bool:
        return self._alone or self.other_than_encoders or self.embeddings_lost >= 2

    @property
    def without_prefill(self) -> bool:
        return self._alone or self.other_than_prefill or self.prefills_lost + self.blocks_lost >= 2

    @property
    def cannot_be_structured(self) -> bool:
        return self.structured and self.blocks_lost >= 2

    @property
    def _alone(self) -> bool:
        return self.structured and self.blocks_lost > 0

    def _learn(self, error: StageError, encoded: bool, tokens: bool) -> None:
        at_decode, lost = error.stage is Stage.DECODE, isinstance(error, HandoffLost)
        self.embeddings_lost += lost and encoded
        self.blocks_lost += lost and at_decode
        self.prefills_lost += isinstance(error, StageUnavailable) and error.stage is Stage.PREFILL
        self.engines_died += isinstance(error, EngineDead) and at_decode
        if isinstance(error, OtherVersion):
            by_encoders = encoded and not tokens
            self.other_than_encoders |= at_decode or by_encoders
            self.other_than_prefill |= at_decode or not by_encoders


def _nobody_resumes(error: StageError) -> bool:
    """No decode replica has the weights that the output tokens were made with."""
    return isinstance(error, OtherVersion) and error.stage is Stage.DECODE
