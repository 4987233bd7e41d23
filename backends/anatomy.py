"""A model's tokenizer and chat template taken apart, for people to look at; nothing is trained on what this says."""

from __future__ import annotations

from collections.abc import Sequence

from spa_lite.backend import ModelSettings, Tokenizer
from spa_lite.backends.chat import ChatTokenizer
from spa_lite.backends.outline import outline
from spa_lite.records import Ids, Message


class Anatomy:
    """The tokenizer that a run with this model would use, without its weights. Raises ModelError as `outline` does."""

    def __init__(self, settings: ModelSettings, backend: str | None = None) -> None:
        found = outline(backend, settings)
        self.context = found.context
        self.tokenizer: Tokenizer = found.tokenizer
        self._chat = self.tokenizer if isinstance(self.tokenizer, ChatTokenizer) else None
        self._controls = self._chat.control_tokens if self._chat else {}

    def together(self, messages: Sequence[Message], text: str) -> tuple[Ids, Ids] | None:
        """Ids of prompt and answer as one text, and of the prompt alone; None where there is no chat template.

        Where the second is not the beginning of the first, a token would straddle the border between the two.
        """
        if self._chat is None:
            return None
        before, both = self._chat.together(messages, text)
        return both, before

    def special(self, ids: Sequence[int]) -> dict[int, str]:
        """The control tokens among these ids, by the names that the tokenizer has for them."""
        return {i: self._controls[i] for i in set(ids) & self._controls.keys()}

    @property
    def strings(self) -> tuple[str, ...]:
        """The strings of this tokenizer's control tokens."""
        return tuple(self._controls.values())
