"""A model's tokenizer and chat template taken apart, for people to look at; nothing is trained on what this says."""

from __future__ import annotations

from collections.abc import Sequence

from spa_lite.backend import ModelSettings, Tokenizer
from spa_lite.backends.chat import ChatTokenizer
from spa_lite.backends.outline import outline
from spa_lite.records import Ids, Message

NO_LIMIT = 2**40
"""Long texts are counted here, not run through a model, so the library need not warn of them."""


class Anatomy:
    """The tokenizer that a run with this model would use, without its weights. Raises ModelError as `outline` does."""

    def __init__(self, settings: ModelSettings, backend: str | None = None) -> None:
        found = outline(backend, settings)
        self.context = found.context
        self.tokenizer: Tokenizer = found.tokenizer
        if isinstance(self.tokenizer, ChatTokenizer):
            self.tokenizer._tokenizer.model_max_length = NO_LIMIT

    def together(self, messages: Sequence[Message], text: str) -> tuple[Ids, Ids] | None:
        """Ids of prompt and answer as one text, and of the prompt alone; None where there is no chat template.

        Where the second is not the beginning of the first, a token would straddle the border between the two.
        """
        t = self.tokenizer
        if not isinstance(t, ChatTokenizer):
            return None
        prompt, quoted = t._prompt_text(messages)
        before = t._encode(prompt, quoted)
        answer = t._lead + t._quote(t._without_end(text), quoted)
        return t._encode(prompt + answer, quoted), before

    def special(self, ids: Sequence[int]) -> dict[int, str]:
        """The control tokens among these ids, by the names that the tokenizer has for them."""
        t = self.tokenizer
        if not isinstance(t, ChatTokenizer):
            return {}
        return {i: str(t._tokenizer.convert_ids_to_tokens(i)) for i in set(ids) & t._specials}

    @property
    def strings(self) -> tuple[str, ...]:
        """The strings of this tokenizer's control tokens."""
        return tuple(self.tokenizer._strings) if isinstance(self.tokenizer, ChatTokenizer) else ()
