"""What is worked out from a network's structure alone, and need not be worked out again."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Answer = TypeVar("Answer")


class LastAnswers:
    """The last answer of each class, with the question that it answers. Copies begin without any, and none is pickled.

    >>> last = LastAnswers()
    >>> last.once(int, "how many?", lambda: 3), last.once(int, "how many?", lambda: 4), last.once(int, "and now?", lambda: 5)
    (3, 3, 5)
    """

    def __init__(self) -> None:
        self._answers: dict[type, tuple[Hashable, Any]] = {}

    def once(
        self,
        kind: type[Answer],
        question: Hashable,
        work: Callable[[], Answer],
        is_small: Callable[[Answer], bool] | None = None,
    ) -> Answer:
        """The answer that is kept, or a new one in its place.

        Args:
            kind: class of the answer.
            question: all that the answer depends on, beside what never changes.
            work: works it out.
            is_small: says whether it may be kept; None for what always is.
        """
        asked, answer = self._answers.get(kind, (None, None))
        if answer is None or asked != question:
            self._answers.pop(kind, None)
            answer = work()
            if is_small is None or is_small(answer):
                self._answers[kind] = question, answer
        return answer

    def __len__(self) -> int:
        return len(self._answers)

    def __reduce__(self) -> tuple:
        return LastAnswers, ()
